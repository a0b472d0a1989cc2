"""What `verify` calls an error is never published: odd sources are refused before the work, or the
output says what its source lacked and verifies alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers as hf

from quantkit.backends.registry import load_recipe
from quantkit.errors import InputError
from quantkit.pipeline.quantize import plan_only, quantize
from quantkit.pipeline.request import Request
from quantkit.verification import verify
from tests.support.helpers import edit_json, edit_tensors

pytestmark = pytest.mark.broad

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 128,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
Change = Callable[[Path], object]


def build(path: Path, config: Any) -> Path:
    torch.manual_seed(0)
    make: Any = hf.AutoModelForCausalLM.from_config
    make(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def llama(path: Path) -> Path:
    return build(path, hf.LlamaConfig(**SIZES, tie_word_embeddings=False))


def granite(path: Path) -> Path:
    return build(path, hf.GraniteConfig(**SIZES, tie_word_embeddings=False))


def without(part: str) -> Change:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        lost = [name for name in tensors if part in name]
        assert lost
        for name in lost:
            del tensors[name]

    return lambda path: edit_tensors(path, drop)


def stating(**changes: Any) -> Change:
    return lambda path: edit_json(path / "config.json", lambda config: config.update(changes))


def request(model: Path, tmp_path: Path) -> Request:
    return Request(model=str(model), recipe=load_recipe("rtn_fp8_dynamic"), out=tmp_path / "out")


@pytest.mark.parametrize("make", [llama, granite])
@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("embed_tokens", "no input embedding"),
        ("model.norm", "no final norm"),
        ("lm_head", ""),
        ("layers.1.", ""),
    ],
)
def test_a_source_without_a_part_is_refused_by_plan_and_quantize(
    tmp_path: Path, make: Callable[[Path], Path], part: str, said: str
) -> None:
    model = make(tmp_path / "model")
    stating(tie_word_embeddings=False)(model)
    without(part)(model)
    refusals = []
    for refuse in (plan_only, lambda asked: quantize(asked, Mock())):
        with pytest.raises(InputError) as caught:
            refuse(request(model, tmp_path))
        refusals.append((caught.value.code, caught.value.message, caught.value.hint))
    assert refusals[0] == refusals[1]
    assert refusals[0][0] in ("plan.incomplete", "plan.contradiction")
    assert said in refusals[0][1]
    assert not (tmp_path / "out").exists()


def other_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1


def other_tied_head(path: Path) -> None:
    edit_tensors(path, other_head)
    stating(tie_word_embeddings=True)(path)


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        (lambda path: None, set()),
        (stating(num_nextn_predict_layers=1), {"complete.no_mtp"}),
        (without("layers.1.post_attention_layernorm"), {"complete.missing_module"}),
        (other_tied_head, {"complete.tied_head_differs"}),
        (without("lm_head"), {"complete.silent_head"}),
    ],
    ids=["whole", "no mtp", "pruned", "another head than the tied one", "silent on the head"],
)
def test_what_was_published_verifies_alone(tmp_path: Path, change: Change, codes: set[str]) -> None:
    model = llama(tmp_path / "model")
    edit_json(model / "config.json", lambda config: config.pop("tie_word_embeddings"))
    change(model)
    outcome = quantize(request(model, tmp_path), Mock())
    alone = verify(tmp_path / "out")
    assert alone.ok
    for report in (outcome.report, alone, verify(tmp_path / "out", model)):
        assert codes == {f.code for f in report.findings if f.code.startswith("complete.")}
    # What the output loses later is no fault of its source.
    index = next((tmp_path / "out").glob("*.safetensors"))
    index.rename(tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "model.safetensors.index.json").unlink(missing_ok=True)
    without("model.norm.")(tmp_path / "out")
    assert "complete.no_final_norm" in verify(tmp_path / "out").codes()


def test_a_mixture_with_square_experts_is_clean(tmp_path: Path) -> None:
    sizes = {**SIZES, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    config = hf.Qwen3MoeConfig(**sizes, decoder_sparse_step=1, tie_word_embeddings=False)
    model = build(tmp_path / "model", config)
    edit_tensors(model, fused)
    outcome = quantize(request(model, tmp_path), Mock())
    assert any(".experts." in name for name in outcome.plan.layers)
    for source in (None, model):
        report = verify(tmp_path / "out", source)
        told = {f.code for f in report.findings if f.severity != "info"}
        assert told == {"sidecar.no_tokenizer"}


def fused(tensors: dict[str, torch.Tensor]) -> None:
    """All experts of a block in two tensors, [experts, out, in]: gate and up, and a square down."""
    for block in sorted(
        {name.partition(".experts.")[0] for name in tensors if ".experts." in name}
    ):
        parts = {
            leaf: torch.stack(
                [tensors.pop(f"{block}.experts.{n}.{leaf}_proj.weight") for n in range(4)]
            )
            for leaf in ("gate", "up", "down")
        }
        tensors[f"{block}.experts.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        tensors[f"{block}.experts.down_proj"] = parts["down"]
        assert parts["down"].shape == (4, 64, 64)
