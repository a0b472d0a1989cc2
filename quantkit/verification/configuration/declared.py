"""Declared ⇔ present: every declared layer has its tensors, and no other module has any."""

from __future__ import annotations

from collections.abc import Iterator

from quantkit.checkpoint.schemes import Scheme
from quantkit.formats.quantized import FLOAT_DTYPES, QuantizedCheckpoint
from quantkit.verification.findings import Finding, error, warning

_EXPORT_AGAIN = "export the checkpoint again; do not edit its config by hand"


def check_declared(subject: QuantizedCheckpoint) -> tuple[list[Finding], set[str]]:
    """Findings, and the declared layers whose tensors are too broken to read."""
    findings = [
        Finding(p.code, p.severity, p.message, p.hint) for p in subject.declaration.problems
    ]
    findings += _check_pairs(subject)
    broken: set[str] = set()
    for module in subject.declaration.layers:
        wrong = list(_check_layer(subject, module))
        if wrong:
            broken.add(module)
            findings += wrong
    for module in subject.parts.keys() - subject.declaration.layers.keys():
        findings += _check_kept(subject, module)
    findings += _check_ignore_entries(subject, findings)
    return findings, broken


def _check_pairs(subject: QuantizedCheckpoint) -> Iterator[Finding]:
    """Activations that no kernel multiplies with the declared weights: an edited config.

    FP4 weights with two-level scales go with such activations or 16 bit; MX weights with MX or
    dynamic FP8 activations; integers stored as such with integers.
    """
    seen: set[Scheme] = set()
    for module, spec in subject.declaration.layers.items():
        scheme = spec.scheme
        if scheme in seen or scheme.input is None:
            continue
        seen.add(scheme)
        weight, given = scheme.weight, scheme.input
        if weight.scale == "e4m3" and weight.group_size == 16:
            fits = (given.element, given.scale, given.group_size) == ("fp4_e2m1", "e4m3", 16)
        elif weight.scale == "e8m0":
            fits = given.scale == "e8m0" or (given.element == "fp8_e4m3" and given.dynamic)
        elif spec.packing == "int-quantized":
            fits = given.is_int
        else:
            continue
        if not fits:
            yield error(
                "declared.scheme_pair",
                f"{module} declares {weight.element} weights (scales {weight.scale}) with "
                f"{given.element} activations (scales {given.scale}, group {given.group_size}); no "
                "kernel multiplies these",
                _EXPORT_AGAIN,
                module,
            )


def _check_layer(subject: QuantizedCheckpoint, module: str) -> Iterator[Finding]:
    spec = subject.declaration.layers[module]
    parts, roles = subject.parts.get(module, {}), subject.expected[module]
    if subject.is_float(module):
        yield error(
            "declared.not_quantized",
            f"{module} is declared {spec.scheme.name} and holds a {parts['weight'].dtype} weight",
            "name it in the ignore list, or quantize it; engines refuse or misread it as it is",
            module,
        )
        return
    for suffix, tensor in roles.items():
        info = parts.get(suffix)
        if info is None:
            if tensor.required:
                yield error(
                    "declared.missing_tensor",
                    f"{module} is declared {spec.scheme.name} and has no {suffix}",
                    _EXPORT_AGAIN,
                    module,
                )
        elif info.dtype not in tensor.dtypes:
            yield error(
                "declared.wrong_dtype",
                f"{info.name} is {info.dtype}; {spec.scheme.name} needs "
                f"{' or '.join(tensor.dtypes)}",
                _EXPORT_AGAIN,
                info.name,
            )
        elif info.shape not in tensor.shapes:
            shapes = " or ".join(str(list(shape)) for shape in tensor.shapes)
            yield error(
                "declared.wrong_shape",
                f"{info.name} has shape {list(info.shape)}; {spec.scheme.name} on "
                f"{list(spec.shape)} needs {shapes}",
                _EXPORT_AGAIN,
                info.name,
            )
    for suffix in sorted((parts.keys() & subject.layout.quant_suffixes()) - roles.keys()):
        yield error(
            "declared.unexpected_tensor",
            f"{parts[suffix].name} exists; a {spec.scheme.name} layer has no {suffix}",
            _EXPORT_AGAIN,
            parts[suffix].name,
        )


def _check_kept(subject: QuantizedCheckpoint, module: str) -> Iterator[Finding]:
    parts = subject.parts[module]
    entry = subject.declaration.ignored.get(module)
    why = f"kept in 16 bit by the ignore entry {entry!r}" if entry else "not declared quantized"
    extra = sorted(parts.keys() & subject.layout.quant_suffixes())
    if extra:
        yield error(
            "declared.unexpected_scales",
            f"{module} is {why} and has {', '.join(extra)}",
            "remove it from the ignore list, or store its 16-bit weight without these",
            module,
        )
    weight = parts.get("weight")
    if weight is not None and len(weight.shape) >= 2 and weight.dtype not in FLOAT_DTYPES:
        yield error(
            "declared.unexpected_codes",
            f"{module} is {why} and its weight is {weight.dtype}",
            "remove it from the ignore list, or store its 16-bit weight",
            module,
        )


def _check_ignore_entries(
    subject: QuantizedCheckpoint, findings: list[Finding]
) -> Iterator[Finding]:
    """An entry that names nothing is idle, unless a 16-bit layer shows what it was meant for."""
    entries = subject.declaration.unmatched
    stranded = [f.where for f in findings if f.code == "declared.not_quantized"]
    if not entries:
        return
    shown = ", ".join(repr(e) for e in entries[:3])
    more = f" and {len(entries) - 3} more" if len(entries) > 3 else ""
    if stranded:
        yield error(
            "ignore.unmatched",
            f"the ignore entries {shown}{more} name no module, while {stranded[0]} "
            f"(and {len(stranded) - 1} more) is in 16 bit and in no entry",
            "write the entries as the checkpoint names its modules",
        )
    else:
        yield warning(
            "ignore.unmatched",
            f"the ignore entries {shown}{more} name no module of the checkpoint",
            "remove them; harmless unless an engine refuses unknown names",
        )
