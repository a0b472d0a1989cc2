"""Every `rtn_*` output verifies and loads in Transformers, with nearly the 16-bit answers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantkit.backends.process.job import Unit
from quantkit.backends.registry import load_recipe
from quantkit.pipeline.quantize import quantize
from quantkit.pipeline.request import Request
from quantkit.verification import verify
from tests.support.streaming import write_model

pytestmark = pytest.mark.engine

METHODS: dict[str, tuple[float, tuple[str, ...]]] = {
    "rtn_fp8_dynamic": (0.04, ()),
    "rtn_w8a8_dynamic": (0.04, ()),
    "rtn_w8a16": (0.015, ()),
    "rtn_w4a16": (0.12, ("group_size=64", "options.clip=mse")),
    "rtn_nvfp4a16": (0.1, ()),
    "rtn_mxfp4a16": (0.11, ()),
    "rtn_mxfp8": (0.05, ()),
}
"""Method → the largest distance of its logits from the 16-bit ones (‖Δ‖ / ‖logits‖), settings."""

COMPARE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
base, *others = sys.argv[1:]
text = "The capital of France is Paris, and the river that runs through it is the Seine. " * 4
ids = AutoTokenizer.from_pretrained(base)(text, return_tensors="pt").input_ids

def logits(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    with torch.no_grad():
        return model(ids).logits.float()

wanted = logits(base)
print(json.dumps([float((logits(path) - wanted).norm() / wanted.norm()) for path in others]))
"""


class Quiet:
    """A reporter that tells nobody."""

    def stage(self, name: str, total: int = 0, unit: Unit = "steps") -> None: ...

    def advance(self, done: int) -> None: ...

    def note(self, text: str) -> None: ...


def quantized(model: Path, out: Path, method: str, *sets: str) -> Path:
    """Made and verified as the command does it."""
    recipe = load_recipe(method, sets)
    quantize(Request(str(model), recipe, out, device="cpu", jobs=1), Quiet())
    return out


def distances(base: Path, outputs: list[Path]) -> list[float]:
    """How far each model's logits are from the base's, reloaded by Transformers."""
    command = [sys.executable, "-c", COMPARE, str(base), *map(str, outputs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_transformers_answers_nearly_as_before(small_model: Path, tmp_path: Path) -> None:
    outputs = [
        quantized(small_model, tmp_path / method, method, *settings)
        for method, (_, settings) in METHODS.items()
    ]
    for method, distance in zip(METHODS, distances(small_model, outputs), strict=True):
        assert 0 < distance < METHODS[method][0], method


def test_blocks_of_fp8_load_where_the_shapes_divide(small_model: Path, tmp_path: Path) -> None:
    """The demo model's 576 inputs are no multiple of 128; a random Llama of 256 is."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    model = tmp_path / "model"
    built = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    built.bfloat16().save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small_model / name, model)
    output = quantized(model, tmp_path / "out", "rtn_fp8_block")
    assert 0 < distances(model, [output])[0] < 0.08


def test_fused_experts_are_sealed_under_the_names_of_their_layers(tmp_path: Path) -> None:
    """A fused tensor of the source is a layer an expert in config.json, provenance and verify."""
    generator = torch.Generator().manual_seed(0)
    parent, experts = "model.layers.0.mlp.experts", 3
    shapes = {
        "model.embed_tokens.weight": (32, 64), "lm_head.weight": (32, 64),
        "model.layers.0.self_attn.o_proj.weight": (64, 64),
        "model.layers.0.mlp.gate.weight": (experts, 64),
        f"{parent}.gate_up_proj": (experts, 192, 64), f"{parent}.down_proj": (experts, 64, 96),
    }  # fmt: skip
    tensors = {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}
    config = {
        "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 32,
        "num_experts": experts, "tie_word_embeddings": False,
    }  # fmt: skip
    model = write_model(tmp_path / "model", [tensors], config)
    out = quantized(model, tmp_path / "out", "rtn_mxfp4a16")
    sealed = json.loads((out / "quantkit.json").read_text())
    assert f"{parent}.2.up_proj" in sealed["plan"]["quantized"]
    assert verify(out, model).ok
    assert (
        "lm_head" in json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    )
