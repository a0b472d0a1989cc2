"""Methods by the library's own script (plain_methods.py) and through quantkit, in turn."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from methods import Measured, compared, plain, quantize

from quantkit.calibration import build_tokens, load_calibration
from quantkit.checkpoint.directory import open_checkpoint

HEADS = ("method", "script s", "quantkit s", "ratio", "script cpu s", "quantkit cpu s", "ratio",
         "script MiB", "quantkit MiB", "ratio", "tensors")  # fmt: skip


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """How much is calibrated, how often, and how many layers there are."""
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layers", type=int)


def contents(path: Path) -> dict[str, str]:
    """Digest of every tensor; AutoRound writes a folder below."""
    return open_checkpoint(next(path.rglob("config.json")).parent).digests()


def print_in_turn(
    model: Path,
    methods: Mapping[str, tuple[str, ...]],
    asked: argparse.Namespace,
    digests: Callable[[Path], dict[str, str]] = contents,
) -> None:
    """A line a method: medians of the library's stage on both sides, from loading to saving, and
    whether the tensors are equal. `methods` has each one's settings beside the calibration's."""
    overrides: dict[str, object] = {"samples": asked.samples, "sequence_length": asked.length}
    tokens = build_tokens(load_calibration("default", overrides), model)
    calibration = [f"calibration.{key}={value}" for key, value in overrides.items()]
    print(
        f"{asked.layers or 'all'} layers, {asked.samples} × {asked.length} tokens, median of "
        f"{asked.rounds}\n\n| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|"
    )
    for name, settings in methods.items():
        sets = [*(() if name.endswith("_dynamic") else calibration), *settings]
        runs: dict[str, list[Measured]] = {"plain": [], "ours": []}
        for number in range(asked.rounds):
            with tempfile.TemporaryDirectory(dir=asked.work) as folder:
                places = {side: Path(folder, side) for side in runs}
                for side in list(runs) if number % 2 == 0 else list(runs)[::-1]:
                    runs[side].append(
                        plain(name, model, tokens.path, places[side])
                        if side == "plain"
                        else quantize(model, name, places[side], sets)
                    )
                theirs, ours = (digests(place) for place in places.values())
        cells = [cell for key in ("library", "processors", "peak") for cell in compared(runs, key)]
        other = sum(theirs.get(tensor) != digest for tensor, digest in ours.items())
        same = f"{other} of {len(ours)} differ" if other else "equal"
        print(" | ".join([f"| `{name}`", *cells, f"{same} |"]), flush=True)
