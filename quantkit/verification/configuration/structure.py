"""What may be quantized together: fused groups and experts of one scheme, routers in 16 bit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from quantkit.checkpoint.network.modules import expert_groups, fused_groups
from quantkit.checkpoint.schemes import Scheme, described
from quantkit.checkpoint.tensors import read_tensor, same_bytes
from quantkit.formats.quantized import QuantizedCheckpoint
from quantkit.verification.findings import Finding, error, info, warning


def check_structure(subject: QuantizedCheckpoint, broken: set[str]) -> list[Finding]:
    """Findings on kinds of modules, fused groups and experts; `broken` layers are not read."""
    linear = [
        m.name for m in subject.modules.values() if m.kind in ("linear", "experts", "tower", "mtp")
        and len(m.shape) >= 2
    ]  # fmt: skip
    groups = fused_groups(linear)
    quantized = subject.declaration.layers.keys() - broken
    return [
        *_check_kinds(subject),
        *_check_groups(subject, groups),
        *_check_experts(subject, linear),
        *_check_fp4_globals(subject, groups, quantized),
        *_note_fp8_scales(subject, groups, quantized),
    ]


def _check_kinds(subject: QuantizedCheckpoint) -> Iterator[Finding]:
    by_kind: dict[str, list[str]] = defaultdict(list)
    for name in subject.declaration.layers:
        if name in subject.modules and not subject.is_float(name):
            by_kind[subject.modules[name].kind].append(name)
    for name in by_kind["router"]:
        yield error(
            "structure.router_quantized",
            f"the router {name} is quantized; routing decisions do not survive it and engines "
            "load routers in 16 bit",
            "keep routers and gates in 16 bit (ignore: @routers)",
            name,
        )
    if by_kind["tower"]:
        yield warning(
            "structure.tower_quantized",
            f"{len(by_kind['tower'])} layers of a vision or audio tower are quantized, "
            f"{by_kind['tower'][0]} among them",
            "measure the model on images or audio before serving it",
            by_kind["tower"][0],
        )
    for kind, what in (("head", "the output head"), ("embedding", "an embedding"),
                       ("mtp", "a multi-token-prediction layer")):  # fmt: skip
        if by_kind[kind]:
            yield info(
                f"structure.{kind}_quantized",
                f"{what} is quantized: {by_kind[kind][0]}",
                "check that the engine supports it",
                by_kind[kind][0],
            )


def _scheme(subject: QuantizedCheckpoint, module: str) -> Scheme | None:
    spec = subject.declaration.layers.get(module)
    return spec.scheme if spec else None


def _check_groups(
    subject: QuantizedCheckpoint, groups: Sequence[tuple[str, ...]]
) -> Iterator[Finding]:
    for members in groups:
        schemes = {member: _scheme(subject, member) for member in members}
        if len(set(schemes.values())) > 1:
            parent = members[0].rpartition(".")[0]
            listed = ", ".join(f"{m.rpartition('.')[2]} {described(s)}" for m, s in schemes.items())
            yield error(
                "structure.mixed_group",
                f"{parent}: {listed}; engines merge these into one layer of one scheme",
                "give the members of a fused group the same scheme",
                parent,
            )


def _check_experts(subject: QuantizedCheckpoint, linear: Sequence[str]) -> Iterator[Finding]:
    for members in expert_groups(linear):
        parent = members[0].partition(".experts.")[0]
        schemes: dict[Scheme | None, str] = {}
        for name in members:
            schemes.setdefault(_scheme(subject, name), name)
        if len(schemes) > 1:
            listed = ", ".join(f"{name} {described(scheme)}" for scheme, name in schemes.items())
            yield error(
                "structure.mixed_experts",
                f"the experts of {parent} have {len(schemes)} schemes: {listed}",
                "give all experts of a layer the same scheme",
                parent,
            )


def _check_fp4_globals(
    subject: QuantizedCheckpoint, groups: Sequence[tuple[str, ...]], quantized: set[str]
) -> Iterator[Finding]:
    roles = {
        "weight": ("global_scale", "global_scale_inverse"),
        "input": ("input_global_scale", "input_global_scale_inverse"),
    }
    for members in groups:
        if not quantized.issuperset(members):
            continue
        for what, names in roles.items():
            infos = [i for m in members if (i := subject.part(m, *names)) is not None]
            if len(infos) < len(members) or all(same_bytes(infos[0], i) for i in infos[1:]):
                continue
            values = {i.name: read_tensor(i).float().flatten().tolist() for i in infos}
            if len(set(map(tuple, values.values()))) > 1:
                parent = members[0].rpartition(".")[0]
                listed = ", ".join(
                    f"{m.rpartition('.')[2]} {v[0]:.6g}"
                    for m, v in zip(members, values.values(), strict=True)
                )
                yield error(
                    "structure.global_scales_differ",
                    f"{parent}: the {what} global scales differ ({listed}); engines use one for "
                    "the merged layer",
                    "quantize again with one global scale a fused group",
                    parent,
                )


def _note_fp8_scales(
    subject: QuantizedCheckpoint, groups: Sequence[tuple[str, ...]], quantized: set[str]
) -> Iterator[Finding]:
    count, worst, where = 0, 1.0, ""
    for members in groups:
        if not quantized.issuperset(members):
            continue
        formats = [subject.declaration.layers[m].scheme.weight for m in members]
        if any(f.element != "fp8_e4m3" or f.granularity != "tensor" for f in formats):
            continue
        infos = [i for m in members if (i := subject.part(m, "scale")) is not None]
        if any(i.elements != 1 for i in infos):
            continue
        scales = [abs(float(read_tensor(i).float())) for i in infos]
        if len(set(scales)) > 1 and min(scales) > 0:
            count += 1
            if max(scales) / min(scales) > worst:
                worst, where = max(scales) / min(scales), members[0].rpartition(".")[0]
    if count:
        yield info(
            "structure.fp8_scales_differ",
            f"{count} fused groups have unequal FP8 weight scales, at most {worst:.2f} × apart "
            f"({where}); legal, engines requantize the merged layer to the largest",
            "nothing to do",
            where,
        )
