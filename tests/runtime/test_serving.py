"""Real engines as processes: they agree with the builtin runtime, and their failures are clear."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from quantkit.backends.environments.device import has_nvidia_gpu
from quantkit.backends.environments.managed import create, spec_named
from quantkit.backends.process.float32_products import slow_bfloat16
from quantkit.calibration.tokenizer import load_tokenizer, read_tokenizer_info
from quantkit.checkpoint.directory import open_checkpoint
from quantkit.checkpoint.schemes import SCHEMES, Scheme
from quantkit.errors import BackendError, InputError
from quantkit.runtime.load import load
from quantkit.runtime.serving.environments import (
    ENGINES,
    find_interpreter,
)
from quantkit.runtime.serving.launch import flags_of
from quantkit.runtime.serving.process import EngineProcess
from quantkit.validation.ask.canary import canary_prompts
from quantkit.validation.ask.data import eval_text
from quantkit.validation.ask.text import WithLogits
from quantkit.validation.subjects.base import Opening, Subject, WithTopLogprobs
from quantkit.validation.subjects.builtin import Builtin
from quantkit.validation.subjects.engines import opener
from quantkit.validation.subjects.served import engine_order
from tests.runtime.test_launch import modelopt
from tests.support.helpers import edit_json
from tests.support.rtn import rtn


@pytest.fixture(scope="module")
def blocks_model(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    """A random Llama all of whose merged layers divide into blocks of 128, with a tokenizer."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("blocks") / "model"
    config = LlamaConfig(
        vocab_size=49152, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
        tie_word_embeddings=False, eos_token_id=2,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    model.to(torch.bfloat16).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small_model / name, out / name)
    return out


def perplexity(subject: Subject, windows: NDArray[np.int64]) -> float:
    return float(np.exp(-subject.logprobs(windows).mean(dtype=np.float64)))


def same_distributions(engine: Subject, builtin: Subject, windows: NDArray[np.int64]) -> None:
    """What an engine tells of its likeliest tokens is what the runtime's logits are, about: INT8
    codes and logits in bfloat16 move each by about 0.2."""
    assert isinstance(engine, WithTopLogprobs)
    assert isinstance(builtin, WithLogits)
    said = engine.top_logprobs(windows)
    assert said.logprobs == pytest.approx(engine.logprobs(windows), abs=1e-4)
    assert (np.diff(said.kept) <= 0).all()
    whole = np.concatenate(
        [found[:, :-1].float().log_softmax(-1).numpy() for _, found in builtin.logits(windows)]
    )
    ours = np.take_along_axis(whole, said.ids.astype(np.int64), -1)
    chance = np.exp(said.kept)
    assert chance.sum(-1).max() <= 1 + 1e-4
    assert float((chance * np.abs(said.kept - ours)).sum(-1).mean()) < 0.4


def runs_engine(child: psutil.Process) -> bool:
    try:
        return "serving/worker.py" in " ".join(child.cmdline())
    except psutil.ZombieProcess:  # another test's, ended and not yet asked for
        return False


CASES: dict[str, Scheme] = {
    "w8a8_dynamic": SCHEMES["w8a8_dynamic"],
    "w4a16": SCHEMES["w4a16"].with_weight(group_size=64),
    "fp8_dynamic": SCHEMES["fp8_dynamic"],
}


