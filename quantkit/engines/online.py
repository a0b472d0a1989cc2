"""Online methods: what an engine makes of a 16-bit checkpoint while it loads it, by its own flag.

They round to nearest, layer by layer, without calibration; `engines/versions` says how (`online`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from quantkit.checkpoint.schemes import SCHEMES, Scheme
from quantkit.engines.gpus import Gpu
from quantkit.engines.judge import engine_named
from quantkit.engines.rules import OnlineRule
from quantkit.errors import InputError

FLAG = "--quantization"
DEFAULT = "vllm"
"""The engine whose method a bare name is."""


@dataclass(frozen=True)
class Online:
    """One method of one engine; `scheme` is that of its layers, in the engine's own kernels.

    `experts_alone` says that dense layers stay in 16 bit; `capability` is the least that it wants
    of an NVIDIA GPU (compute capability × 10).
    """

    engine: str
    name: str
    scheme: Scheme
    experts_alone: bool
    capability: int = 0

    @property
    def flags(self) -> dict[str, str]:
        """What the server is given for it."""
        return {FLAG: self.name}


def online_named(asked: str, engine: str = "") -> Online:
    """The method `NAME` of the engine, or `ENGINE:NAME`.

    Raises InputError (`online.unknown`, `online.gone`, `online.not_computed`) for a name that is
    none, that no version takes any more, or that no kernel of ours computes.
    """
    of, colon, name = asked.rpartition(":")
    rules = engine_named((of if colon else engine) or DEFAULT)
    for gone, why in rules.online_gone.items():
        if name.startswith(gone):
            raise InputError(
                f"{rules.name} does not quantize by {name}: {why}.",
                hint=f"--against-online {next(iter(rules.online))}",
                code="online.gone",
            )
    rule = rules.online.get(name)
    if rule is None:
        raise InputError(
            f"{rules.name} has no online method {name!r}; it has {', '.join(rules.online)}.",
            hint=f"--against-online {next(iter(rules.online))}",
            code="online.unknown",
        )
    if not rule.scheme:
        raise InputError(
            f"{name} of {rules.name} is not computed here: {rule.note}.",
            hint=f"--against-online {next(iter(rules.online))}",
            code="online.not_computed",
        )
    return Online(rules.engine, name, _scheme(rule), rule.experts_alone, rule.sm)


def refuse_gpu(online: Online, gpu: Gpu | None) -> None:
    """InputError (`online.gpu`) for a GPU that the engine does not run the method on."""
    if gpu is None or gpu.vendor != "nvidia" or gpu.capability >= online.capability:
        return
    rules = engine_named(online.engine)
    able = [name for name, rule in rules.online.items() if rule.sm <= gpu.capability]
    raise InputError(
        f"{rules.name} quantizes by {online.name} from compute capability "
        f"{online.capability / 10:g} on; {gpu.name} has {gpu.capability / 10:g}.",
        hint=f"one of {', '.join(able)}",
        code="online.gpu",
    )


def _scheme(rule: OnlineRule) -> Scheme:
    named = SCHEMES[rule.scheme]
    if not rule.granularity:
        return named
    return replace(named, weight=replace(named.weight, granularity=rule.granularity))
