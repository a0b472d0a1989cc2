"""The language model of a multi-modal one is found by structure, whatever the rest is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from quantkit.checkpoint.network.modules import classify
from quantkit.checkpoint.network.multimodal import language_model
from tests.support.tokenized_towers import FAMILIES

LINEAR = ("linear", "experts", "router")
TEXT = {"hidden_size": 8, "vocab_size": 50, "num_hidden_layers": 2}


def kinds(config: dict[str, Any], **shapes: tuple[int, ...]) -> dict[str, str]:
    """Module → kind of tensors whose names are given with `__` for a dot."""
    named = {f"{name.replace('__', '.')}.weight": shape for name, shape in shapes.items()}
    return {module.name: module.kind for module in classify(named, config)}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_linear_layer_is_in_the_decoder_of_transformers(family: str) -> None:
    config: Any = hf.AutoConfig.for_model(family, **FAMILIES[family])
    make: Any = hf.AutoModelForMultimodalLM.from_config
    with torch.device("meta"):
        network = make(config)
    words = network.get_input_embeddings()
    embedding = next(name for name, module in network.named_modules() if module is words)
    prefix = embedding.rpartition(".")[0]
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    found = {module.name: module.kind for module in classify(shapes, config.to_dict())}
    linear = [name for name, kind in found.items() if kind in LINEAR]
    assert linear
    assert all(name.startswith(f"{prefix}.layers.") for name in linear)
    assert found[embedding] == "embedding"
    beside = {kind for name, kind in found.items() if name.rpartition(".")[0] == prefix}
    assert "norm" in beside
    assert "tower" not in {found[name] for name in found if name.startswith(f"{prefix}.layers.")}


def test_towers_of_any_name_and_as_many_blocks_as_the_language_model() -> None:
    config = {"text_config": TEXT, "vision_config": {"num_hidden_layers": 2}}
    text = {f"model__layers__{i}__mlp__up_proj": (16, 8) for i in range(2)}
    seen = {f"model__eye__stack__layers__{i}__mlp__up_proj": (16, 8) for i in range(2)}
    bridge = {f"model__bridge__{i}": (8, 8) for i in (0, 2)}
    ends = {"model__embed_tokens": (50, 8), "model__norm": (8,), "lm_head": (50, 8)}
    found = kinds(config, **ends, **seen, **bridge, **text, model__eye__head=(9, 8))
    assert found["model.layers.1.mlp.up_proj"] == "linear"
    assert found["model.eye.stack.layers.1.mlp.up_proj"] == "tower"
    assert found["model.bridge.0"] == found["model.eye.head"] == "tower"
    assert found["lm_head"] == "head"
    assert found["model.norm"] == "norm"
    assert found["model.embed_tokens"] == "embedding"


def test_projections_beside_the_blocks_are_left_alone() -> None:
    found = kinds(
        {"text_config": TEXT}, model__language_model__embed_tokens=(50, 8),
        model__language_model__per_layer_projection=(4, 8),
        model__language_model__mixers__0=(8, 8), model__language_model__layers__0__mlp__fc=(8, 8),
        model__language_model__layers__1__mlp__fc=(8, 8),
    )  # fmt: skip
    assert found["model.language_model.per_layer_projection"] == "tower"
    assert found["model.language_model.mixers.0"] == "tower"
    assert found["model.language_model.layers.0.mlp.fc"] == "linear"


def test_a_model_of_text_alone_has_no_other_part() -> None:
    shapes = {"model.embed_tokens.weight": (50, 8), "model.layers.0.mlp.up_proj.weight": (16, 8)}
    assert language_model(shapes, TEXT) is None
    assert language_model({"model.norm.weight": (8,)}, {"text_config": TEXT}) is None
