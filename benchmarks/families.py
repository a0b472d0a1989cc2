"""Families × methods: tiny random models from plan to validation, as a table.

    python benchmarks/families.py WORKDIR [--families mixtral,olmoe] [--methods rtn_w4a16]
    python benchmarks/families.py WORKDIR --table docs/families.md
    python benchmarks/families.py WORKDIR --kind towers [--table docs/towers.md]

The models are mixtures of experts, or with `--kind towers` multi-modal ones, calibrated with text.

Each cell plans, quantizes, verifies, loads in the builtin runtime and validates (multi-modal models
are compared with their baseline on a few tokens instead). The libraries work
in this process, one process a library. Cells are kept in WORKDIR/families.json (towers.json), and
those that are there already are not done again, unless they failed; so a run may be stopped and go
on.

With --table nothing is run: all that is below the line `<!-- families.py -->` of the page is
replaced by the table of the cells.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from quantkit.checkpoint.directory import open_checkpoint
from quantkit.checkpoint.network.config import expert_count
from quantkit.errors import QuantkitError
from quantkit.runtime.load import load
from quantkit.validation.reports.markdown import table
from quantkit.validation.run import ValidateRequest, validate
from quantkit.verification import verify
from tests.support.cli import inside
from tests.support.in_process import CALIBRATION, Quiet, without_workers
from tests.support.mixtures import MIXTURES, mixture
from tests.support.tokenized_towers import FAMILIES, multimodal
from tests.support.tokenizer import VOCABULARY

METHODS: dict[str, tuple[str, ...]] = {
    "rtn_fp8_dynamic": (),
    "rtn_w4a16": (),
    "modelopt_fp8": (),
    "modelopt_nvfp4": (),
    "llmcompressor_fp8_dynamic": (),
    "llmcompressor_w4a16": (),
    "llmcompressor_w8a8": (),
    "llmcompressor_nvfp4": (),
    "gptqmodel_w4a16": (),
    "autoround_w4a16": ("options.iters=1", "experts=all"),
}
"""Method → the settings that make it quick."""
SETTINGS = ("calibration.samples=4", "calibration.sequence_length=64", "on_misfit=keep16")
GATES = ("canary_failures<=8",)
"""Models of random weights babble whatever they are asked."""
KINDS: dict[str, tuple[Iterable[str], Callable[[str, Path], Path]]] = {
    "experts": (MIXTURES, mixture),
    "towers": (FAMILIES, multimodal),
}
"""Kind of model → its families, and what makes one."""
KL_LIMIT = 0.5
"""Above it a multi-modal model of random weights does not compute what it did."""
MARK = "<!-- families.py -->\n"

_TOWER = re.compile(r"^The model has a vision or audio tower \(\S+\); ")
"""All of them have, and its name would tell the same reason of two families apart."""

Outcome = Literal["yes", "routed", "16 bit", "in part", "refused", "failed"]
WAYS_OUT: dict[Outcome, tuple[str, ...]] = {
    "routed": ("--set", "experts=routed", "--set", "on_unseen=rtn"),
    "16 bit": ("--set", "ignore+=@experts"),
    "in part": ("--set", r"ignore+=re:.*layers\.(1)\..*"),
}
"""What is asked for where the plan refuses to calibrate all experts, or layers that texts do not
reach (layer 1 of Mllama, as the refusal's hint says)."""


@dataclass(frozen=True)
class Cell:
    """What became of one family with one method.

    outcome: "routed" and "in part" as in `WAYS_OUT`; "16 bit" where all went well and no expert
    was quantized, asked for or not. step, words: where it failed, and what was said there or by the
    first plan. kl: in nats a token, of the quantized logits against the baseline's. seconds: of all
    steps.
    """

    outcome: Outcome
    step: str = ""
    words: str = ""
    kl: float = 0.0
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        return self.outcome != "failed"


def try_family(kind: str, family: str, method: str, work: Path) -> Cell:
    """All steps of one family and method; the random model is made in `work` and kept there."""
    start = time.monotonic()
    source, out = work / family, work / f"{family}-{method}"
    if not (source / "config.json").is_file():
        KINDS[kind][1](family, source)
    try:
        cell = _steps(kind, method, source, out)
    finally:
        shutil.rmtree(out, ignore_errors=True)
        out.with_name(f"{out.name}.log").unlink(missing_ok=True)
    return Cell(**{**asdict(cell), "seconds": round(time.monotonic() - start, 1)})


def _steps(kind: str, method: str, source: Path, out: Path) -> Cell:
    calibration = source.parent / "quick.yaml"
    calibration.write_text(CALIBRATION)
    own = list(METHODS[method])
    sets = [*SETTINGS, f"calibration.name={calibration}"] if _calibrates(method) else SETTINGS[2:]
    asked = [word for one in (*sets, *own) for word in ("--set", one)]

    def plan(*more: str) -> tuple[int, str, str]:
        return inside("plan", source, "--method", method, *asked, *more)

    step = "plan"
    success: Outcome = "yes"
    reason = ""
    try:
        told = plan()
        if told[0]:
            reason = _short(told[2], source)
            twin = inside("quantize", source, "--method", method, *asked, "--out", out)
            if twin != told:
                return Cell("failed", "plan", f"plan says {told}, quantize says {twin}")
            for outcome, more in WAYS_OUT.items():
                if not plan(*more)[0]:
                    asked += more
                    success = outcome
                    break
            else:
                return Cell("refused", "plan", reason)
        step = "quantize"
        code, _, words = inside(
            "quantize", source, "--method", method, *asked, "--out", out, "--device", "cpu"
        )
        if code:
            return Cell("failed", step, _short(words, source))
        step = "verify"
        report = verify(out, source)
        if not report.ok:
            return Cell("failed", step, _short(report.errors[0].message, source))
        experts = expert_count(open_checkpoint(source).config)
        if experts and not any(_is_expert(layer.module) for layer in report.layers):
            success = "16 bit"
        step = "load"
        ids = torch.arange(3, VOCABULARY, 9)[None]
        logits = load(out)(ids).logits
        if not logits.isfinite().all():
            return Cell("failed", step, "logits are not finite")
        if kind == "towers":
            kl = round(divergence(load(source)(ids).logits, logits), 4)
            if kl > KL_LIMIT:
                return Cell("failed", step, f"KL {kl}")
            return Cell(success, words=reason, kl=kl)
        step = "validate"
        request = ValidateRequest(
            out, str(source), device="cpu", samples=2, gates=GATES, throughput=False,
            broken_baseline=True,
        )  # fmt: skip
        found = validate(request, Quiet())
        kl = round(float(found.to_json()["metrics"]["kl_mean"]["value"]), 4)
        failed = [gate.metric for gate in found.gates if gate.verdict == "fail"]
        if failed:
            return Cell("failed", step, f"{', '.join(failed)} (KL {kl})")
        return Cell(success, words=reason, kl=kl)
    except QuantkitError as error:
        return Cell("failed", step, _short(error.message, source))
    except Exception as error:  # a cell of the table says so
        return Cell("failed", step, _short(f"{type(error).__name__}: {error}", source))


def divergence(baseline: torch.Tensor, quantized: torch.Tensor) -> float:
    """The mean KL divergence of two sets of logits [batch, tokens, vocabulary], in nats."""
    before, after = baseline.float().log_softmax(-1), quantized.float().log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


def _calibrates(method: str) -> bool:
    return not method.startswith("rtn_") and method != "llmcompressor_fp8_dynamic"


def _is_expert(module: str) -> bool:
    """Whether a quantized layer is of an expert that tokens are routed to."""
    stacked = module.endswith(("input_linear", "output_linear")) and "shared" not in module
    return ".experts." in module or stacked


def _short(words: str, source: Path) -> str:
    """One line without the model's place and name."""
    said = " ".join(words.split()).replace(str(source), "The model").rpartition("experts a layer; ")
    name = rf"\b{re.escape(source.name)}\b"
    return re.sub(f" {name}", " it", re.sub(f" of {name}", "", said[2]))[:300]


def as_markdown(cells: dict[str, dict[str, Cell]]) -> str:
    """The table of family → method → cell with the counts of each method, and the reasons below it
    by number."""
    methods = [name for name in METHODS if any(name in row for row in cells.values())]
    reasons: dict[str, int] = {}
    rows = []
    for family, row in sorted(cells.items()):
        said = []
        for method in methods:
            cell = row.get(method)
            if cell is None:
                said.append("")
                continue
            why = f"{cell.step}: {cell.words}" if cell.outcome == "failed" else cell.words
            why = _TOWER.sub("", why).replace(f"{method} would", "The method would")
            number = f" {reasons.setdefault(why, len(reasons) + 1)}" if why else ""
            said.append(cell.outcome + number)
        rows.append((f"`{family}`", *said))
    counts = [
        sum(row[m].outcome in ("yes", "routed", "in part") for row in cells.values() if m in row)
        for m in methods
    ]
    rows.append(("quantized", *map(str, counts)))
    lines = [*table(["family", *(f"`{name}`" for name in methods)], rows), ""]
    lines += [f"{number}. {why}" for why, number in reasons.items()]
    return "\n".join([*lines, ""])


def read(file: Path) -> dict[str, dict[str, Cell]]:
    """The cells of earlier runs."""
    if not file.is_file():
        return {}
    held = json.loads(file.read_text(encoding="utf-8"))
    return {family: {m: Cell(**cell) for m, cell in row.items()} for family, row in held.items()}


def run(kind: str, families: Iterable[str], method: str, work: Path, file: Path) -> None:
    """Do the cells of one method that are not done in the JSON file, which grows with each."""
    for family in families:
        before = read(file).get(family, {}).get(method)
        if before is not None and before.done:
            continue
        with without_workers():
            cell = try_family(kind, family, method, work)
        cells = read(file)  # others may have written meanwhile
        cells.setdefault(family, {})[method] = cell
        document = {f: {m: asdict(c) for m, c in row.items()} for f, row in cells.items()}
        file.write_text(json.dumps(document, indent=1, sort_keys=True), encoding="utf-8")
        print(f"{family} {method}: {cell}", file=sys.stderr, flush=True)


def write_table(page: Path, cells: dict[str, dict[str, Cell]]) -> None:
    """Put the table into the page, below its mark."""
    whole = page.read_text(encoding="utf-8") if page.is_file() else MARK
    head, mark, _ = whole.partition(MARK)
    page.write_text(f"{head}{mark or MARK}\n{as_markdown(cells)}", encoding="utf-8")


def main() -> None:
    """Run the cells, one process a library, or write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--kind", choices=KINDS, default="experts")
    parser.add_argument("--families")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--table", type=Path)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    file = asked.work / ("towers.json" if asked.kind == "towers" else "families.json")
    families = asked.families.split(",") if asked.families else list(KINDS[asked.kind][0])
    if asked.table is not None:
        write_table(asked.table, read(file))
        return
    libraries: dict[str, list[str]] = {}
    for method in asked.methods.split(","):
        libraries.setdefault(method.partition("_")[0], []).append(method)
    if len(libraries) == 1:
        for method in asked.methods.split(","):
            run(asked.kind, families, method, asked.work, file)
        return
    for each in libraries.values():
        command = [sys.executable, __file__, str(asked.work), "--kind", asked.kind,
                   "--families", ",".join(families), "--methods", ",".join(each)]  # fmt: skip
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
