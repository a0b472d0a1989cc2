"""From a checkpoint and its plan to independent shard tasks: which file will hold which tensors.

Only headers are read: names, dtypes, shapes and places of every output tensor are known before the
first weight is. Each source shard becomes one output file (more where it would pass the shard
size), so a task reads one source file, and FP4 global scales of layers that engines fuse.

Fused 3-D expert tensors come out as one 2-D layer an expert (`experts.3.gate_proj`), the names that
compressed-tensors and the engines use for quantized experts; their biases are dealt out alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from quantkit.backends.streaming.encode import declared, refusal
from quantkit.backends.streaming.job import (
    Layout,
    Outputs,
    Piece,
    ShardTask,
    Slice,
    Work,
    entry_bytes,
)
from quantkit.checkpoint.directory import Checkpoint, TensorInfo
from quantkit.checkpoint.network.expert_layout import stored_transposed, unknown_experts
from quantkit.checkpoint.network.families import family
from quantkit.checkpoint.network.fp8_blocks import INVERSE_SCALE, weight_block
from quantkit.checkpoint.network.fused_experts import fused_layer
from quantkit.checkpoint.network.modules import fused_groups
from quantkit.checkpoint.schemes import Scheme
from quantkit.errors import InputError

FLOATS = ("BF16", "F16", "F32")
SCALES = (*FLOATS, "F8_E8M0")
_BIAS = "_bias"
"""What a fused expert tensor's biases have after its name."""


def plan_shards(
    checkpoint: Checkpoint, layers: Mapping[str, Scheme], layout: Layout, shard_size: int
) -> list[ShardTask]:
    """The output files in order; layers not in `layers` are copied.

    Raises InputError for layers whose shape or dtype the scheme cannot hold, for tensors that share
    bytes of a file, and for two outputs of one name.
    """
    _refuse_scales(checkpoint)
    slices = {module: _slices(checkpoint, module) for module in layers}
    _refuse_misfits(slices, layers, layout)
    shared = _shared_slices(slices, layers)
    by_tensor = {next(iter(parts.values())).tensor.name: module for module, parts in slices.items()}
    biases = {f"{name}{_BIAS}": slices[module] for name, module in by_tensor.items()}
    works = []
    for tensor in sorted(checkpoint.tensors.values(), key=lambda info: (info.file, info.start)):
        if _is_inverse_scale(tensor.name, checkpoint):
            continue
        module = by_tensor.get(tensor.name)
        if tensor.name in biases:
            works.append(_dealt_out(tensor, biases[tensor.name]))
        elif module is None:
            works.append(_copy(tensor, checkpoint))
        else:
            pieces = tuple(
                Piece(module, name, layers[module], part, shared.get(name, ()))
                for name, part in slices[module].items()
            )
            works.append(Work(tensor, pieces, None, _outputs(pieces, layout)))
    return _divide(works, shard_size)


def tensor_of(checkpoint: Checkpoint, module: str) -> TensorInfo:
    """The weight of a module of the plan: `module.weight`, or a fused expert tensor."""
    info = checkpoint.tensors.get(f"{module}.weight") or checkpoint.tensors.get(module)
    assert info is not None, f"the plan names {module}, which has no weight"
    return info


def _slices(checkpoint: Checkpoint, module: str) -> dict[str, Slice]:
    """Output module → its slice of the module's tensor, in the tensor's order."""
    tensor = tensor_of(checkpoint, module)
    if len(tensor.shape) == 2:
        rows, columns = tensor.shape
        scale = checkpoint.tensors.get(tensor.name + INVERSE_SCALE)
        block = weight_block(checkpoint.config)
        return {module: Slice(tensor, 0, rows, columns, scale=scale, block=block)}
    biased = family(checkpoint.config).experts.biased
    if f"{tensor.name}{_BIAS}" in checkpoint.tensors and not biased:
        raise unknown_experts(tensor, "comes with a bias, as experts with interleaved rows do")
    return dict(_expert_slices(tensor, module, checkpoint))


def _expert_slices(
    tensor: TensorInfo, module: str, checkpoint: Checkpoint
) -> Iterator[tuple[str, Slice]]:
    fused = fused_layer(module)
    assert fused is not None, module
    parts = len(fused.leaves)
    experts, height, width = tensor.shape
    transposed = stored_transposed(tensor, checkpoint)
    outputs, inputs = (width, height) if transposed else (height, width)
    rows = outputs // parts
    mixed = parts > 1 and family(checkpoint.config).experts.interleaved
    if mixed and not transposed:
        raise unknown_experts(tensor, "holds gate and up in alternating rows, outputs first")
    for expert in range(experts):
        for index, name in enumerate(fused.names(expert)):
            first, step = (index, parts) if mixed else (index * rows, 1)
            yield name, Slice(tensor, first, rows, inputs, expert, transposed, step=step)


def _dealt_out(bias: TensorInfo, slices: Mapping[str, Slice]) -> Work:
    """The bias [experts, out] of a fused tensor, to the layers of its experts."""
    outputs = {f"{name}.bias": (bias.dtype, (part.rows,)) for name, part in slices.items()}
    return Work(bias, (), None, outputs, {f"{name}.bias": p for name, p in slices.items()})