def emulates_fp8() -> bool:
    """Whether torch multiplies FP8 tensors by a plain loop here: at 0.1 GFLOP/s, not at over 1."""
    rows, columns = (torch.ones(n, 512).to(torch.float8_e4m3fn) for n in (32, 256))
    one = torch.ones(1)
    start = 0.0
    for _ in range(2):  # the first call may compile
        start = time.perf_counter()
        torch._scaled_mm(rows, columns.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
    return 2 * 32 * 256 * 512 / (time.perf_counter() - start) < 0.5e9


@pytest.mark.parametrize(
    "case", [c if c == "w8a8_dynamic" else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
@pytest.mark.usefixtures("vllm_python")
def test_vllm_loads_and_agrees_with_the_builtin_runtime(
    case: str, demo_model: Path, tmp_path: Path
) -> None:
    """On all layers: the perplexity of a cut network is in the millions, and 1 % of it is noise.

    Quantized activations turn any rounding into steps of whole codes. What that noise is, the
    builtin runtime's distance from itself with float32 activations says: vLLM is as near. Where the
    builtin one multiplies in float32, it is nearer: vLLM's AVX2 operators are off by 1.3 to 1.5 ×
    as much (`vllm_ops/cpu.py`). With AMX tiles vLLM's own product of 4-bit weights is off by 0.05 a
    token on average and 0.4 each; with the tiles hidden from it, it is as near as the others.
    """
    if "ONEDNN_MAX_CPU_ISA" in os.environ:
        pytest.skip("vLLM takes the instructions that the CPU has, oneDNN only those it is allowed")
    if case == "fp8_dynamic" and emulates_fp8():
        pytest.skip("torch emulates FP8 products on this CPU: vLLM would take hours")
    made = rtn(demo_model, tmp_path / "made", CASES[case])
    tokenizer = load_tokenizer(read_tokenizer_info(made))
    windows = eval_text(None, tokenizer, 8, 256).windows
    prompts = canary_prompts(made, tokenizer)[1][:3]
    if case == "w4a16" and slow_bfloat16():  # vLLM's AVX2 build has no product for 4 bits
        vllm = opener("vllm")(made, Opening())
        with pytest.raises(BackendError, match="cpu_gemm_wna16"):
            vllm.logprobs(windows)
        vllm.close()
        return
    builtin, vllm = opener("builtin")(made, Opening()), opener("vllm")(made, Opening())
    try:
        assert vllm.version == "0.32.0"
        assert sum(vllm.kernels().values()) > 0
        ours, theirs = builtin.logprobs(windows), vllm.logprobs(windows)
        answers = vllm.generate(prompts, 2)
        if case == "w8a8_dynamic":
            same_distributions(vllm, builtin, windows[:2])
        if case == "w4a16":
            speed = vllm.throughput()
            assert speed.memory_bytes > 0
            assert all(row.decode_tokens_s.median > 0 for row in speed.rows)
    finally:
        vllm.close()
    apart = theirs - ours
    assert [len(ids) for ids in answers] == [2, 2, 2]
    if case == "w4a16" and torch.cpu._is_amx_tile_supported():
        assert abs(apart.mean()) < 0.1
        return
    assert abs(apart.mean()) < max(0.01, 3 * apart.std() / apart.size**0.5)
    judge = Builtin(load(made, device="cpu", dtype="float32"), 0.0)
    exact = judge.logprobs(windows[:2])
    noise = np.abs(ours[:2] - exact)
    as_near = 1.6 if slow_bfloat16() else 1.25
    assert np.abs(theirs[:2] - exact).mean() < as_near * noise.mean()
    tie = 2 * float(np.quantile(noise, 0.99))
    assert same_or_tied(judge, prompts, builtin.generate(prompts, 2), answers, tie)


@pytest.mark.skipif(
    torch.cpu._is_amx_tile_supported(), reason="this CPU has AMX, which vLLM's kernel needs"
)
@pytest.mark.slow
@pytest.mark.usefixtures("vllm_python")
def test_two_ranks_of_vllm_answer_as_one(
    blocks_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where ranks are processes as on GPUs: what the driver asks of the model reaches
    each of them."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    made = rtn(blocks_model, tmp_path / "made", SCHEMES["w8a8_dynamic"])
    engine, windows = ENGINES["vllm"], [list(range(5, 37)), list(range(105, 137))]
    found: list[tuple[NDArray[np.float64], dict[str, int], int]] = []
    for ranks in (1, 2):
        flags = flags_of(open_checkpoint(made), "vllm", ranks)
        order = replace(engine_order(made, engine, Opening("cpu")), flags=flags)
        process = EngineProcess(engine, find_interpreter(engine), order)
        try:
            scores = np.array(process.logprobs(windows, None))
            found.append((scores, process.kernels, process.memory_bytes))
        finally:
            process.close()
    (one, kernels, held), (two, kernels_of_two, held_by_two) = found
    assert abs(one - two).max() < 0.05
    assert kernels == kernels_of_two != {}
    assert held <= held_by_two < 1.2 * held


@pytest.mark.skipif(
    "amx_tile" in Path("/proc/cpuinfo").read_text(), reason="with AMX vLLM loads FP8 in blocks"
)
def test_vllm_says_why_it_cannot_load_fp8_blocks(blocks_model: Path, tmp_path: Path) -> None:
    made = rtn(blocks_model, tmp_path / "made", SCHEMES["fp8_block"])
    with pytest.raises(BackendError, match="requires AMX tile support") as caught:
        opener("vllm")(made, Opening())
    Path(caught.value.hint.removeprefix("read ")).unlink()


def same_or_tied(
    judge: Subject,
    prompts: list[list[int]],
    ours: list[list[int]],
    theirs: list[list[int]],
    tie: float,
) -> bool:
    """Whether answers agree up to the first pair of tokens less than `tie` nats apart."""
    for prompt, one, other in zip(prompts, ours, theirs, strict=True):
        at = next((i for i, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), None)  # noqa: B905
        if at is not None:
            rows = np.array([[*prompt, *one[:at], answer[at]] for answer in (one, other)])
            last = judge.logprobs(rows)[:, -1]
            if abs(last[0] - last[1]) > tie:
                return False
    return True


@pytest.fixture
def transformers(small_model: Path) -> Iterator[Subject]:
    subject = opener("transformers")(small_model, Opening())
    yield subject
    subject.close()


@pytest.mark.engine
def test_transformers_agrees_and_a_killed_engine_says_so(
    transformers: Subject, small_model: Path
) -> None:
    tokenizer = load_tokenizer(read_tokenizer_info(small_model))
    windows = eval_text(None, tokenizer, 2, 64).windows
    builtin = opener("builtin")(small_model, Opening())
    assert perplexity(transformers, windows) == pytest.approx(
        perplexity(builtin, windows), rel=0.01
    )
    assert transformers.kernels() == {}
    heard: list[tuple[int, int]] = []
    transformers.logprobs(windows, lambda done, total: heard.append((done, total)))
    assert heard == [(2, 2)]
    same_distributions(transformers, builtin, windows)
    children = psutil.Process().children()
    engine = next(child for child in children if runs_engine(child))
    engine.kill()
    with pytest.raises(BackendError, match=r"was killed by SIGKILL") as caught:
        transformers.generate([[1, 2, 3]], 2)
    assert caught.value.code == "engine.killed"
    log = Path(caught.value.hint.removeprefix("read "))
    transformers.close()
    assert log.is_file()
    log.unlink()


@pytest.mark.engine
def test_an_engine_that_fails_says_its_own_last_error(small_model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(small_model, tmp_path / "broken")
    edit_json(broken / "config.json", lambda config: config.update(model_type="no_such_model"))
    with pytest.raises(BackendError, match="no_such_model") as caught:
        opener("transformers")(broken, Opening())
    assert (caught.value.code, caught.value.exit_code) == ("engine.failed", 3)
    log = Path(caught.value.hint.removeprefix("read "))
    assert "Traceback" in log.read_text()
    log.unlink()


def test_what_transformers_would_load_wrongly_is_refused(tmp_path: Path) -> None:
    made = modelopt(tmp_path / "made", "FP8")
    with pytest.raises(InputError, match="ignores quant_method modelopt"):
        opener("transformers")(made, Opening())


def test_a_missing_environment_is_answered_with_the_command(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    name = "vllm-cuda" if has_nvidia_gpu() else "vllm"
    with pytest.raises(BackendError) as caught:
        opener("vllm")(small_model, Opening())
    assert caught.value.hint == f"quantkit env create {name}"
    with pytest.raises(InputError, match="chooses its own"):
        opener("vllm")(small_model, Opening(kernel="reference"))


@pytest.mark.skipif(has_nvidia_gpu(), reason="this machine has a GPU, which SGLang can use")
def test_sglang_is_refused_without_a_gpu(small_model: Path) -> None:
    with pytest.raises(BackendError, match="SGLang cannot run on this machine") as caught:
        opener("sglang")(small_model, Opening())
    assert caught.value.code == "engine.unavailable"
    with pytest.raises(BackendError, match="needs an NVIDIA GPU"):
        create(spec_named("sglang"), None, print)
