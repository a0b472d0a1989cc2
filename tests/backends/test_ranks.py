"""Workers that share a job's samples: two real ranks of LLM Compressor on the CPU (gloo), and what
becomes of a rank that fails or is killed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantkit.backends.process.job import Job, Result, token_digest
from quantkit.backends.process.parent import run_worker
from quantkit.backends.registry import backend_named
from quantkit.checkpoint.schemes import SCHEMES
from quantkit.errors import BackendError, InputError
from quantkit.recipe.model import adjusted
from tests.backends.test_worker_process import ADAPTERS, Recorder
from tests.support.processes import wait_until_gone

SAMPLES, LENGTH = 6, 64


def job(model: Path, folder: Path, *, ranks: int) -> Job:
    """GPTQ of the cut demo model with random tokens, in so many processes."""
    with safe_open(model / "model.safetensors", "pt") as file:
        names = [name[: -len(".weight")] for name in file.keys() if "_proj." in name]  # noqa: SIM118
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 40_000, (SAMPLES, LENGTH), generator=drawn)
    folder.mkdir()
    tokens = folder / "tokens.safetensors"
    save_file({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tokens)
    scheme = adjusted(SCHEMES["w4a16"], 64)
    return Job(
        task="quantize", backend="llmcompressor", method="llmcompressor_w4a16",
        adapter=backend_named("llmcompressor").adapter,
        model=str(model), out=str(folder / "out"), scheme=scheme,
        layers=dict.fromkeys(names, scheme), keep=["lm_head"], tokens=str(tokens), batch_size=2,
        devices=["cpu"] * ranks, placement="spread" if ranks > 1 else "layerwise", ranks=ranks > 1,
    )  # fmt: skip


def work(asked: Job, folder: Path, python: Path) -> tuple[Result, Recorder]:
    recorder = Recorder()
    Path(asked.out).mkdir()
    return run_worker(asked, python=python, log=folder / "log", report=recorder), recorder


@pytest.mark.library
def test_two_ranks_calibrate_as_one(small_model: Path, tmp_path: Path) -> None:
    made: dict[int, dict[str, torch.Tensor]] = {}
    calibrations, peaks = [], []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        asked = job(small_model, folder, ranks=ranks)
        result, told = work(asked, folder, Path(sys.executable))
        made[ranks] = load_file(folder / "out" / "model.safetensors")
        calibrations.append(result.calibration)
        peaks.append(result.peak_rss_bytes)
        assert [event[1] for event in told.events if event[0] == "stage"][-1] == "save"
        assert not (folder / "out" / "offload").exists()
    assert calibrations[0] == calibrations[1]
    ids = load_file(tmp_path / "1" / "tokens.safetensors")["input_ids"]
    assert calibrations[1]["digest"] == token_digest(ids.tolist())
    assert peaks[1] > peaks[0]
    one, two = made[1], made[2]
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if not name.startswith("model.layers.0."):
            continue  # sums of two halves differ in the last place, which the next layers amplify
        if name.endswith("weight_packed"):
            same = (nibbles(tensor) == nibbles(two[name])).float().mean()
            assert same > 0.99, (name, same)
        else:
            torch.testing.assert_close(two[name], tensor, rtol=0.02, atol=1e-6)


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The 4-bit codes of int32 words, [rows, words, 8]."""
    return packed.unsqueeze(-1) >> torch.arange(0, 32, 4) & 15


@pytest.mark.parametrize(
    ("adapter", "wrong", "says"),
    [
        ("fails_on_rank_1", InputError, "rank 1 cannot"),
        ("killed_on_rank_1", BackendError, "device 1"),
    ],
)
def test_a_rank_that_ends_ends_the_others(
    adapter: str, wrong: type[Exception], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ADAPTERS))
    folder = tmp_path / "work"
    folder.mkdir()
    asked = Job(
        task="quantize", backend="llmcompressor", method="llmcompressor_w4a16",
        adapter=f"worker_adapters:{adapter}", model="", out=str(folder / "out"), scheme=None,
        devices=["cpu", "cpu"], placement="spread", ranks=True,
    )  # fmt: skip
    with pytest.raises(wrong, match=says):
        work(asked, folder, Path(sys.executable))
    wait_until_gone([int((folder / "out" / "pid").read_text())])
