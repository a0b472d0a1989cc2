"""Sensitivities from a library instead of `sensitivity.py`, for whoever trusts those more.

The library runs as a backend does, in a child process of the interpreter that has it; adapters are
`backends/adapters/*_scores.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from quantkit.backends.environments.interpreter import find_interpreter
from quantkit.backends.process.job import Job, Reporter
from quantkit.backends.process.parent import run_worker
from quantkit.backends.registry import backend_named
from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.schemes import Scheme
from quantkit.errors import InputError
from quantkit.validation.ask.data import EvalText
from quantkit.validation.search.groups import Group

OWN = "fisher"
"""The scorer that estimates KL itself."""

LIBRARIES: Mapping[str, str] = {
    "modelopt": "quantkit.backends.adapters.modelopt_scores:run",
    "autoround": "quantkit.backends.adapters.autoround_scores:run",
}
SCORERS = (OWN, *LIBRARIES)

Scores = dict[str, dict[str, float]]
"""Group → title of a scheme → score: more is worse, comparable within one answer only."""


def library_scores(
    name: str,
    source: Checkpoint,
    groups: Sequence[Group],
    fits: Mapping[str, Mapping[str, Scheme]],
    text: EvalText,
    ui: Reporter,
    *,
    work: Path,
    device: str,
    seed: int,
    python: str | None = None,
    trust_remote_code: bool = False,
) -> Scores:
    """The scores of a library for the schemes that fit each group, on all of the text.

    A library has one group size a scheme: the smallest that any group takes. Raises InputError for
    what the library cannot score, BackendError where it is missing or fails; its log then stays
    beside `work`.
    """
    from safetensors.numpy import save_file

    backend = backend_named(name)
    asked = [group for group in groups if fits[group.name]]
    if not asked:
        raise InputError(
            "No scheme fits any group of layers.", hint="--set schemes=[w4a16:32]",
            code="search.no_score",
        )  # fmt: skip
    work.mkdir(parents=True, exist_ok=True)
    tokens = work / "tokens.safetensors"
    ids = np.ascontiguousarray(text.windows)
    save_file({"input_ids": ids, "attention_mask": np.ones_like(ids)}, tokens)
    schemes: dict[str, Scheme] = {}
    for found in (fits[group.name] for group in asked):
        for title, scheme in found.items():
            schemes[title] = min(
                schemes.get(title, scheme), scheme, key=lambda one: one.weight.group_size or 0
            )
    job = Job(
        task="quantize",
        backend=name,
        adapter=LIBRARIES[name],
        method=f"options.scorer={name}",
        model=str(source.path.resolve()),
        out=str((work / "scores").resolve()),
        scheme=None,
        options={
            "groups": {group.name: [one.name for one in group.modules] for group in asked},
            "schemes": {title: asdict(scheme) for title, scheme in schemes.items()},
        },
        tokens=str(tokens.resolve()),
        device=device,
        devices=[device],
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    log = work.with_name(f"{work.name}.log")
    run_worker(job, python=find_interpreter(backend, python), log=log, report=ui)
    log.unlink()
    every: Scores = json.loads((work / "scores" / "scores.json").read_text(encoding="utf-8"))
    return {
        group: {title: score for title, score in found.items() if title in fits[group]}
        for group, found in every.items()
    }
