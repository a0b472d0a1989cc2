"""Memory of a load: the stored size, the largest tensor and a tenth, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.directory import open_checkpoint
from quantkit.checkpoint.schemes import SCHEMES
from quantkit.formats import compressed_tensors
from quantkit.formats.base import LayerSpec
from quantkit.formats.compressed_tensors_config import packing_of
from tests.support import written
from tests.support.kernels import random_weight
from tests.support.streaming import plain_layers, tensors_of, write_model

pytestmark = pytest.mark.broad

MEASURE = """
import gc, sys
from pathlib import Path
from quantkit.runtime.load import load
from quantkit.runtime.loading.memory import release

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

load(sys.argv[1])  # imports, threads, the kernels' first calls
gc.collect()
release()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = status("VmRSS")
model = load(sys.argv[1])
print(status("VmHWM") - before)
"""
"""Peak of resident memory, private and mapped pages alike, over what the process has before."""


@pytest.fixture(scope="module")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers large enough that one process's own noise does not count: 64 million weights."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=16384, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4,
        num_attention_heads=16, num_key_value_heads=8, dtype="bfloat16",
        architectures=["LlamaForCausalLM"], tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    tensors = {
        name: torch.rand(weight.shape, dtype=torch.bfloat16) - 0.5
        for name, weight in model.named_parameters()
    }
    return write_model(tmp_path_factory.mktemp("llama") / "bf16", [tensors], config.to_dict())


def quantized(source: Path, out: Path, name: str) -> Path:
    """A copy of a model whose linear layers hold random codes of a scheme."""
    tensors, layers = tensors_of(source), {}
    for module, scheme in plain_layers(open_checkpoint(source), SCHEMES[name]).items():
        rows, columns = tensors.pop(f"{module}.weight").shape
        spec = LayerSpec(scheme, packing_of(scheme), (rows, columns))
        weight = replace(random_weight(scheme, (rows, columns)), zero_point=None)
        if scheme.weight.is_int:
            weight = replace(weight, q=weight.q.view(torch.int8) >> (8 - scheme.weight.bits))
        stored = written.compressed_tensors(weight, spec, torch.bfloat16)
        tensors.update({f"{module}.{suffix}": t for suffix, t in stored.items()})
        layers[module] = spec
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = compressed_tensors.quantization_config(layers, ["lm_head"])
    return write_model(out, [tensors], config)


ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")


@ON_LINUX
@pytest.mark.parametrize("scheme", ["", "fp8_dynamic", "w8a8_dynamic", "w4a16"])
def test_memory_is_the_stored_size_and_one_tensor(
    random_llama: Path, tmp_path: Path, scheme: str
) -> None:
    hold_the_bound(random_llama, tmp_path, scheme)


@ON_LINUX
@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("scheme", ["", "w8a8_dynamic"])
def test_memory_with_weights_in_vllms_library(
    random_llama: Path, tmp_path: Path, scheme: str
) -> None:
    hold_the_bound(random_llama, tmp_path, scheme)


def hold_the_bound(source: Path, root: Path, scheme: str) -> None:
    path = quantized(source, root / "quantized", scheme) if scheme else source
    checkpoint = open_checkpoint(path)
    largest = max(info.bytes for info in checkpoint.tensors.values())
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < (checkpoint.weight_bytes + largest) * 1.1
