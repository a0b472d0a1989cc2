"""`--method auto`: the recipe that keeps most of a model under a budget, in schemes that load.

Estimates come from `sensitivity.py`, the best sums of them from `assign.py`; the winner and its
neighbours are then quantized for real and measured whole, and the best of them is the result.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from quantkit.backends.environments.device import resolve_device
from quantkit.backends.process.job import Reporter
from quantkit.backends.registry import load_recipe
from quantkit.backends.registry.rtn import RTN
from quantkit.checkpoint.directory import Checkpoint, open_checkpoint
from quantkit.checkpoint.hub import resolve_model
from quantkit.checkpoint.schemes import Scheme
from quantkit.engines import NAMES, gpu_named
from quantkit.engines.capability import runs_on
from quantkit.errors import InputError
from quantkit.pipeline.engine_view import verdicts
from quantkit.pipeline.plan import Plan, make_plan
from quantkit.recipe.model import Recipe
from quantkit.validation.ask.data import EvalText
from quantkit.validation.search.analyze import Sensitivity, fitting, read_text, sensitivity
from quantkit.validation.search.assign import (
    Assignment,
    Choice,
    least_bits,
    least_kl,
    require_scipy,
    totals,
    with_kept,
)
from quantkit.validation.search.budget import Budget
from quantkit.validation.search.groups import KEPT, Group, fusable_groups, schemes_named
from quantkit.validation.search.recipe import recipe_of
from quantkit.validation.search.scorer import OWN, library_scores
from quantkit.validation.search.whole import Whole

SCHEMA_VERSION = 1
KIND = "quantkit.search"
NEIGHBOURS = 2
ATTEMPTS = 4
"""Times that a limit of KL is tightened where the estimate was too low."""
_OWN = ("scheme", "overrides", "group_size", "symmetric", "backend")


@dataclass(frozen=True)
class SearchRequest:
    """What is searched: `changes` are of the recipe; `work` is a folder for trials, removed."""

    model: str
    budget: Budget
    changes: tuple[str, ...]
    work: Path
    device: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Candidate:
    """One assignment: what was estimated, and what the whole model then measured."""

    assignment: Assignment
    recipe: Recipe
    estimate: float
    bits_per_weight: float
    weight_bytes: int
    kl: float

    @property
    def groups(self) -> dict[str, int]:
        """Scheme → how many groups have it."""
        return dict(Counter(self.assignment.values()))

    def to_json(self) -> dict[str, Any]:
        """As a plain object, without the assignment."""
        return {
            "kl": self.kl,
            "estimate": self.estimate,
            "bits_per_weight": self.bits_per_weight,
            "weight_bytes": self.weight_bytes,
            "groups": self.groups,
        }


@dataclass(frozen=True)
class Found:
    """The winner, the candidates that it was chosen from (it among them), and what they were
    estimated from: `sensitivity`, or the choices of another scorer."""

    winner: Candidate
    candidates: tuple[Candidate, ...]
    budget: Budget
    sensitivity: Sensitivity | None
    choices: Sequence[Choice]

    def to_json(self) -> dict[str, Any]:
        """The document that is kept beside the recipe."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "target": self.budget.described,
            "winner": self.winner.to_json(),
            "candidates": [one.to_json() for one in self.candidates],
            "assignment": self.winner.assignment,
            "scorer": self.budget.scorer,
            "scores": self._scores(),
            "sensitivity": self.sensitivity.to_json() if self.sensitivity else None,
        }

    def _scores(self) -> dict[str, dict[str, float]] | None:
        """Group → scheme → score, of a scorer that estimates no KL."""
        if self.sensitivity is not None:
            return None
        found: dict[str, dict[str, float]] = {}
        for one in self.choices:
            found.setdefault(one.group, {})[one.scheme] = one.kl
        return found


def search(request: SearchRequest, ui: Reporter) -> Found:
    """Find the recipe. Raises InputError for a target that cannot be met, with the nearest that
    can, and for whatever speaks against the model or the schemes."""
    require_scipy()
    ui.stage("plan")
    source = open_checkpoint(resolve_model(request.model))
    space = space_of(request, source)
    if request.budget.max_kl is None:
        _refuse_budget(request.budget, space)
    text = read_text(source, None, request.budget.samples)
    try:
        measured, choices = estimates(request, space, source, text, ui)
        whole = Whole(request.model, source, text.windows, request.work, request.device, ui)
        found = candidates(request, space, choices, whole)
    finally:
        shutil.rmtree(request.work, ignore_errors=True)
    best = min(found, key=lambda one: one.kl)
    return Found(best, tuple(found), request.budget, measured, choices)