def _shared_slices(
    slices: Mapping[str, Mapping[str, Slice]], layers: Mapping[str, Scheme]
) -> dict[str, tuple[Slice, ...]]:
    """Output module → the slices whose largest weight sets its FP4 global scale."""
    scaled = {
        name: part
        for module, parts in slices.items()
        if layers[module].weight.scale == "e4m3"
        for name, part in parts.items()
    }
    shared: dict[str, tuple[Slice, ...]] = {name: (part,) for name, part in scaled.items()}
    for group in fused_groups(scaled):
        members = tuple(scaled[name] for name in group)
        shared.update(dict.fromkeys(group, members))
    return shared


def _copy(tensor: TensorInfo, checkpoint: Checkpoint) -> Work:
    scale = checkpoint.tensors.get(tensor.name + INVERSE_SCALE)
    if scale is None:
        return Work(tensor, (), None, {tensor.name: (tensor.dtype, tensor.shape)})
    rows, columns = tensor.shape
    block = weight_block(checkpoint.config)
    whole = Slice(tensor, 0, rows, columns, scale=scale, block=block)
    return Work(tensor, (), whole, {tensor.name: ("BF16", tensor.shape)})


def _outputs(pieces: tuple[Piece, ...], layout: Layout) -> Outputs:
    found = {}
    for piece in pieces:
        source = piece.source
        dtype = "BF16" if source.scale else source.tensor.dtype
        entries = declared(piece.scheme, layout, (source.rows, source.columns), dtype)
        found.update({f"{piece.module}.{suffix}": entry for suffix, entry in entries.items()})
    return found


def _divide(works: list[Work], shard_size: int) -> list[ShardTask]:
    shards: list[list[Work]] = []
    filled, file = 0, None
    for work in works:
        size = sum(entry_bytes(*entry) for entry in work.outputs.values())
        if work.tensor.file != file or filled + size > shard_size:
            shards.append([])
            filled, file = 0, work.tensor.file
        shards[-1].append(work)
        filled += size
    _refuse_duplicates(works)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    return [ShardTask(name, tuple(shard)) for name, shard in zip(names, shards, strict=True)]


def _is_inverse_scale(name: str, checkpoint: Checkpoint) -> bool:
    return name.endswith(INVERSE_SCALE) and name.removesuffix(INVERSE_SCALE) in checkpoint.tensors


def _refuse_misfits(
    slices: Mapping[str, Mapping[str, Slice]], layers: Mapping[str, Scheme], layout: Layout
) -> None:
    reasons, misfits, fits = [], set(), True
    for module, parts in slices.items():
        part = next(iter(parts.values()))
        dtype = part.tensor.dtype
        reason = refusal(layers[module], layout, (part.rows, part.columns))
        if dtype not in FLOATS and not (dtype == "F8_E4M3" and part.scale):
            reason, fits = f"its weight is {dtype} without scales that fit", False
        if reason:
            misfits.add(module)
            reasons.append(f"{module} {list(part.tensor.shape)}: {reason}")
    if reasons:
        more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        merged = [name for group in fused_groups(slices) if misfits & {*group} for name in group]
        leaves = sorted({name.rpartition(".")[2] for name in misfits.union(merged)})
        ignored = " ".join(f"--set 'ignore+=*.{leaf}'" for leaf in leaves)
        raise InputError(
            f"Layers that the scheme cannot hold: {'; '.join(reasons[:3])}{more}.",
            hint=f"keep them in 16 bit: {ignored}"
            if fits
            else "give the 16-bit original, or FP8 blocks in DeepSeek's layout as it is published",
            code="stream.misfit",
        )


def _refuse_scales(checkpoint: Checkpoint) -> None:
    """Refuse inverse scales that are not a grid of square blocks over their FP8 matrix."""
    high, wide = weight_block(checkpoint.config)
    for name, scale in checkpoint.tensors.items():
        if not _is_inverse_scale(name, checkpoint):
            continue
        tensor = checkpoint.tensors[name.removesuffix(INVERSE_SCALE)]
        grid = (-(-tensor.shape[0] // high), -(-tensor.shape[-1] // wide)) if tensor.shape else ()
        if tensor.dtype != "F8_E4M3" or len(tensor.shape) != 2 or scale.shape != grid:
            raise InputError(
                f"{name} {list(scale.shape)} does not fit {tensor.name} {list(tensor.shape)} "
                f"({tensor.dtype}) in blocks of {high} × {wide}.",
                hint="FP8 sources are read in DeepSeek's layout: 2-D F8_E4M3, a scale a block",
                code="stream.block_scales",
            )
        if scale.dtype not in SCALES:
            raise InputError(
                f"{name} is stored as {scale.dtype}, which is not read as block scales.",
                hint=f"scales may be {', '.join(SCALES)}",
                code="stream.block_scales",
            )


def _refuse_duplicates(works: list[Work]) -> None:
    owner: dict[str, str] = {}
    for work in works:
        for name in work.outputs:
            if name in owner:
                raise InputError(
                    f"Both {owner[name]} and {work.tensor.name} would be written as {name}.",
                    hint="remove one of them from the source",
                    code="stream.duplicate_name",
                )
            owner[name] = work.tensor.name
