"""lm-eval's own backend for an engine, in that engine on a GPU, beside the runtime.

    python benchmarks/engines_gpu_harness.py --site FOLDER … --packages FOLDER
                                             --work DIR --json FILE
                                             [--engine vllm|sglang] [--only NAME …]

The folders are those of `engines_gpu.py`; --packages holds lm-eval. For each case (of
`engines_gpu_cases.py`): the facts of `quantkit validate` as a multiple-choice task and as one of
greedy answers, both through the chat template; accuracy in the engine and in the runtime on the
same card, and how many samples they answer alike.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from engines_gpu import Bench
from engines_gpu_cases import EAGER, Case, cases_of

from quantkit.calibration.tokenizer import read_tokenizer_info
from quantkit.checkpoint.demo import demo_model
from quantkit.runtime.serving.environments import ENGINES
from quantkit.runtime.serving.process import EngineProcess
from quantkit.validation.ask.choices import facts
from quantkit.validation.ask.tasks import TaskChoice, choose_tasks, run_tasks
from quantkit.validation.preflight import chat_of
from quantkit.validation.reports.markdown import table
from quantkit.validation.subjects.builtin import open_builtin
from quantkit.validation.subjects.served import engine_order

CASES = ("wide BF16", "wide rtn_fp8_dynamic", "wide rtn_w4a16")
HEAD = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
"""
TASKS = {
    "facts": """output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "answers": """output_type: generate_until
doc_to_target: "{{target}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


class Harnessed:
    """A checkpoint in an engine that is started by lm-eval's backend for it."""

    def __init__(self, bench: Bench, case: Case, packages: Path) -> None:
        self._bench, self._case, self._packages = bench, case, packages
        self.version = ""

    def harness(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        engine = ENGINES[self._bench.engine]
        opening = self._case.opening("cuda", self._bench.engine)
        order = engine_order(self._bench.path(self._case), engine, opening)
        order = replace(
            self._bench.ordered(order), driver=engine.harness, packages=str(self._packages)
        )
        python = self._bench.interpreters[self._case.environment]
        process = EngineProcess(engine, python, order)
        try:
            self.version = process.version
            return process.tasks(asked)
        finally:
            process.close()


def write_tasks(folder: Path) -> TaskChoice:
    """The two tasks over the facts that `quantkit validate` asks."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "facts.jsonl"
    rows = [
        {
            "prompt": q.prompt,
            "choices": q.choices,
            "answer": q.answer,
            "target": q.choices[q.answer],
        }
        for q in facts()
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    files = []
    for name, body in TASKS.items():
        file = folder / f"local_{name}.yaml"
        file.write_text(HEAD.format(name=f"local_{name}", data=data) + body)
        files.append(str(file))
    choice = choose_tasks(files, None, chat=True)
    assert choice is not None
    return choice


def compare(bench: Bench, case: Case, choice: TaskChoice, packages: Path) -> dict[str, Any]:
    """Accuracies on both sides, and the samples that both answer alike."""
    entry: dict[str, Any] = {"case": case.name}
    if failure := bench.make(case):
        return entry | {"error": failure}
    path, began = bench.path(case), time.monotonic()
    engine = Harnessed(bench, case, packages)
    try:
        theirs = run_tasks(engine, bench.tokenizer, choice)  # type: ignore[arg-type]
    except Exception as error:
        return entry | {"error": f"{type(error).__name__}: {error}"[-600:]}
    entry |= {"by": engine.version, "seconds": time.monotonic() - began}
    subject = open_builtin(path, case.opening("cuda", bench.engine))
    try:
        render = chat_of(read_tokenizer_info(demo_model()))
        ours = run_tasks(subject, bench.tokenizer, choice, None, render)
    finally:
        subject.close()
    for name, values in ours["samples"].items():
        served = theirs["samples"][name]
        alike = sum(one == other for one, other in zip(values, served, strict=True))
        entry[name] = {
            "engine": sum(served) / len(served),
            "runtime": sum(values) / len(values),
            "alike": alike,
            "of": len(values),
        }
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=sorted(EAGER), default="vllm")
    parser.add_argument("--site", type=lambda name: Path(name).resolve(), nargs="+", default=[])
    parser.add_argument("--packages", type=lambda name: Path(name).resolve(), required=True)
    parser.add_argument("--work", type=lambda name: Path(name).resolve(), required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(CASES))
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        argparse.Namespace(**vars(chosen), python=None, device="cuda", gpu="h200", limit=600)
    )
    choice = write_tasks(chosen.work / "tasks")
    entries = []
    for case in cases_of(chosen.engine):
        if case.name in chosen.only:
            entries.append(compare(bench, case, choice, chosen.packages))
            print(json.dumps(entries[-1]), flush=True)
            chosen.json.write_text(json.dumps(entries, indent=1))
    metrics = sorted({name for entry in entries for name in entry if "." in name})
    rows = [
        [entry["case"], entry.get("by", entry.get("error", ""))[:60]]
        + [
            "{engine:.3f} / {runtime:.3f}, {alike} of {of} alike".format(**entry[name])
            if name in entry
            else "–"
            for name in metrics
        ]
        for entry in entries
    ]
    print("\n".join(table(["checkpoint", "by", *metrics], rows)))


if __name__ == "__main__":
    main()
