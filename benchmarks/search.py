"""Searched recipes against uniform ones of the same size, by the KL of the whole model.

    python benchmarks/search.py WORKDIR [--moe] [--model DIR] [--samples 8] [--bits 5.4]

Uniform recipes of the built-in backend, then the recipe that the search finds in no more bytes than
each of them, and at `--bits`. The search sees half of the windows of held-out text, and all are
compared on the other half. Also what the pass of `analyze` cost. Results are kept in
WORKDIR/search.json: a second run goes on where one stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.backends.registry import load_recipe
from quantkit.checkpoint.demo import demo_model
from quantkit.checkpoint.directory import open_checkpoint
from quantkit.checkpoint.upcycle import demo_mixture
from quantkit.cli.output import Output
from quantkit.validation.search.analyze import read_text
from quantkit.validation.search.assign import Choice
from quantkit.validation.search.auto import SearchRequest, candidates, estimates, space_of
from quantkit.validation.search.budget import SCHEMES, Budget
from quantkit.validation.search.whole import Whole

UNIFORM: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "w4a16": ("rtn_w4a16", ("on_misfit=fit",)),
    "nvfp4a16": ("rtn_nvfp4a16", ()),
    "w4a16 in groups of 32": ("rtn_w4a16", ("group_size=32",)),
    "fp8_dynamic": ("rtn_fp8_dynamic", ()),
    "w8a16": ("rtn_w8a16", ()),
}
ROOM = 1.0001
"""Bytes over those of the uniform recipe: headers are of other lengths."""


def main() -> None:
    """Measure what is not yet in the file, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--moe", action="store_true", help="the mixture made of the demo model")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--bits", type=float, nargs="*", default=[5.4])
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    file = asked.work / "search.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    model, ui = str(asked.model or (demo_mixture() if asked.moe else demo_model())), Output()
    source = open_checkpoint(Path(model))
    budget = Budget(target_bits=asked.bits[0], samples=asked.samples)
    request = SearchRequest(model, budget, ("serve.engines=[vllm]", "serve.gpu=h100"),
                            asked.work / "trials", asked.device)  # fmt: skip
    text = read_text(source, None, 2 * asked.samples)
    seen, unseen = replace(text, windows=text.windows[::2]), text.windows[1::2]
    whole = Whole(model, source, seen.windows, request.work, asked.device, ui)
    judge = Whole(model, source, unseen, request.work, asked.device, ui)

    def keep(key: str, value: Any) -> None:
        found[key] = value
        file.write_text(json.dumps(found, indent=1))

    for name, (method, sets) in UNIFORM.items():
        if name not in found:
            kl, size = judge.measure(load_recipe(method, sets))
            keep(name, {"kl": kl, "bytes": size})
    space = space_of(request, source)
    if "choices" not in found:
        measured, choices = estimates(request, space, source, seen, ui)
        assert measured is not None, "the scorer is ours"
        keep("choices", [vars(one) for one in choices])
        keep("cost", dict(measured.cost))
    choices = [Choice(**one) for one in found["choices"]]
    targets = {
        f"no more than {name}": replace(
            budget, target_bits=None, max_bytes=round(found[name]["bytes"] * ROOM)
        )
        for name in UNIFORM
    } | {f"{bits} bits": replace(budget, target_bits=bits) for bits in asked.bits}
    for name, limit in targets.items():
        alike = [other for other in targets if found.get(other, {}).get("limit") and limit.max_bytes
                 and abs(limit.max_bytes / found[other]["limit"] - 1) < ROOM - 1]  # fmt: skip
        if name not in found and alike:
            keep(name, found[alike[0]])
        elif name not in found:
            tried = candidates(replace(request, budget=limit), space, choices, whole)
            best = min(tried, key=lambda one: one.kl)
            kl, _ = judge.measure(best.recipe)
            keep(name, {"limit": limit.max_bytes, "kl": kl, "bytes": best.weight_bytes,
                        "bits": best.bits_per_weight, "groups": best.groups,
                        "estimate": best.estimate, "tried": [one.kl for one in tried]})  # fmt: skip
    cost = found["cost"]
    print(f"schemes to choose from: {', '.join(SCHEMES)}; {asked.samples} windows seen, as many "
          f"others to compare; cost {cost['passes']} forward passes counted, "
          f"{cost['timed_passes']} by the clock, limit {cost['limit']}")  # fmt: skip
    print("| recipe | MB | KL | searched, no more bytes: MB | KL | groups |")
    print("|---|---|---|---|---|---|")
    for name in UNIFORM:
        one, other = found[name], found[f"no more than {name}"]
        print(f"| {name} | {one['bytes'] / 1e6:.2f} | {one['kl']:.5f} | "
              f"{other['bytes'] / 1e6:.2f} | {other['kl']:.5f} | {_groups(other)} |")  # fmt: skip
    for bits in asked.bits:
        one = found[f"{bits} bits"]
        print(f"| | | | {one['bytes'] / 1e6:.2f} ({one['bits']:.2f} bits) | {one['kl']:.5f} | "
              f"{_groups(one)} |")  # fmt: skip


def _groups(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} × {name}" for name, count in found["groups"].items())


if __name__ == "__main__":
    main()
