"""Families that see or hear in a real engine: does their language model load as the plan says?

    python benchmarks/engines_gpu_towers.py --site FOLDER … --work DIR --json FILE
                                            [--only FAMILY …] [--methods rtn_fp8_dynamic …]

The folders are those of `engines_gpu.py` (or --python PYTHON --device cpu). The models are the tiny
random ones of the tests, which have no processor: the engine is started with
--language-model-only, so that the towers' weights are not looked at. For each family, in 16 bit and
by each method: what the plan predicts, whether the engine loads it, and the perplexity of random
tokens there and in our runtime.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from engines_gpu import Bench, rows, run
from engines_gpu_cases import VERSIONS, Case

from quantkit.calibration.tokenizer import load_tokenizer, read_tokenizer_info
from quantkit.runtime.serving.drivers.base import EngineOrder
from quantkit.validation.reports.markdown import table
from tests.support.tokenized_towers import FAMILIES, multimodal
from tests.support.tokenizer import VOCABULARY

COLUMNS = ["family and method", "predicted", "held", "kernel in the engine", "perplexity there",
           "runtime", "ratio", "kernel of the runtime"]  # fmt: skip
TEXT_ONLY = {"--language-model-only": True}


class TowersBench(Bench):
    """The tiny models, asked random tokens; engines see their language model alone."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.site, self.python, self.device = chosen.site, chosen.python, chosen.device
        self.gpu, self.engine, self.limit = chosen.gpu, "vllm", chosen.limit
        self.work = chosen.work
        self.models = {name: self.work / f"source-{name}" for name in chosen.only}
        for name, path in self.models.items():
            if not path.is_dir():
                multimodal(name, path)
        self.tokenizer = load_tokenizer(read_tokenizer_info(next(iter(self.models.values()))))
        drawn = np.random.default_rng(0)
        self.windows = drawn.integers(16, VOCABULARY, (8, 64))
        self.interpreters = {(): self.interpreter(0, ())}
        self.question, self.prompts = ("random tokens",), [self.windows[0, :16].tolist()]

    def ordered(self, order: EngineOrder) -> EngineOrder:
        given = super().ordered(order)
        return replace(given, flags=given.flags | TEXT_ONLY, length=256)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--site", type=lambda name: Path(name).resolve(), nargs="+", default=[])
    parser.add_argument("--python", type=lambda name: Path(name).absolute())
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=lambda name: Path(name).resolve(), required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--gpu", default="h200")
    parser.add_argument("--only", nargs="+", default=sorted(FAMILIES), choices=sorted(FAMILIES))
    parser.add_argument("--methods", nargs="*", default=["rtn_fp8_dynamic"])
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--engine-version", default=VERSIONS["vllm"])
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    bench = TowersBench(chosen)
    cases = [
        Case(f"{family} {method or 'BF16'}", family, method)
        for family in chosen.only
        for method in ("", *chosen.methods)
    ]
    entries: list[dict[str, Any]] = []
    for entries in run(bench, cases, chosen.engine_version, chosen.at_once):
        chosen.json.write_text(json.dumps(entries, indent=1))
    print("\n".join(table(COLUMNS, rows(entries))))
    wrong = [entry["case"] for entry in entries if entry.get("right") is False]
    print(f"\npredictions that did not hold: {', '.join(wrong) or 'none'}")


if __name__ == "__main__":
    main()
