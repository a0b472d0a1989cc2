"""SGLang's driver and processes, spoken to as SGLang documents itself."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from quantkit.errors import BackendError
from quantkit.runtime.serving.drivers.base import EngineOrder
from quantkit.runtime.serving.drivers.sglang import prompt_logprobs
from quantkit.runtime.serving.environments import ENGINES, EngineProcessSpec
from quantkit.runtime.serving.process import EngineProcess
from tests.support.processes import DAEMON, is_alive, wait_until_gone

DOCUMENTED = """
class Engine:
    def __init__(self, **settings):
        assert settings["skip_tokenizer_init"] and settings["disable_radix_cache"], settings
        self.given = settings

    def generate(self, *, input_ids, sampling_params, return_logprob=False, logprob_start_len=-1,
                 top_logprobs_num=0):
        if self.given.get("kv_cache_dtype") != KV_CACHE:
            raise ValueError(self.given)
        new = sampling_params["max_new_tokens"]
        answers = []
        for ids in input_ids:
            meta = {"prompt_tokens": len(ids), "completion_tokens": new}
            if return_logprob and logprob_start_len == 0:
                scores = [None, *(-float(token) for token in ids[1:])]
                meta["input_token_logprobs"] = [(s, t, None) for s, t in zip(scores, ids)]
                top = [(-float(rank), rank, None) for rank in range(top_logprobs_num)]
                meta["input_top_logprobs"] = [None, *([top] * (len(ids) - 1))]
            stops = not sampling_params.get("ignore_eos")
            stops = stops and ids[-1] in sampling_params.get("stop_token_ids", ())
            answers.append({"output_ids": [ids[-1]] * (1 if stops else new), "meta_info": meta})
        return answers

    def shutdown(self):
        pass

__version__ = "0.5.23"
"""
"""A module that answers as SGLang documents `Engine.generate`, where no GPU runs SGLang itself."""


@pytest.mark.parametrize("flags", [{}, {"--kv-cache-dtype": "fp8_e4m3"}])
def test_the_sglang_driver_speaks_its_documented_interface(
    flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `launch` would print reaches the engine too: the cache's type above all."""
    wanted = flags.get("--kv-cache-dtype")
    (tmp_path / "sglang.py").write_text(f"KV_CACHE = {wanted!r}\n{DOCUMENTED}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    engine: EngineProcessSpec = ENGINES["sglang"]
    order = EngineOrder(engine.driver, str(tmp_path), "auto", (2,), 64, 1, flags)
    process = EngineProcess(engine, Path(shutil.which("python3") or ""), order)
    assert process.version == "0.5.23"
    assert process.logprobs([[5, 6, 7]] * 9, None) == [[-6.0, -7.0]] * 9
    top = process.top_logprobs([[5, 6, 7]] * 9, 4, None)
    assert top["logprobs"].tolist() == [[-6.0, -7.0]] * 9
    assert top["ids"].tolist() == [[[0, 1, 2, 3]] * 2] * 9
    assert top["kept"].tolist() == [[[0.0, -1.0, -2.0, -3.0]] * 2] * 9
    assert process.generate([[5, 6]], 3) == [[6, 6, 6]]
    assert process.generate([[5, 2]], 3) == [[2]]
    assert process.seconds([[5, 6]], 3) > 0
    process.close()
    assert not process.log.exists()


SPAWNING = """
import multiprocessing
import os
from quantkit.runtime.serving.drivers import base

class Engine:
    def __init__(self, *, tp_size, **settings):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"
        for rank in range(tp_size):
            one = multiprocessing.get_context("spawn").Process(target=base.pin, args=("cpu",))
            one.start()
            one.join()
            assert one.exitcode == 0, "a rank does not find quantkit"

    def shutdown(self):
        pass

__version__ = "0.5.23"
"""


def test_an_engine_over_two_gpus_sees_them_and_its_ranks_find_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an environment without quantkit, as engines' are."""
    (tmp_path / "sglang.py").write_text(SPAWNING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,5")
    engine, flags = ENGINES["sglang"], {"--tp-size": 2}
    order = EngineOrder(engine.driver, str(tmp_path), "cuda:0,2", (2,), 64, 1, flags)
    bare = Path(sys.base_prefix, "bin", "python3")
    EngineProcess(engine, bare, order).close()


def test_a_daemon_that_outlives_its_engine_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "daemon"
    (tmp_path / "sglang.py").write_text(f"{DOCUMENTED}\n{DAEMON}\nleave_daemon({str(note)!r})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    engine: EngineProcessSpec = ENGINES["sglang"]
    order = EngineOrder(engine.driver, str(tmp_path), "auto", (2,), 64, 1)
    process = EngineProcess(engine, Path(sys.executable), order)
    daemon = int(note.read_text())
    assert is_alive(daemon)
    process.close()
    wait_until_gone([daemon])


def test_an_engine_whose_interpreter_is_gone(tmp_path: Path) -> None:
    engine: EngineProcessSpec = ENGINES["sglang"]
    order = EngineOrder(engine.driver, str(tmp_path), "auto", (2,), 64, 1)
    with pytest.raises(BackendError, match=r"cannot be started with .*absent") as caught:
        EngineProcess(engine, tmp_path / "absent", order)
    assert caught.value.hint == "quantkit env check sglang"


def test_logprobs_of_other_tokens_are_not_believed() -> None:
    answer = {"meta_info": {"input_token_logprobs": [[None, 5, None], [-0.5, 8, None]]}}
    assert prompt_logprobs(answer, [5, 8]) == [-0.5]
    with pytest.raises(ValueError, match="other tokens"):
        prompt_logprobs(answer, [5, 9])
