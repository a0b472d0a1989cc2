"""Every layout that quantkit writes, in a real engine on a GPU and in the runtime beside it.

    python benchmarks/engines_gpu.py --site FOLDER … --work DIR --json FILE [--engine vllm|sglang]
                                     [--gpu h200] [--only NAME …] [--at-once 6] [--limit 900]
    python benchmarks/engines_gpu.py --python PYTHON --device cpu …   # another machine's vLLM

The folders hold the engine and what it needs beside this Python's own packages
(`engines_gpu_pack.py` brings them to a machine without a network); CUDA_VISIBLE_DEVICES chooses the
card. For each case of `engines_gpu_cases.py`: what `quantkit plan --engine …` predicts for this
version, whether the engine loads it, the kernels it takes (SGLang does not tell), the perplexity of
4,096 tokens of the held-out text in the engine and in our runtime on the same card, and one answer
of a chat. An engine that takes longer than the limit (seconds) for a case is killed (SIGALRM);
cases that FILE has already are not asked again.
The predictions that did not hold and the ratios over 1 % come last; prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engines_gpu_cases import EAGER, VERSIONS, Case, cases_of
from engines_gpu_models import widen

import quantkit
from quantkit.calibration.tokenizer import load_tokenizer, read_tokenizer_info
from quantkit.checkpoint.demo import demo_model
from quantkit.checkpoint.upcycle import upcycle
from quantkit.checkpoint.wrap_vision import demo_with_vision
from quantkit.engines import engine_named
from quantkit.engines.gpus import gpu_named
from quantkit.engines.online import online_named, refuse_gpu
from quantkit.errors import QuantkitError
from quantkit.runtime.serving.drivers.base import EngineOrder
from quantkit.runtime.serving.environments import ENGINES
from quantkit.runtime.serving.process import EngineProcess
from quantkit.validation.ask.canary import canary_prompts
from quantkit.validation.ask.data import eval_text
from quantkit.validation.reports.markdown import number, table
from quantkit.validation.subjects.builtin import open_builtin
from quantkit.validation.subjects.served import engine_order

WINDOWS, LENGTH, ANSWER = 8, 512, 32
AGREES = 0.01


class Bench:
    """One run: the models, the interpreter of the engine, and what every checkpoint is asked."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.site, self.python, self.device = chosen.site, chosen.python, chosen.device
        self.gpu: str = chosen.gpu
        self.engine: str = chosen.engine
        self.limit: int = chosen.limit
        self.work: Path = chosen.work
        work: Path = self.work
        demo = demo_model()
        self.models = {
            "demo": demo, "wide": work / "wide", "mixture": work / "mixture",
            "wrapped": demo_with_vision(),
        }  # fmt: skip
        if not self.models["mixture"].is_dir():
            wide = widen(demo, self.models["wide"])
            upcycle(wide, self.models["mixture"], 4)
        self.tokenizer = load_tokenizer(read_tokenizer_info(demo))
        self.windows = eval_text(None, self.tokenizer, WINDOWS, LENGTH).windows
        self.interpreters = {
            environment: self.interpreter(number, environment)
            for number, environment in enumerate({c.environment for c in cases_of(self.engine)})
        }
        texts, prompts = canary_prompts(demo, self.tokenizer)
        self.question, self.prompts = texts[:1], prompts[:1]

    def path(self, case: Case) -> Path:
        """Where the checkpoint of a case lies."""
        folder = "-".join((case.model, case.method, *case.settings)).replace("=", "-")
        return self.work / folder.replace(".", "-") if case.method else self.models[case.model]

    def predicted(self, case: Case, version: str) -> dict[str, Any]:
        """What the rules say of a version: whether it loads, or the reason."""
        if case.online:
            try:
                refuse_gpu(online_named(case.online, self.engine), gpu_named(self.gpu))
            except QuantkitError as error:
                return {"loads": False, "why": [error.message]}
        if not case.method:
            return {"loads": True}
        try:
            report = quantkit.plan(
                self.models[case.model], method=case.method, set=case.settings,
                engine=self.engine, gpu=self.gpu,
            )  # fmt: skip
        except QuantkitError as error:  # it is not made either
            return {"loads": False, "why": [error.message]}
        (verdict,) = report.verdicts
        if verdict.outcome == "unknown":
            return {"loads": None, "why": []}
        if not verdict.loads:
            return {"loads": False, "why": [reason.text for reason in verdict.reasons]}
        least = verdict.minimum_version
        early = least != engine_named(self.engine).minimum_version and later_than(least, version)
        wants = [f"from version {least} on"] if early else []
        return {"loads": not wants, "why": wants, "notes": list(verdict.notes)}

    def make(self, case: Case) -> str:
        """Quantize by the command; "" or the last line of what it said."""
        out = self.path(case)
        if not case.method or out.is_dir():
            return ""
        command = [
            sys.executable, "-m", "quantkit", "quantize", str(self.models[case.model]),
            "--method", case.method, "--out", str(out),
            *(part for setting in case.settings for part in ("--set", setting)),
        ]  # fmt: skip
        limited = os.environ | {"OMP_NUM_THREADS": "4"}
        done = subprocess.run(command, capture_output=True, text=True, env=limited, check=False)
        return "" if done.returncode == 0 else done.stderr.strip()[-600:]

    def ask(self, case: Case) -> dict[str, Any]:
        """The engine's answers, or its refusal."""
        engine = ENGINES[self.engine]
        start = time.monotonic()
        try:
            order = engine_order(self.path(case), engine, case.opening(self.device, self.engine))
            process = EngineProcess(
                engine, self.interpreters[case.environment], self.ordered(order)
            )
        except QuantkitError as error:
            return {"loads": False, "error": error.message.rpartition(" failed: ")[2]}
        found: dict[str, Any] = {
            "loads": True, "version": process.version, "kernels": process.kernels,
            "seconds": time.monotonic() - start,
        }  # fmt: skip
        try:
            found["perplexity"] = perplexity(process.logprobs(self.windows.tolist(), None))
            found["chat"] = self.tokenizer.decode(process.generate(self.prompts, ANSWER)[0])
        except QuantkitError as error:
            found["error"] = error.message
        finally:
            process.close()
        return found

    def ordered(self, order: EngineOrder) -> EngineOrder:
        """An order as it is where several engines share a card."""
        flags = EAGER[self.engine] if self.device == "cuda" else {}
        return replace(order, flags=order.flags | flags, length=2048)

    def ask_ours(self, case: Case) -> dict[str, Any]:
        """The same of the runtime, or its refusal."""
        kept = {name: os.environ.get(name) for name, _ in case.environment}
        os.environ.update(case.environment)
        try:
            subject = open_builtin(self.path(case), case.opening(self.device, self.engine))
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:300]}
        finally:
            for name, value in kept.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        try:
            return {
                "perplexity": perplexity(subject.logprobs(self.windows)),
                "kernels": subject.kernels(),
                "notes": subject.notes,
                "chat": self.tokenizer.decode(subject.generate(self.prompts, ANSWER)[0]),
            }
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:300]}
        finally:
            subject.close()

    def interpreter(self, number: int, environment: tuple[tuple[str, str], ...]) -> Path:
        """This Python with the engine's folders on its path, as one file. What is started by it has
        `limit` seconds."""
        variables = {
            "PYTHONPATH": os.pathsep.join(map(str, self.site)), "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", **dict(environment),
        }  # fmt: skip
        python = str(self.python or sys.executable)
        file = self.work / f"python-{self.engine}-{number}"
        exports = "\n".join(f"export {name}={shlex.quote(v)}" for name, v in variables.items())
        watch = f"(sleep {self.limit}; kill -ALRM $$) &"
        file.write_text(f'#!/bin/bash\n{exports}\n{watch}\nexec {shlex.quote(python)} "$@"\n')
        file.chmod(0o755)
        return file