def estimates(
    request: SearchRequest, space: Space, source: Checkpoint, text: EvalText, ui: Reporter
) -> tuple[Sensitivity | None, list[Choice]]:
    """What each scheme costs each group, where that was measured here; all choices, those to leave
    it in 16 bit among them."""
    weights = {group.name: group.weights for group in space.groups}
    if request.budget.scorer != OWN:
        scores = library_scores(
            request.budget.scorer, source, space.groups, space.fits, text, ui,
            work=request.work, device=resolve_device(request.device), seed=space.base_recipe.seed,
            python=space.base_recipe.python, trust_remote_code=request.trust_remote_code,
        )  # fmt: skip
        sizes = {group.name: group.bits for group in space.groups}
        cells = [
            Choice(group, title, score, sizes[group](space.fits[group][title]))
            for group, found in scores.items()
            for title, score in found.items()
        ]
        return None, with_kept(cells, weights)
    measured = sensitivity(
        source,
        request.model,
        space.groups,
        {title: scheme for title, scheme in space.schemes.items() if title in space.used},
        space.fits,
        text,
        space.engine,
        request.device,
        space.base_recipe.seed,
        ui,
    )
    cells = [Choice(c.group, c.scheme, c.kl, c.bits) for c in measured.cells]
    return measured, with_kept(cells, weights)


@dataclass(frozen=True)
class Space:
    """What may be assigned: `fits` is group → title → scheme as it fits and loads; `fixed` the
    bytes of everything else in the checkpoint."""

    groups: list[Group]
    schemes: Mapping[str, Scheme]
    fits: dict[str, dict[str, Scheme]]
    base: dict[str, Any]
    base_recipe: Recipe
    engine: str
    fixed: int

    @property
    def used(self) -> set[str]:
        """Schemes that some group may get."""
        return {title for found in self.fits.values() for title in found}

    @property
    def weights(self) -> int:
        """How many weights are assigned."""
        return sum(group.weights for group in self.groups)


def space_of(request: SearchRequest, source: Checkpoint) -> Space:
    """The groups and what each may get. Raises InputError, as `search`."""
    schemes = schemes_named(request.budget.schemes)
    if unwritten := [t for t, s in schemes.items() if s.name not in RTN.methods]:
        raise InputError(
            f"--method auto writes no {', '.join(unwritten)}.",
            hint=f"schemes of {', '.join(RTN.methods)}",
            code="search.unwritten",
        )
    own = [change for change in request.changes if change.split("=")[0].rstrip("+") in _OWN]
    if own:
        raise InputError(
            f"--method auto chooses {own[0].split('=')[0].rstrip('+')} itself.",
            hint="--set schemes=[w4a16,fp8_dynamic] says what it chooses from; ignore+= what it "
            "leaves",
            code="search.own_key",
        )
    recipe = load_recipe("rtn_w8a16", request.changes)
    plan = _plan(source, recipe, request)
    groups = [
        group
        for group in fusable_groups(source, next(iter(recipe.serve.engines), "vllm"))
        if all(module.name in plan.layers for module in group.modules)
    ]
    base = recipe.model_dump(mode="json", exclude_defaults=True)
    base = {key: value for key, value in base.items()
            if key not in ("name", "description", "aliases", *_OWN)}  # fmt: skip
    base["description"] = f"searched for {request.budget.described}"
    fits = {group.name: fitting(group, schemes) for group in groups}
    own_bits = sum(group.bits(schemes_named(["w8a16"])["w8a16"]) for group in groups)
    fixed = plan.estimate.output - round(own_bits / 8)
    space = Space(groups, schemes, fits, base, recipe,
                   next(iter(recipe.serve.engines), "vllm"), fixed)  # fmt: skip
    if recipe.serve.engines:
        _leave_what_loads(space, source, request)
    return space


def _plan(source: Checkpoint, recipe: Recipe, request: SearchRequest) -> Plan:
    return make_plan(source, recipe, trust_remote_code=request.trust_remote_code)


