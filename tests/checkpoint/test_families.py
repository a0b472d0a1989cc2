"""The knowledge of model families stands in one place, and is what Transformers has."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quantkit.checkpoint.network import families
from quantkit.checkpoint.network.config import is_tied, text_size
from quantkit.checkpoint.network.families import FAMILIES, family, family_of
from quantkit.checkpoint.network.modules import classify

PACKAGE = Path(families.__file__).parents[3]
HERE = Path(families.__file__).parent
TYPES = {kind for found in FAMILIES for kind in found.types}
OTHER_MEANINGS = {
    ("checkpoint/network/modules.py", "vit"),  # the name of a tower
    ("checkpoint/upcycle.py", "llama"),  # what it reads, and what it writes
    ("checkpoint/upcycle.py", "mixtral"),
    ("checkpoint/upcycle.py", "qwen2_moe"),
    ("checkpoint/wrap_vision.py", "llama"),
    ("checkpoint/wrap_vision.py", "idefics3"),
    ("checkpoint/wrap_vision.py", "idefics3_vision"),
    ("validation/ask/questions.py", "canary"),
    ("validation/forecast.py", "canary"),
    ("validation/reports/report.py", "canary"),
    ("verification/gguf.py", "gpt2"),  # a tokenizer's name
}
"""Strings that are a `model_type` of Transformers too, where they mean something else."""
BUILT = sorted(kind for f in FAMILIES if not f.towers for kind in f.types if kind in CONFIG_MAPPING)


def test_no_other_file_names_a_model_type() -> None:
    known = TYPES | set(CONFIG_MAPPING.keys())
    found = {
        (str(file.relative_to(PACKAGE)), node.value)
        for file in PACKAGE.rglob("*.py")
        if HERE not in file.parents
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in known
    }
    assert found == OTHER_MEANINGS


def test_every_file_is_looked_up_and_every_type_stands_once() -> None:
    files = {file.stem for file in HERE.glob("*.py")} - {"__init__", "base"}
    modules = [importlib.import_module(f"{families.__name__}.{stem}") for stem in files]
    assert sorted(map(repr, FAMILIES)) == sorted(repr(f) for m in modules for f in m.FAMILIES)
    assert len(TYPES) == sum(len(found.types) for found in FAMILIES)


def test_the_language_model_is_looked_up_before_what_is_around_it() -> None:
    nested = {"model_type": "llava", "text_config": {"hidden_size": 8, "model_type": "qwen2"}}
    assert family(nested) is family_of("qwen2")
    silent = {"model_type": "gemma3", "text_config": {"hidden_size": 8}}
    assert family(silent) is family_of("gemma3_text")


def test_an_unknown_family_is_llamas_kin_and_says_so() -> None:
    unknown = family({"model_type": "no_such"})
    assert not unknown.known
    assert unknown.norms == family_of("llama").norms
    assert family_of("llama").known


@pytest.mark.parametrize("model_type", BUILT)
def test_sizes_and_the_tied_head_are_the_defaults_of_transformers(model_type: str) -> None:
    whole: Any = CONFIG_MAPPING[model_type]()
    text = whole if model_type.startswith("t5gemma") else whole.get_text_config()
    config = {"model_type": model_type}
    for key in family(config).sizes:
        assert text_size(config, key) == getattr(text, key), key
    inside = model_type.endswith("_text") and model_type.removesuffix("_text") in TYPES
    if not inside and (family(config).derivable or family(config).tied):
        assert is_tied(config) == getattr(whole, "tie_word_embeddings", False)


@pytest.mark.parametrize("model_type", BUILT)
def test_a_norm_of_weight_zero_tells_what_it_adds(model_type: str) -> None:
    folder = CONFIG_MAPPING[model_type].__module__.split(".")[-2]
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    norms = [
        value
        for name, value in vars(module).items()
        if re.search(r"(RMSNorm|LayerNorm1P)$", name) and not re.search("Vision|Weightless", name)
    ]
    if not norms:
        pytest.skip("the model has PyTorch's own LayerNorm")
    norm = norms[0](4)
    torch.nn.init.zeros_(norm.weight)
    assert bool(norm(torch.arange(4.0)[None]).any()) == bool(family_of(model_type).norm_offset)


def test_experts_lie_as_the_modules_of_transformers_say() -> None:
    stated: dict[str, set[str]] = {"is_transposed=True": set(), "is_concatenated=False": set()}
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        for decorator in re.findall(r"@use_experts_implementation\((.*?)\)", file.read_text()):
            for words in stated:
                if words in decorator:
                    stated[words].add(file.parent.name)
    assert stated["is_transposed=True"]
    assert all(family_of(kind).experts.input_first for kind in stated["is_transposed=True"])
    interleaved = {t for f in FAMILIES if f.experts.interleaved for t in f.types}
    assert stated["is_concatenated=False"] == interleaved


def test_linear_layers_of_a_class_of_their_own_are_those_of_transformers() -> None:
    """Routers and heads of such classes are no layers that a plan quantizes."""
    found = set()
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        kinds = re.findall(r"^class (\w+)\(nn\.Linear\)", file.read_text(), re.MULTILINE)
        found |= {file.parent.name for kind in kinds if kind == f"{_camel(file)}Linear"}
    assert "falcon" in found
    assert {t for f in FAMILIES if f.own_linear for t in f.types} == found & TEXT_MODELS


def _camel(file: Path) -> str:
    return "".join(part.capitalize() for part in file.parent.name.split("_"))


TEXT_MODELS = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
UNBUILT = {
    "blip-2", "instructblip", "instructblipvideo", "kosmos-2", "kosmos-2.5", "muse_glimmer",
}  # fmt: skip
"""Of those with towers of their own: their default networks are large, and like others here."""
TOWERED = [kind for found in FAMILIES if found.towers for kind in found.types]


@pytest.mark.parametrize("model_type", [kind for kind in TOWERED if kind not in UNBUILT])
def test_nothing_outside_of_the_language_model_is_a_linear_layer(model_type: str) -> None:
    """Their defaults' networks, without weights."""
    config: Any = CONFIG_MAPPING[model_type]()
    build: Any = transformers.AutoModelForImageTextToText.from_config
    with torch.device("meta"):
        network = build(config)
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    inner = "model.language_model."
    assert any(name.startswith(inner) for name in shapes)
    found = classify(shapes, config.to_dict())
    outside = [m.name for m in found if m.kind == "linear" and not m.name.startswith(inner)]
    assert not outside