def later_than(one: str, other: str) -> bool:
    """Whether a version comes after another."""
    first, second = (tuple(int(part) for part in v.split(".")[:3]) for v in (one, other))
    return first > second


def perplexity(logprobs: Any) -> float:
    return math.exp(-float(np.asarray(logprobs, dtype=np.float64).mean()))


def run(
    bench: Bench, cases: list[Case], version: str, at_once: int
) -> Iterator[list[dict[str, Any]]]:
    """What is known after each case. Checkpoints are made and asked side by side, and ahead; the
    runtime asks them one after the other meanwhile."""
    entries: list[dict[str, Any]] = []
    first = {bench.path(case): case for case in cases}
    with ThreadPoolExecutor(2 * at_once) as makers, ThreadPoolExecutor(at_once) as askers:
        made = {path: makers.submit(bench.make, case) for path, case in first.items()}

        def ask(case: Case) -> dict[str, Any]:
            return {} if made[bench.path(case)].result() else bench.ask(case)

        asked = [askers.submit(ask, case) for case in cases]
        for case, future in zip(cases, asked, strict=True):
            entry: dict[str, Any] = {"case": case.name, "predicted": bench.predicted(case, version)}
            failure = made[bench.path(case)].result()
            if failure:
                entry["made"] = failure
            else:
                entry["runtime"] = bench.ask_ours(case)
                entry["served"] = future.result()
            entries.append(judged(entry))
            print(json.dumps(entry), flush=True)
            yield entries


