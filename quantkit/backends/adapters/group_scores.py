"""What a scorer is asked, and how its answer is kept: a number for every group and scheme.

`Job.options` holds `groups` (name → modules of the checkpoint) and `schemes` (title → scheme); the
answer is `SCORES` in `Job.out`, group → title → score, which is comparable within one answer only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.backends.adapters.places import places
from quantkit.backends.process.job import Job, JobInputError
from quantkit.checkpoint.schemes import Scheme

SCORES = "scores.json"


@dataclass(frozen=True)
class Asked:
    """modules: each group's modules, as Transformers names them, once."""

    modules: Mapping[str, tuple[str, ...]]
    schemes: Mapping[str, Scheme]

    @classmethod
    def of(cls, job: Job, model: Any) -> Asked:
        """Raises JobInputError for layers that the model does not have."""
        names: dict[str, list[str]] = job.options["groups"]
        found = places(model, [layer for layers in names.values() for layer in layers])
        absent = [layer for layers in names.values() for layer in layers if layer not in found]
        if absent:
            raise JobInputError(
                f"{len(absent)} layers are not in the model that Transformers builds from "
                f"{job.model}: {absent[:3]}.",
                hint="leave options.scorer out",
                code="worker.layers_absent",
            )
        modules = {
            group: tuple(dict.fromkeys(found[layer].module for layer in layers))
            for group, layers in names.items()
        }
        schemes = {title: Scheme.from_json(one) for title, one in job.options["schemes"].items()}
        return cls(modules, schemes)

    def others(self, model: Any) -> list[str]:
        """Linear layers of the model that are in no group."""
        inside = {module for modules in self.modules.values() for module in modules}
        kinds = ("Linear", "Conv1D")
        return [
            name
            for name, module in model.named_modules()
            if type(module).__name__ in kinds and name not in inside
        ]

    def summed(self, scores: Iterable[tuple[Iterable[str], float]]) -> dict[str, float]:
        """Group → the scores of its modules; each of `scores` is of several together, and is split
        evenly where they are of more than one group."""
        group_of = {one: group for group, modules in self.modules.items() for one in modules}
        found: dict[str, float] = {}
        for modules, score in scores:
            held = list(modules)
            for module in held:
                if module in group_of:
                    group = group_of[module]
                    found[group] = found.get(group, 0.0) + score / len(held)
        return found

    def write(self, job: Job, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Keep title → group → score. Raises JobInputError where a group has none."""
        for title, found in scores.items():
            if missing := [group for group in self.modules if group not in found]:
                raise JobInputError(
                    f"{job.backend} gives no score in {title} to {len(missing)} groups, "
                    f"{missing[0]} among them.",
                    hint="leave options.scorer out",
                    code="search.no_score",
                )
        by_group = {
            group: {title: scores[title][group] for title in scores} for group in self.modules
        }
        Path(job.out).mkdir(parents=True, exist_ok=True)
        Path(job.out, SCORES).write_text(json.dumps(by_group), encoding="utf-8")


def unknown_format(library: str, scheme: Scheme) -> JobInputError:
    """A scheme that the library cannot score."""
    return JobInputError(
        f"{library} scores no {scheme.name}.",
        hint="--set schemes=[w4a16,fp8_dynamic] without it, or leave options.scorer out",
        code="search.no_score",
    )
