"""Will this engine load that checkpoint at this tensor-parallel size? All reasons, or none.

Of a model that the data has no rules for only what holds for every model is judged: the verdict is
a refusal, or unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from quantkit.engines.check_names import check_names
from quantkit.engines.check_schemes import (
    check_format,
    check_scale_names,
    check_schemes,
    environment,
    minimum_version,
    serving_notes,
)
from quantkit.engines.check_shapes import check_heads, check_shapes, group_fits
from quantkit.engines.gpus import Gpu
from quantkit.engines.kv import cautions, check_gpu
from quantkit.engines.loadable import Loadable
from quantkit.engines.names import layers
from quantkit.engines.reasons import Reason, condensed
from quantkit.engines.rules import EngineRules, engines
from quantkit.engines.support import NAMES
from quantkit.engines.without_rules import check_architecture, without_rules
from quantkit.errors import InputError


@dataclass(frozen=True)
class Verdict:
    """`version` is the engine's version whose sources the rules were read from. `cautions` are what
    does not stop the load and may change what is served; `notes` what else to know. unknown: why
    nothing can be said, where the data has no rules for the model. spread: of a mixture with
    quantized experts cut over ranks, whether it loads with whole experts a rank instead (expert
    parallelism). minimum_version: the oldest release of the engine that has what the layers need.
    environment: variables with which the engine serves it better on this GPU than by default.
    """

    engine: str
    tp: int
    version: str
    reasons: tuple[Reason, ...] = ()
    unknown: str = ""
    spread: bool | None = None
    notes: tuple[str, ...] = ()
    cautions: tuple[Reason, ...] = ()
    minimum_version: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def caveats(self) -> tuple[str, ...]:
        """The notes and the text of the cautions."""
        return (*self.notes, *(caution.text for caution in self.cautions))

    @property
    def outcome(self) -> Literal["loads", "refuses", "unknown"]:
        if self.reasons:
            return "refuses"
        return "unknown" if self.unknown else "loads"

    @property
    def loads(self) -> bool:
        return self.outcome == "loads"

    @property
    def refuses(self) -> bool:
        return self.outcome == "refuses"

    @property
    def title(self) -> str:
        """ "vLLM will not load it", with the tensor-parallel size where that is not 1."""
        at = f" at tensor-parallel size {self.tp}" if self.tp > 1 else ""
        name = NAMES[self.engine]
        if self.outcome == "unknown":
            return f"Whether {name} loads it{at} is unknown"
        return f"{name} {'loads it' if self.loads else 'will not load it'}{at}"

    def to_json(self) -> dict[str, Any]:
        """The verdict as plain JSON values; `loads` is null where that is unknown."""
        return {
            "engine": self.engine,
            "tp": self.tp,
            "verdict": self.outcome,
            "loads": None if self.outcome == "unknown" else self.loads,
            "unknown": self.unknown or None,
            "expert_parallel": self.spread,
            "reasons": [
                {"code": r.code, "message": r.text, "fix": r.fix, "where": r.where}
                for r in self.reasons
            ],
            "notes": list(self.caveats),
            "rules_of": self.version,
            "minimum_version": self.minimum_version,
            "environment": dict(self.environment),
        }


def judge(
    candidate: Loadable, names: Sequence[str], sizes: Sequence[int], gpu: Gpu | None = None
) -> list[Verdict]:
    """A verdict for every engine × tensor-parallel size; the work on names is done once an engine.

    A group size that is advised suits all of them. Raises InputError (`request.engine`) for an
    engine without rules.
    """
    known = [engine_named(name) for name in names]
    found = [verdict for engine in known for verdict in _judge(engine, candidate, sizes, gpu)]
    if not any(reason.code in _ABOUT_GROUPS for v in found for reason in v.reasons):
        return found
    size = _common_group(known, candidate, sizes)
    return found if size is None else [_advising(verdict, size) for verdict in found]


_ABOUT_GROUPS = ("engine.tp_group", "engine.group_size")
_GROUPS = (256, 128, 64, 32, 16)


def _common_group(
    known: Sequence[EngineRules], candidate: Loadable, sizes: Sequence[int]
) -> int | None:
    """The largest group size that suits every layer, engine and tensor-parallel size; None where
    there is none, or the scheme has a fixed one."""
    schemes = [part.scheme for part in candidate.parts.values() if part.scheme]
    if any(s.weight.group_size and s.weight.scale != "float" for s in schemes):
        return None
    views = []
    for engine in known:
        family = engine.family(candidate.config)
        views.append((engine, family, layers(engine, family, candidate.parts.values())))
    fitting = (
        size
        for size in _GROUPS
        if all(
            group_fits(*view[:2], candidate, view[2], tp, size) for view in views for tp in sizes
        )
    )
    return next(fitting, None)


def _advising(verdict: Verdict, size: int) -> Verdict:
    fix = f"--set group_size={size}"
    reasons = (
        replace(reason, fix=fix) if reason.code in _ABOUT_GROUPS else reason
        for reason in verdict.reasons
    )
    return replace(verdict, reasons=tuple(reasons))


def engine_named(name: str) -> EngineRules:
    """The rules of that engine; InputError with the known ones otherwise."""
    known = engines()
    if name not in known:
        raise InputError(
            f"--engine {name}: no rules are known for it.",
            hint=f"one of {', '.join(known)}",
            code="request.engine",
        )
    return known[name]


def _judge(
    engine: EngineRules, candidate: Loadable, sizes: Iterable[int], gpu: Gpu | None
) -> list[Verdict]:
    family = engine.family(candidate.config)
    built = layers(engine, family, candidate.parts.values())
    unknown = without_rules(engine, family, candidate)
    always = [
        *check_format(engine, candidate, gpu),
        *check_gpu(engine, candidate, gpu),
        *check_architecture(engine, family, candidate),
    ]
    if engine.formats.get(candidate.layout) is not None:
        always += check_schemes(engine, family, candidate, built, gpu)
        if not unknown:
            always += check_names(engine, family, candidate, built)
    if not unknown:
        always += check_scale_names(engine, family, candidate, built)
    warned = list(cautions(engine, candidate, gpu))
    notes = tuple(serving_notes(engine, candidate, built, gpu))
    oldest = minimum_version(engine, candidate, built, gpu)
    variables = environment(engine, candidate, built, gpu)
    verdicts = []
    for tp in sizes:
        found, spread = always, None
        if not unknown:
            heads = [*always, *check_heads(engine, candidate.config, tp)]
            found = [*heads, *check_shapes(engine, family, candidate, built, tp)]
            if tp > 1 and any(layer.experts and layer.parts[0].scheme for layer in built):
                whole = [*heads, *check_shapes(engine, family, candidate, built, tp, spread=True)]
                spread = not whole
        verdicts.append(
            Verdict(
                engine.engine,
                tp,
                engine.read,
                tuple(condensed(_with_spread(engine, found, spread))),
                unknown,
                spread,
                notes,
                tuple(condensed(warned)),
                oldest,
                variables,
            )
        )
    return verdicts


def _with_spread(
    engine: EngineRules, found: Iterable[Reason], spread: bool | None
) -> Iterable[Reason]:
    """The reasons, with expert parallelism as a way out where it is one."""
    if not spread:
        return found
    return [
        replace(r, fix=f"{r.fix}; or whole experts a rank: {engine.spread_experts}") for r in found
    ]