def judged(entry: dict[str, Any]) -> dict[str, Any]:
    """With `right`: whether the prediction held, and `ratio` of the perplexities."""
    engine = entry.get("served", {})
    answered = "perplexity" in engine and math.isfinite(engine["perplexity"])
    if "served" in entry and entry["predicted"]["loads"] is not None:
        entry["right"] = entry["predicted"]["loads"] == answered
    ours = entry.get("runtime", {}).get("perplexity")
    if answered and ours:
        entry["ratio"] = ours / engine["perplexity"]
    return entry


def rows(entries: list[dict[str, Any]]) -> list[list[str]]:
    """The table of `docs/gpu.md`."""
    found = []
    for entry in entries:
        engine, ours = entry.get("served", {}), entry.get("runtime", {})
        held = {True: "yes", False: "**no**", None: "–"}[entry.get("right")]
        told = {True: "loads", False: "refuses", None: "unknown"}[entry["predicted"]["loads"]]
        kernels = ", ".join(engine.get("kernels", ())) or engine.get("error", "")[:80] or "–"
        found.append([
            entry["case"], told, held, kernels, number(engine.get("perplexity")),
            number(ours.get("perplexity")), f"{entry['ratio']:.3f}" if "ratio" in entry else "–",
            ", ".join(ours.get("kernels", ())) or ours.get("error", "")[:80],
        ])  # fmt: skip
    return found


COLUMNS = ["checkpoint", "predicted", "held", "kernel in the engine", "perplexity there", "runtime",
           "ratio", "kernel of the runtime"]  # fmt: skip


def known_of(file: Path, engine: str) -> list[dict[str, Any]]:
    """The cases of an earlier run of this engine in the file."""
    held: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    known: list[dict[str, Any]] = held["cases"] if held.get("engine") == engine else []
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=sorted(EAGER), default="vllm")
    parser.add_argument("--site", type=lambda name: Path(name).resolve(), nargs="+", default=[])
    parser.add_argument("--python", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--gpu", default="h200")
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--at-once", type=int, default=6)
    parser.add_argument("--limit", type=int, default=900)
    parser.add_argument("--engine-version", default="")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    chosen.work = chosen.work.resolve()
    bench = Bench(chosen)
    known = known_of(chosen.json, chosen.engine)
    names = {entry["case"] for entry in known}
    asked = [case for case in cases_of(chosen.engine) if case.name not in names]
    cases = [case for case in asked if not chosen.only or case.name in chosen.only]
    version = chosen.engine_version or VERSIONS[chosen.engine]
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if chosen.device == "cuda" else chosen.device,
        "torch": torch.__version__, "engine": chosen.engine,
        "date": time.strftime("%Y-%m-%d"), "question": bench.question[0],
    }  # fmt: skip
    entries = known
    for found in run(bench, cases, version, chosen.at_once):
        entries = known + found
        chosen.json.write_text(json.dumps(document | {"cases": entries}, indent=1))
    print("\n".join(table(COLUMNS, rows(entries))))
    wrong = [entry["case"] for entry in entries if entry.get("right") is False]
    apart = [entry["case"] for entry in entries if abs(entry.get("ratio", 1.0) - 1) > AGREES]
    print(f"\npredictions that did not hold: {', '.join(wrong) or 'none'}")
    print(f"ratios over 1 %: {', '.join(apart) or 'none'}")


if __name__ == "__main__":
    main()
