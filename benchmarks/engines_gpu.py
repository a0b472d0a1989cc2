"""Every layout that quantkit writes, in the real vLLM on a GPU and in the runtime beside it.

    python benchmarks/engines_gpu.py --site FOLDER --work DIR --json FILE [--gpu h200]
                                     [--only NAME …] [--at-once 6] [--vllm-version 0.26.0]
    python benchmarks/engines_gpu.py --python PYTHON --device cpu …   # another machine's vLLM

FOLDER holds vLLM and what it needs beside this Python's own packages (`engines_gpu_pack.py` brings
it to a machine without a network). For each case: what `quantkit plan --engine vllm` predicts for
this version, whether vLLM loads it, the kernels it takes, the perplexity of 4,096 tokens of the
held-out text in vLLM and in our runtime on the same card, and one answer of a chat. The predictions
that did not hold and the ratios over 1 % come last; prints a table in Markdown.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engines_gpu_models import widen

import quantkit
from quantkit.calibration.tokenizer import load_tokenizer, read_tokenizer_info
from quantkit.checkpoint.demo import demo_model
from quantkit.checkpoint.upcycle import upcycle
from quantkit.engines import engine_named
from quantkit.engines.online import online_named
from quantkit.errors import QuantkitError
from quantkit.runtime.serving.environments import ENGINES
from quantkit.runtime.serving.process import EngineProcess
from quantkit.validation.ask.canary import canary_prompts
from quantkit.validation.ask.data import eval_text
from quantkit.validation.reports.markdown import number, table
from quantkit.validation.subjects.base import Opening
from quantkit.validation.subjects.builtin import open_builtin
from quantkit.validation.subjects.served import engine_order

WINDOWS, LENGTH, ANSWER = 8, 512, 32
AGREES = 0.01
EAGER: dict[str, Any] = {
    "--enforce-eager": True,
    "--gpu-memory-utilization": 0.08,
    "--kv-cache-memory-bytes": 1 << 30,
}
"""What several engines on one card are started with."""

SMALL = ("calibration.samples=32", "calibration.sequence_length=256")
G64 = "group_size=64"


@dataclass(frozen=True)
class Case:
    """A checkpoint: made of a model (demo, wide or mixture; no method: itself) by a method.

    environment: variables of the engine. online: the method by which it quantizes while it loads.
    """

    name: str
    model: str
    method: str = ""
    settings: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    online: str = ""

    def opening(self, device: str) -> Opening:
        """On the device, rounded while it loads where the case is of that."""
        return Opening(device, online=online_named(self.online) if self.online else None)


_MIXTURES = ("rtn_fp8_dynamic", "rtn_fp8_block", "rtn_w8a8_dynamic", "rtn_w4a16", "rtn_w8a16",
             "rtn_nvfp4a16", "rtn_mxfp4a16")  # fmt: skip
CASES = (
    *(Case(f"{model} BF16", model) for model in ("demo", "wide", "mixture")),
    *(
        Case(f"wide {method}", "wide", method)
        for method in ("rtn_fp8_dynamic", "rtn_fp8_block", "rtn_w8a8_dynamic", "rtn_w4a16",
                       "rtn_w8a16", "rtn_nvfp4a16", "rtn_mxfp4a16", "rtn_mxfp8")
    ),
    Case("wide rtn_fp8_block, scales kept", "wide", "rtn_fp8_block", (),
         (("VLLM_USE_DEEP_GEMM_E8M0", "0"),)),
    Case("wide rtn_w4a16 as GPTQ", "wide", "rtn_w4a16", ("options.layout=gptq",)),
    Case("wide rtn_w4a16 as AWQ", "wide", "rtn_w4a16",
         ("options.layout=awq", "symmetric=false")),
    Case("wide modelopt_fp8", "wide", "modelopt_fp8", SMALL),
    Case("wide modelopt_fp8, FP8 KV", "wide", "modelopt_fp8", (*SMALL, "kv_cache=fp8")),
    Case("wide modelopt_nvfp4", "wide", "modelopt_nvfp4", SMALL),
    Case("wide llmcompressor_nvfp4", "wide", "llmcompressor_nvfp4", SMALL),
    Case("wide llmcompressor_mxfp4", "wide", "llmcompressor_mxfp4"),
    Case("wide llmcompressor_w4a16", "wide", "llmcompressor_w4a16", SMALL),
    Case("wide gptqmodel_w4a16", "wide", "gptqmodel_w4a16", SMALL),
    Case("wide gptqmodel_awq_w4a16", "wide", "gptqmodel_awq_w4a16", SMALL),
    Case("wide autoround_w4a16", "wide", "autoround_w4a16", (*SMALL, "options.iters=10")),
    Case("demo modelopt_int4_awq", "demo", "modelopt_int4_awq", (*SMALL, G64)),
    Case("demo rtn_fp8_block", "demo", "rtn_fp8_block"),
    Case("demo rtn_w4a16", "demo", "rtn_w4a16", (G64,)),
    *(Case(f"mixture {method}", "mixture", method) for method in _MIXTURES),
    *(
        Case(f"wide online {name}", "wide", online=name)
        for name in ("fp8", "fp8_per_channel", "fp8_per_block", "mxfp8")
    ),
    Case("mixture online fp8", "mixture", online="fp8"),
    Case("mixture online int8", "mixture", online="int8_per_channel_weight_only"),
)  # fmt: skip


class Bench:
    """One run: the models, the interpreter of vLLM, and what every checkpoint is asked."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.site, self.python, self.device = chosen.site, chosen.python, chosen.device
        self.gpu: str = chosen.gpu
        self.work: Path = chosen.work
        work: Path = self.work
        demo = demo_model()
        self.models = {"demo": demo, "wide": work / "wide", "mixture": work / "mixture"}
        if not self.models["mixture"].is_dir():
            wide = widen(demo, self.models["wide"])
            upcycle(wide, self.models["mixture"], 4)
        self.tokenizer = load_tokenizer(read_tokenizer_info(demo))
        self.windows = eval_text(None, self.tokenizer, WINDOWS, LENGTH).windows
        self.interpreters = {
            environment: self.interpreter(number, environment)
            for number, environment in enumerate({case.environment for case in CASES})
        }
        texts, prompts = canary_prompts(demo, self.tokenizer)
        self.question, self.prompts = texts[:1], prompts[:1]

    def path(self, case: Case) -> Path:
        """Where the checkpoint of a case lies."""
        folder = "-".join((case.model, case.method, *case.settings)).replace("=", "-")
        return self.work / folder.replace(".", "-") if case.method else self.models[case.model]

    def predicted(self, case: Case, version: str) -> dict[str, Any]:
        """What the rules say of a version: whether it loads, or the reason."""
        if not case.method:
            return {"loads": True}
        try:
            report = quantkit.plan(
                self.models[case.model], method=case.method, set=case.settings, engine="vllm",
                gpu=self.gpu,
            )  # fmt: skip
        except QuantkitError as error:  # it is not made either
            return {"loads": False, "why": [error.message]}
        (verdict,) = report.verdicts
        if not verdict.loads:
            return {"loads": False, "why": [reason.text for reason in verdict.reasons]}
        least = verdict.minimum_version
        early = least != engine_named("vllm").minimum_version and later_than(least, version)
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
        order = engine_order(self.path(case), ENGINES["vllm"], case.opening(self.device))
        order = replace(order, flags=order.flags | EAGER, length=2048)
        start = time.monotonic()
        try:
            process = EngineProcess(ENGINES["vllm"], self.interpreters[case.environment], order)
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

    def ask_ours(self, case: Case) -> dict[str, Any]:
        """The same of the runtime, or its refusal."""
        kept = {name: os.environ.get(name) for name, _ in case.environment}
        os.environ.update(case.environment)
        try:
            subject = open_builtin(self.path(case), case.opening(self.device))
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
        """This Python with vLLM's folder on its path, as one file."""
        variables = {
            "PYTHONPATH": str(self.site or ""), "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", **dict(environment),
        }  # fmt: skip
        python = str(self.python or sys.executable)
        file = self.work / f"python-{number}"
        exports = "\n".join(f"export {name}={shlex.quote(v)}" for name, v in variables.items())
        file.write_text(f'#!/bin/bash\n{exports}\nexec {shlex.quote(python)} "$@"\n')
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
                entry["vllm"] = future.result()
            entries.append(judged(entry))
            print(json.dumps(entry), flush=True)
            yield entries


