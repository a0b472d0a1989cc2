"""The result against what was asked for: every planned layer quantized so, every kept one not."""

from __future__ import annotations

from collections.abc import Iterator

from quantkit.checkpoint.schemes import SCHEMES, NumberFormat, Scheme
from quantkit.formats.quantized import FLOAT_DTYPES, QuantizedCheckpoint
from quantkit.verification.findings import Finding, PlannedLayers, error

_HINT = "report this with the log; the library did not do what the recipe asked for"


def check_plan(subject: QuantizedCheckpoint, plan: PlannedLayers) -> Iterator[Finding]:
    """Findings where the checkpoint is not what `plan` says (fails closed)."""
    layers = subject.declaration.layers
    for module, wanted in plan.quantized.items():
        spec = layers.get(module)
        if spec is None:
            yield error(
                "plan.not_quantized",
                f"{module} was to be {_name(wanted)} and is not quantized",
                _HINT,
                module,
            )
        elif not _same(spec.scheme, wanted):
            yield error(
                "plan.wrong_scheme",
                f"{module} was to be {_name(wanted)} and is {spec.scheme.described}",
                _HINT,
                module,
            )
    for module in sorted(set(layers) - set(plan.quantized)):
        yield error(
            "plan.quantized_but_kept",
            f"{module} was to stay in 16 bit and is {layers[module].scheme.described}",
            _HINT,
            module,
        )
    for module in sorted(set(plan.kept) - set(layers)):
        weight = subject.parts.get(module, {}).get("weight")
        if weight is not None and weight.dtype not in FLOAT_DTYPES:
            yield error(
                "plan.quantized_but_kept",
                f"{module} was to stay in 16 bit and its weight is {weight.dtype}",
                _HINT,
                module,
            )


def _name(wanted: Scheme | str) -> str:
    return wanted if isinstance(wanted, str) else wanted.described


def _same(found: Scheme, wanted: Scheme | str) -> bool:
    """Equal number formats; a scheme known by its name alone leaves group and symmetry open."""
    if isinstance(wanted, Scheme):
        return (found.weight, found.input) == (wanted.weight, wanted.input)
    named = SCHEMES.get(wanted)
    if named is None:
        return found.name == wanted
    if (found.input is None) != (named.input is None):
        return False
    same_input = (found.input and found.input.element) == (named.input and named.input.element)
    return same_input and _kind(found.weight) == _kind(named.weight)


def _kind(number: NumberFormat) -> tuple[str, str, str]:
    return (number.element, number.granularity, number.scale)
