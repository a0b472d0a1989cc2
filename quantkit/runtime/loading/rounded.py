"""A 16-bit model rounded to nearest while it is read, layer for layer as a checkpoint declares it.

What a format costs without any tuning: the checkpoint's modules, schemes and group sizes, scales
from each weight's own range, NVFP4's global scale shared by what engines fuse. Static activation
scales, which only calibration knows, become those of the tokens at hand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch

from quantkit.backends.streaming.rtn import absolute_maximum, nvfp4_global_scale, quantize_rows
from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.network.modules import fused_groups
from quantkit.checkpoint.schemes import NumberFormat
from quantkit.errors import InputError
from quantkit.formats.base import LayerSpec, QuantWeight
from quantkit.formats.dequantize import decode_e8m0
from quantkit.runtime.linear.kernels import reference
from quantkit.runtime.loading.source import CheckpointReader, wrong_shape
from quantkit.verification.weights.source import SourceModel, SourcePiece

_BLOCK_ELEMENTS = 1 << 20
Expert = tuple[str, int | None]
"""A module, and which of the experts that it holds; None for a layer of its own."""


@dataclass(kw_only=True)
class RoundedReader(CheckpointReader):
    """`checkpoint` is the 16-bit model; `rounded` the layers of another one of `kind`, which is
    where their names come from."""

    rounded: Mapping[str, LayerSpec]
    kind: str
    pieces: Mapping[Expert, Sequence[SourcePiece]]

    @property
    def layout(self) -> str | None:
        return self.kind

    @property
    def layers(self) -> Mapping[str, LayerSpec]:
        return self.rounded

    @property
    def names(self) -> Collection[str]:
        return self._names

    @cached_property
    def _names(self) -> frozenset[str]:
        taken = {piece.info.name for pieces in self.pieces.values() for piece in pieces}
        own = {m if spec.experts else f"{m}.weight" for m, spec in self.rounded.items()}
        return frozenset((self.checkpoint.tensors.keys() - taken) | own)

    def quantized(self, module: str, shape: tuple[int, int], bias: bool) -> QuantWeight:
        spec = self.rounded[module]
        if spec.shape != shape or spec.experts:
            raise wrong_shape(module, spec.shape, shape)
        weight = self._rounded((module, None), spec, self._largest(module))
        held = self.bias(module, shape[0], torch.float32, bias)
        return replace(weight, bias=held)

    def stacked(
        self, module: str, count: int, shape: tuple[int, int], bias: bool
    ) -> Iterator[QuantWeight]:
        spec = self.rounded[module]
        if (spec.experts, spec.shape) != (count, shape):
            raise wrong_shape(module, (spec.experts, *spec.shape), (count, *shape))
        biases = self.plain(f"{module}_bias", (count, shape[0]), torch.float32) if bias else None
        for number in range(count):
            weight = self._rounded((module, number), spec, None)
            yield replace(weight, bias=None if biases is None else biases[number])

    def _rounded(self, expert: Expert, spec: LayerSpec, largest: float | None) -> QuantWeight:
        weight = self._weight_of(expert)
        if tuple(weight.shape) != spec.shape:
            raise wrong_shape(expert[0], tuple(weight.shape), spec.shape)
        return round_weight(weight, spec.scheme.weight, largest)

    def _weight_of(self, expert: Expert) -> torch.Tensor:
        pieces = self.pieces[expert]
        self.used.update(piece.info.name for piece in pieces)
        return SourceModel(self.checkpoint).weight(list(pieces))

    def _largest(self, module: str) -> float | None:
        """The magnitude that sets NVFP4's global scale: of all that engines fuse with a module."""
        if self.rounded[module].scheme.weight.scale != "e4m3":
            return None
        if module not in self._maxima:
            group = self._fused.get(module, (module,))
            most = max(absolute_maximum(self._weight_of((name, None))) for name in group)
            self._maxima |= dict.fromkeys(group, most)
        return self._maxima[module]

    @cached_property
    def _maxima(self) -> dict[str, float]:
        return {}

    @cached_property
    def _fused(self) -> dict[str, tuple[str, ...]]:
        """Module → those that share its global scale."""
        two_level = [m for m, spec in self.rounded.items() if spec.scheme.weight.scale == "e4m3"]
        return {member: group for group in fused_groups(two_level) for member in group}