def judged(entry: dict[str, Any]) -> dict[str, Any]:
    """With `right`: whether the prediction held, and `ratio` of the perplexities."""
    engine = entry.get("vllm", {})
    answered = "perplexity" in engine and math.isfinite(engine["perplexity"])
    if "vllm" in entry:
        entry["right"] = entry["predicted"]["loads"] == answered
    ours = entry.get("runtime", {}).get("perplexity")
    if answered and ours:
        entry["ratio"] = ours / engine["perplexity"]
    return entry


def rows(entries: list[dict[str, Any]]) -> list[list[str]]:
    """The table of `docs/gpu.md`."""
    found = []
    for entry in entries:
        engine, ours = entry.get("vllm", {}), entry.get("runtime", {})
        held = {True: "yes", False: "**no**", None: "–"}[entry.get("right")]
        told = "loads" if entry["predicted"]["loads"] else "refuses"
        kernels = ", ".join(engine.get("kernels", ())) or engine.get("error", "")[:80] or "–"
        found.append([
            entry["case"], told, held, kernels, number(engine.get("perplexity")),
            number(ours.get("perplexity")), f"{entry['ratio']:.3f}" if "ratio" in entry else "–",
            ", ".join(ours.get("kernels", ())) or ours.get("error", "")[:80],
        ])  # fmt: skip
    return found


COLUMNS = ["checkpoint", "predicted", "held", "kernel in vLLM", "perplexity vLLM", "runtime",
           "ratio", "kernel of the runtime"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--site", type=lambda name: Path(name).resolve())
    parser.add_argument("--python", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--gpu", default="h200")
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--at-once", type=int, default=6)
    parser.add_argument("--vllm-version", default="0.26.0")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    chosen.work = chosen.work.resolve()
    bench = Bench(chosen)
    cases = [case for case in CASES if not chosen.only or case.name in chosen.only]
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if chosen.device == "cuda" else chosen.device,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"), "question": bench.question[0],
    }  # fmt: skip
    entries: list[dict[str, Any]] = []
    for entries in run(bench, cases, chosen.vllm_version, chosen.at_once):
        chosen.json.write_text(json.dumps(document | {"cases": entries}, indent=1))
    print("\n".join(table(COLUMNS, rows(entries))))
    wrong = [entry["case"] for entry in entries if entry.get("right") is False]
    apart = [entry["case"] for entry in entries if abs(entry.get("ratio", 1.0) - 1) > AGREES]
    print(f"\npredictions that did not hold: {', '.join(wrong) or 'none'}")
    print(f"ratios over 1 %: {', '.join(apart) or 'none'}")


if __name__ == "__main__":
    main()