def _leave_what_loads(space: Space, source: Checkpoint, request: SearchRequest) -> None:
    """Take out of `space.fits` what an engine of the recipe refuses: a scheme that it has no kernel
    for on the GPU everywhere, others group by group."""
    serve = space.base_recipe.serve
    reasons: dict[str, str] = {}
    for title, scheme in space.schemes.items():
        method = RTN.methods[scheme.name]
        for engine in serve.engines if serve.gpu else ():
            gpu = gpu_named(serve.gpu or "")
            if runs_on(engine, method.layout, method.algorithm, scheme.name, gpu) == "no":
                reasons[title] = f"{NAMES[engine]} has no kernel for it on {gpu.name}"
    for found in space.fits.values():
        for title in reasons:
            found.pop(title, None)

    def refuses(title: str, groups: Sequence[Group]) -> bool:
        inside = {group.name for group in groups if title in space.fits[group.name]}
        if not inside:
            return False
        names = {group.name: title if group.name in inside else KEPT for group in space.groups}
        recipe = recipe_of("trial", space.base, space.groups, space.fits, names)
        found = [v for v in verdicts(source, _plan(source, recipe, request)) if v.refuses]
        if found:
            reasons[title] = f"{found[0].title}: {found[0].reasons[0].text}"
        return bool(found)

    for title in space.schemes:
        if not refuses(title, space.groups):
            continue
        for group in space.groups:
            if refuses(title, [group]):
                space.fits[group.name].pop(title, None)
    if not space.used:
        told = "; ".join(f"{title}: {why}" for title, why in reasons.items())
        raise InputError(
            f"No scheme of {', '.join(space.schemes)} loads: {told}.",
            hint="quantkit platforms  # what runs where; --set schemes=[...] of "
            f"{', '.join(RTN.methods)}",
            code="search.nothing_loads",
        )


def candidates(
    request: SearchRequest, space: Space, choices: Sequence[Choice], whole: Whole
) -> list[Candidate]:
    """The winner by estimate and its neighbours, each measured."""
    budget = request.budget
    if budget.max_kl is not None:
        return _under_kl(request, space, choices, whole, budget.max_kl)
    most = _most_bits(budget, space)
    found: list[Candidate] = []
    while len(found) <= NEIGHBOURS:
        others = [one.assignment for one in found]
        assignment = least_kl(choices, most, others)
        if assignment is None:
            break
        found.append(_measured(space, choices, assignment, whole))
    assert found, "the smallest choices were seen to keep the budget"
    return found


def _most_bits(budget: Budget, space: Space) -> float:
    if budget.max_bytes is not None:
        return (budget.max_bytes - space.fixed) * 8.0
    assert budget.target_bits is not None
    return budget.target_bits * space.weights


def _under_kl(
    request: SearchRequest,
    space: Space,
    choices: Sequence[Choice],
    whole: Whole,
    most: float,
) -> list[Candidate]:
    """The smallest candidates whose measured KL keeps the limit; the estimate's is tightened while
    they do not."""
    limit, nearest = most, None
    for _ in range(ATTEMPTS):
        assignment = least_bits(choices, limit)
        if assignment is None or set(assignment.values()) == {KEPT}:
            break
        one = _measured(space, choices, assignment, whole)
        if one.kl <= most:
            return [one]
        nearest = min((nearest or one, one), key=lambda candidate: candidate.kl)
        limit *= 0.9 * most / one.kl
    reached = f"{nearest.kl:.4g}" if nearest else "nothing but 16 bit"
    raise InputError(
        f"No assignment of {', '.join(sorted(space.used))} keeps max_kl={most:g} on "
        f"{request.model}; the nearest measured is {reached}.",
        hint=f"--set max_kl={nearest.kl * 1.02:.2g}" if nearest else "--set max_kl=0.05",
        code="search.unreachable",
    )


def _measured(
    space: Space, choices: Sequence[Choice], assignment: Assignment, whole: Whole
) -> Candidate:
    recipe = recipe_of("auto", space.base, space.groups, space.fits, assignment)
    sums = totals(choices, assignment)
    kl, size = whole.measure(recipe)
    return Candidate(assignment, recipe, sums.kl, sums.bits / space.weights, size, kl)


def _refuse_budget(budget: Budget, space: Space) -> None:
    """InputError with the least that can be reached, where the budget is below it, and for one that
    16 bit keeps."""
    if 16.0 * space.weights <= _most_bits(budget, space):
        raise InputError(
            f"{budget.described} leaves every layer in 16 bit.",
            hint="a smaller target_bits or max_bytes",
            code="search.nothing_to_do",
        )
    bits = sum(
        min((group.bits(scheme) for scheme in space.fits[group.name].values()),
            default=group.bits(None))
        for group in space.groups
    )  # fmt: skip
    if bits <= _most_bits(budget, space):
        return
    least, size = bits / space.weights, space.fixed + round(bits / 8)
    raise InputError(
        f"{budget.described} cannot be met: with {', '.join(sorted(space.used))} the least is "
        f"{least:.3f} bits a weight, a checkpoint of {size} bytes.",
        hint=f"--set max_bytes={size}"
        if budget.max_bytes is not None
        else f"--set target_bits={ceil(least * 100) / 100:g}",
        code="search.unreachable",
    )
