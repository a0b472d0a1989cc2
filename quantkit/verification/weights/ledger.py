"""The ledger: what became of every tensor of the source, and where every other tensor is from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from quantkit.checkpoint.directory import TensorInfo
from quantkit.checkpoint.network.config import is_tied
from quantkit.checkpoint.network.fp8_blocks import INVERSE_SCALE
from quantkit.checkpoint.tensors import PIECE, read_tensor, same_bytes
from quantkit.formats.base import is_kv_cache_tensor
from quantkit.formats.quantized import FLOAT_DTYPES, QuantizedCheckpoint
from quantkit.verification.findings import Finding, error, info, warning
from quantkit.verification.weights.expert_biases import split_biases, with_halves
from quantkit.verification.weights.source import SourceModel, SourcePiece, short_name

if TYPE_CHECKING:
    import torch

Same = Callable[[TensorInfo, TensorInfo], bool]

_BUFFERS = (
    "rotary_emb.inv_freq",
    "attn.masked_bias",
    "attn.bias",
    "attention.bias",
    "position_ids",
)
"""Names that end so are buffers which newer Transformers versions compute instead of storing."""

_BIASED = frozenset({"linear", "experts", "head", "router", "tower", "mtp"})
"""Kinds of modules to which no quantization method adds a bias; Ascend's may do so to norms."""