def open_rounded(base: Checkpoint, like: CheckpointReader) -> RoundedReader:
    """The 16-bit `base` with the layers of `like` rounded.

    Raises InputError (`runtime.rounded`) for a layer that the base does not have.
    """
    source = SourceModel(base)
    pieces: dict[Expert, Sequence[SourcePiece]] = {}
    for module, spec in like.layers.items():
        for number in range(spec.experts) if spec.experts else (None,):
            pieces[module, number] = found = source.parts(module, number)
            if not found or any(source.untold(piece) for piece in found):
                raise InputError(
                    f"{base.path} has no weight that is known to be that of {module}.",
                    hint="--baseline with the model that this checkpoint was made from",
                    code="runtime.rounded",
                )
    layers = {module: without_calibration(spec) for module, spec in like.layers.items()}
    return RoundedReader(
        checkpoint=base, subject=None, rounded=layers, kind=like.layout or "", pieces=pieces
    )


def without_calibration(spec: LayerSpec) -> LayerSpec:
    """The layer with activation scales that are found while it runs."""
    given = spec.scheme.input
    if given is None or given.dynamic:
        return spec
    return replace(spec, scheme=replace(spec.scheme, input=replace(given, dynamic=True)))


def kernels_of(layers: Mapping[str, LayerSpec]) -> list[str]:
    """The kernels that compute such layers without static scales; empty: all of them."""
    inputs = [spec.scheme.input for spec in layers.values() if spec.scheme.input is not None]
    static = any(number.granularity == "tensor" or number.scale == "e4m3" for number in inputs)
    return [reference.NAME] if static else []


def digest(layers: Mapping[str, LayerSpec]) -> str:
    """SHA-256 of which layers are rounded, and how."""
    stated = {
        module: [asdict(spec.scheme), spec.shape, spec.experts] for module, spec in layers.items()
    }
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def round_weight(
    weight: torch.Tensor, number: NumberFormat, largest: float | None = None
) -> QuantWeight:
    """A 16- or 32-bit weight [out, in] rounded to nearest, in blocks of rows.

    `largest` is the magnitude that sets NVFP4's global scale (None: the weight's own).
    """
    rows, columns = weight.shape
    divisor: torch.Tensor | None = None
    if number.scale == "e4m3":
        most = absolute_maximum(weight) if largest is None else largest
        divisor = nvfp4_global_scale(most, weight.dtype)
    if number.granularity == "tensor":
        whole = quantize_rows(weight.reshape(1, -1), number)
        point = whole.zero_point
        return QuantWeight(
            number,
            whole.codes.view(rows, columns),
            whole.scale.float(),
            None if point is None else point.float(),
        )
    size = number.group_size if number.granularity == "group" else None
    padded = torch.nn.functional.pad(weight, (0, -columns % size)) if size else weight
    height = number.block[0] if number.block else 1
    step = max(1, _BLOCK_ELEMENTS // (padded.shape[1] * height)) * height
    parts = [
        quantize_rows(padded[start : start + step].contiguous(), number, global_scale=divisor)
        for start in range(0, rows, step)
    ]
    points = [part.zero_point for part in parts if part.zero_point is not None]
    scale = torch.cat([part.scale for part in parts])
    return QuantWeight(
        number,
        torch.cat([part.codes for part in parts])[:, :columns].contiguous(),
        decode_e8m0(scale) if number.scale == "e8m0" else scale.float(),
        torch.cat(points).float() if points else None,
        None if divisor is None else 1.0 / divisor.double().reshape(()),
    )
