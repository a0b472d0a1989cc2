"""The plan of a mixture as a library followed it: less what it kept, by the names it wrote."""

from __future__ import annotations

from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path

from quantkit.checkpoint.directory import Checkpoint, open_checkpoint
from quantkit.checkpoint.gguf import gguf_in
from quantkit.checkpoint.network.fused_experts import fused_layer
from quantkit.checkpoint.schemes import Scheme
from quantkit.pipeline.plan import Plan, plan_of_layers


def without(plan: Plan, source: Checkpoint, kept: list[str]) -> Plan:
    """The plan less the layers that the calibration data made the backend keep in 16 bit."""
    if not kept:
        return plan
    why = f"experts of the layer saw fewer than {plan.recipe.expert_floor} calibration tokens"
    layers = {name: scheme for name, scheme in plan.layers.items() if name not in kept}
    reasons = {**plan.kept, **dict.fromkeys(kept, why)}
    fewer = plan_of_layers(source, plan.recipe, layers, reasons, plan.notes)
    return replace(fewer, placed=plan.placed)


def as_written(plan: Plan, out: Path) -> Plan:
    """The plan with the names of the checkpoint in `out`, where fused experts were taken apart."""
    if gguf_in(out) or not any(fused_layer(name) for name in plan.layers):
        return plan
    written = {name.rpartition(".")[0] for name in open_checkpoint(out).tensors}
    layers: dict[str, Scheme] = {}
    for name, scheme in plan.layers.items():
        apart = [] if name in written else _taken_apart(name, written)
        layers |= dict.fromkeys(apart, scheme) if apart else {name: scheme}
    return replace(plan, layers=layers)


def _taken_apart(name: str, written: set[str]) -> list[str]:
    """The layers of single experts that a fused tensor became, [] where it is still one."""
    fused = fused_layer(name)
    if fused is None:
        return []
    experts = takewhile(lambda index: fused.names(index)[0] in written, count())
    return [layer for index in experts for layer in fused.names(index)]
