"""The capability table: method × engine × generation of GPU, from the engines' rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from quantkit.engines.gpus import Gpu, generations, platforms
from quantkit.engines.loadable import BY_ALGORITHM
from quantkit.engines.rules import EngineRules, FormatRule, SchemeRule, Served, engines

Runs = Literal["native", "yes", "weight-only", "no"]


@dataclass(frozen=True)
class Capability:
    """How an engine runs a format on a generation: `native` on its own instructions, `yes` where
    there is only one way, `weight-only` with 16-bit matrix products, or not."""

    engine: str
    generation: str
    runs: Runs
    experts: bool


def capabilities(
    layout: str, algorithm: str, scheme: str, only: Gpu | None = None
) -> list[Capability]:
    """Every engine × generation for one method's format; `only` leaves one device."""
    key = algorithm if layout in BY_ALGORITHM else scheme
    return [
        Capability(name, generation, runs, bool(rule and rule.moe) and runs != "no")
        for name, engine in engines().items()
        for generation, gpu in _devices(only)
        for rule in [_rule(engine, layout, key)]
        for runs in [_runs(engine.formats.get(layout), rule, gpu)]
    ]


def runs_on(engine: str, layout: str, algorithm: str, scheme: str, gpu: Gpu) -> Runs:
    """How one engine runs a layout's format on one GPU."""
    rules = engines()[engine]
    key = algorithm if layout in BY_ALGORITHM else scheme
    return _runs(rules.formats.get(layout), _rule(rules, layout, key), gpu)


def served_on(engine: str, layout: str, algorithm: str, scheme: str, gpu: Gpu) -> Served | None:
    """What one engine's kernels on one GPU make of a format, None where it is computed as it is."""
    rule = _rule(engines()[engine], layout, algorithm if layout in BY_ALGORITHM else scheme)
    return rule.served.get(gpu.capability) if rule and gpu.vendor == "nvidia" else None


def gemm_order(gpu: Gpu) -> dict[str, list[str]]:
    """SGLang's flag → the backends that its `auto` tries on this device, in order."""
    here: Any = gpu.capability if gpu.vendor == "nvidia" else gpu.vendor
    found = {}
    for flag, entry in platforms()["sglang_gemm"].items():
        backends = entry["backends"]
        order = [name for name in entry["auto"] if here in backends[name]["runs_on"]]
        first = entry.get("first", {}).get(here)
        always = entry.get("always", {}).get(here)
        order = [always] if always else [*([first] if first else []), *order]
        found[flag] = [_with_condition(name, backends[name]) for name in order]
    return {flag: order for flag, order in found.items() if order}


def sglang_notes(layout: str, algorithm: str) -> dict[str, str]:
    """What SGLang's documentation says of the method that serves this layout, by vendor."""
    methods = platforms()["sglang_methods"]
    name = {"ascend": "modelslim", "modelopt": "modelopt_fp4" if "FP4" in algorithm else
            "modelopt_fp8"}.get(layout, layout)  # fmt: skip
    return {key: str(value) for key, value in methods.get(name, {}).items()}


def _devices(only: Gpu | None) -> Iterator[tuple[str, Gpu]]:
    for generation, devices in generations().items():
        if only is None or only in devices:
            yield generation, only or devices[0]


def _rule(engine: EngineRules, layout: str, key: str) -> SchemeRule | None:
    found = engine.formats.get(layout)
    return found.schemes.get(key) if found else None


def _runs(layout: FormatRule | None, rule: SchemeRule | None, gpu: Gpu) -> Runs:
    if layout is None or rule is None:
        return "no"
    if gpu.vendor == "amd":
        allowed = layout.amd if rule.amd is None else rule.amd
        able = gpu.key in allowed if isinstance(allowed, tuple) else allowed
        # of a layout with several packings, our methods write GPTQ's
        able = able and (layout.amd_packings is None or "gptq" in layout.amd_packings)
        return "yes" if able else "no"
    if gpu.vendor == "ascend":
        return "yes" if layout.npu and rule.npu is not False else "no"
    if not layout.nvidia or gpu.capability < rule.sm:
        return "no"
    if not rule.native:
        return "yes"
    return "native" if gpu.capability >= rule.native else "weight-only"


def _with_condition(name: str, backend: dict[str, Any]) -> str:
    return f"{name} (if {backend['if']})" if "if" in backend else name