@dataclass
class Ledger:
    """`states` maps every source tensor, and every added one, to its state.

    `altered` are kept tensors of ours whose bytes differ, with the source's; a fold may explain
    them. `parts` are the pieces of the source that each declared layer (and expert) stands for.
    """

    states: dict[str, str] = field(default_factory=dict)
    altered: dict[str, tuple[TensorInfo, TensorInfo]] = field(default_factory=dict)
    parts: dict[tuple[str, int | None], list[SourcePiece]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def make_ledger(
    subject: QuantizedCheckpoint, source: SourceModel, same: Same = same_bytes
) -> Ledger:
    """Account for every tensor of both checkpoints; `same` compares the kept ones."""
    ledger = Ledger()
    source = with_halves(subject, source)
    if source.halves:
        ledger.findings.append(
            warning(
                "ledger.halved_rows",
                "gate_proj and up_proj of the experts hold the first and the second half of rows "
                "that alternate in the source, as Defuser splits them",
                "serve it with GPTQModel, which joins them again; to others they are no gate and "
                "no up projection",
            )
        )
    _quantized(ledger, subject, source)
    matched = _split_biases(ledger, subject, source)
    matched |= _kept(ledger, subject, source, same)
    _added(ledger, subject, matched)
    return ledger


def _quantized(ledger: Ledger, subject: QuantizedCheckpoint, source: SourceModel) -> None:
    orphans, untold = [], set[str]()
    for module, spec in subject.declaration.layers.items():
        for expert in range(spec.experts) if spec.experts else (None,):
            parts = source.parts(module, expert)
            if not parts:
                orphans.append(module)
            for part in parts:
                ledger.states[part.info.name] = "quantized"
            sideways = {part.info.name for part in parts if source.untold(part)}
            untold |= sideways
            ledger.parts[module, expert] = [] if sideways else parts
    for name in source.checkpoint.tensors:
        if name.endswith(INVERSE_SCALE):
            ledger.states[name] = "dequantized"
    if untold:
        ledger.findings.append(
            warning(
                "ledger.orientation",
                f"{len(untold)} fused expert tensors of the source do not show which dimension is "
                f"the input, {min(untold)} among them; layers from them are not compared",
                "validate the model on texts before serving it",
                min(untold),
            )
        )
    if orphans:
        ledger.findings.append(
            error(
                "ledger.unknown",
                f"{len(orphans)} quantized layers are not in the source, {orphans[0]} among them",
                "name the source that this checkpoint was made from",
                orphans[0],
            )
        )


def _split_biases(ledger: Ledger, subject: QuantizedCheckpoint, source: SourceModel) -> set[str]:
    """Compare biases that the source holds for all experts in one; the names of ours."""
    matched: set[str] = set()
    for bias in split_biases(subject, source):
        matched.update(bias.names)
        ledger.states[bias.source] = "altered" if bias.different else "kept"
        if bias.different:
            ledger.findings.append(
                error(
                    "ledger.altered",
                    f"{bias.different[0]} should be as in the source: its part of {bias.source} "
                    f"has other values (so have {len(bias.different) - 1} more)",
                    "copy the biases from the source",
                    bias.different[0],
                )
            )
    return matched


def _kept(
    ledger: Ledger, subject: QuantizedCheckpoint, source: SourceModel, same: Same
) -> set[str]:
    """Compare what was not quantized; the names of ours that have a twin in the source."""
    ours = subject.checkpoint.tensors
    by_short = {short_name(name): name for name in ours}
    matched: set[str] = set()
    casts: dict[str, list[str]] = defaultdict(list)
    renamed: list[str] = []
    missing: list[str] = []
    for name, theirs in source.checkpoint.tensors.items():
        if name in ledger.states:
            continue
        own_name = name if name in ours else by_short.get(short_name(name))
        if own_name is None or own_name in subject.owned:
            ledger.states[name] = _absent(subject, source, name)
            missing += [name] if ledger.states[name] == "missing" else []
            continue
        matched.add(own_name)
        renamed += [] if own_name == name else [own_name]
        mine = ours[own_name]
        if name + INVERSE_SCALE in source.checkpoint.tensors:
            equal = _same_values(mine, source.values(theirs))
            ledger.states[name] = "dequantized" if equal else "altered"
            if not equal:
                ledger.altered[own_name] = (mine, theirs)
        elif same(mine, theirs):
            ledger.states[name] = "kept"
        elif _is_cast(mine, theirs):
            ledger.states[name] = "cast"
            casts[f"{theirs.dtype} → {mine.dtype}"].append(own_name)
        else:
            ledger.states[name] = "altered"
            ledger.altered[own_name] = (mine, theirs)
    _report(ledger, missing, renamed, casts)
    return matched


def _absent(subject: QuantizedCheckpoint, source: SourceModel, name: str) -> str:
    """Why a source tensor may be absent: a tied head, or a buffer; else it is missing."""
    if name.endswith(_BUFFERS):
        return "buffer"
    theirs = source.checkpoint.tensors[name]
    tied = is_tied(subject.checkpoint.config) and is_tied(source.checkpoint.config)
    if tied and name.endswith((".weight", "output")):
        twins = (
            other
            for other in source.checkpoint.tensors.values()
            if other.name != name and other.shape == theirs.shape and "embed" in other.name
        )
        if any(same_bytes(theirs, twin) for twin in twins):
            return "tied"
    return "missing"


def _report(
    ledger: Ledger,
    missing: list[str],
    renamed: list[str],
    casts: Mapping[str, list[str]],
) -> None:
    if missing:
        layers = len({name.rpartition(".")[0] for name in missing})
        ledger.findings.append(
            error(
                "ledger.missing",
                f"{len(missing)} tensors of the source ({layers} modules) are in no shard: "
                f"{', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}",
                "export the checkpoint again with them; engines leave such weights at random",
                missing[0],
            )
        )
    if renamed:
        ledger.findings.append(
            info(
                "ledger.renamed",
                f"{len(renamed)} tensors have another prefix than in the source "
                f"({renamed[0]}), as another Transformers version writes it",
                "check the names in the ignore list against the engine's",
                renamed[0],
            )
        )
    for change, names in casts.items():
        ledger.findings.append(
            warning(
                "ledger.cast",
                f"{len(names)} kept tensors were cast {change}, values otherwise as in the source",
                "export in the source's dtype to keep them bit-identical",
                names[0],
            )
        )


def _is_cast(mine: TensorInfo, theirs: TensorInfo) -> bool:
    """Whether our values are the source's, rounded to another floating-point dtype."""
    import torch

    different = mine.dtype != theirs.dtype and {mine.dtype, theirs.dtype} <= FLOAT_DTYPES
    if not different or mine.shape != theirs.shape:
        return False
    for own, other in zip(row_blocks(mine), row_blocks(theirs), strict=True):
        target = read_tensor(own)
        if not torch.equal(target, read_tensor(other).to(target.dtype)):
            return False
    return True


def _same_values(mine: TensorInfo, values: torch.Tensor) -> bool:
    """Whether our tensor holds `values`, rounded to its dtype."""
    import torch

    target = read_tensor(mine)
    return target.shape == values.shape and torch.equal(target, values.to(target.dtype))


def row_blocks(info: TensorInfo) -> list[TensorInfo]:
    """A tensor as slices of its first dimension, each of a few MiB at most."""
    if not info.shape or not info.elements:
        return [info]
    rows, size = info.shape[0], info.bytes // info.shape[0]
    step = max(1, 4 * PIECE * 8 // max(1, info.elements // rows * 64))
    return [
        replace(
            info,
            shape=(min(step, rows - at), *info.shape[1:]),
            start=info.start + at * size,
            end=info.start + min(at + step, rows) * size,
        )
        for at in range(0, rows, step)
    ]


def _added(ledger: Ledger, subject: QuantizedCheckpoint, matched: set[str]) -> None:
    """Tensors of ours that the source lacks."""
    tied = is_tied(subject.checkpoint.config)
    unknown: list[str] = []
    biases: list[str] = []
    odd: list[str] = []
    for name, mine in subject.checkpoint.tensors.items():
        if name in matched or name in subject.owned:
            continue
        module = name.rpartition(".")[0]
        kind = subject.modules[module].kind if module in subject.modules else "other"
        if tied and kind == "head":
            ledger.states[name] = "tied"
            continue
        ledger.states[name] = "added"
        if is_kv_cache_tensor(name) or (name.endswith(".bias") and _all_zero(mine)):
            continue
        if name.endswith(".bias") and kind in _BIASED:
            biases.append(name)
        else:
            (unknown if name.endswith(".weight") and len(mine.shape) > 1 else odd).append(name)
    if biases:
        ledger.findings.append(
            error(
                "ledger.added_bias",
                f"{len(biases)} linear layers have a bias that is not zero and that the source "
                f"lacks: {', '.join(biases[:4])}{' …' if len(biases) > 4 else ''}",
                "remove them: no method adds a bias to a layer without one",
                biases[0],
            )
        )
    for names, make in ((unknown, error), (odd, warning)):
        if names:
            ledger.findings.append(
                make(
                    "ledger.unknown",
                    f"{len(names)} tensors are not in the source: {', '.join(names[:4])}"
                    f"{' …' if len(names) > 4 else ''}",
                    "name the source that this checkpoint was made from, or remove them",
                    names[0],
                )
            )


def _all_zero(info: TensorInfo) -> bool:
    return not bool(read_tensor(info).float().any())
