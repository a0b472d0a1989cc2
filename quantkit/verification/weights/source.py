"""The source model: under which name and in which tensor a module's 16-bit weight lies there."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from quantkit.checkpoint.directory import Checkpoint, TensorInfo
from quantkit.checkpoint.network.expert_layout import input_first
from quantkit.checkpoint.network.families import family
from quantkit.checkpoint.network.fp8_blocks import INVERSE_SCALE, weight_block
from quantkit.checkpoint.network.fused_experts import fused_holders
from quantkit.checkpoint.schemes import NumberFormat
from quantkit.checkpoint.tensors import read_tensor
from quantkit.formats.base import QuantWeight
from quantkit.formats.dequantize import dequantize

if TYPE_CHECKING:
    import torch

_WRAPPERS = frozenset({"model", "language_model"})
_EXPERT_LEAVES = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


@dataclass(frozen=True)
class SourcePiece:
    """A 2-D piece of a source tensor: all of it, or one expert; perhaps stored [in, out].

    `half` is 0 or 1 for the gate or up rows of a fused gate_up_proj; `interleaved` says that they
    alternate.
    """

    info: TensorInfo
    transposed: bool = False
    half: int | None = None
    interleaved: bool = False


@dataclass(frozen=True)
class SourceModel:
    """A source checkpoint in 16 bit, or in DeepSeek's FP8 blocks (`weight_scale_inv`).

    `halves` says that gate and up of an expert are the halves of its fused rows, even where the
    family's alternate.
    """

    checkpoint: Checkpoint
    halves: bool = False

    @property
    def interleaved(self) -> bool:
        """Whether gate and up are every other row of a fused tensor."""
        return family(self.checkpoint.config).experts.interleaved and not self.halves

    @cached_property
    def _by_short_name(self) -> dict[str, str]:
        names: dict[str, list[str]] = defaultdict(list)
        for name in self.checkpoint.tensors:
            names[short_name(name)].append(name)
        return {short: found[0] for short, found in names.items() if len(found) == 1}

    def tensor(self, name: str) -> TensorInfo | None:
        """The source's tensor of that name, wrapper prefixes (`model.`) aside."""
        exact = self.checkpoint.tensors.get(name)
        if exact is not None:
            return exact
        other = self._by_short_name.get(short_name(name))
        return None if other is None else self.checkpoint.tensors[other]

    def parts(self, module: str, expert: int | None = None) -> list[SourcePiece]:
        """The pieces whose rows make up a module's weight; empty when the source lacks it.

        `expert` selects one expert of a fused module. Fused and separate experts are translated
        into each other.
        """
        if expert is None:
            plain = self.tensor(f"{module}.weight")
            flat = plain is not None and len(plain.shape) == 2
            return [SourcePiece(plain)] if plain is not None and flat else self._from_fused(module)
        fused = self._fused(module)
        if fused is not None:
            return [self._slice(fused, expert)]
        parent, _, leaf = module.rpartition(".")
        for leaves in _EXPERT_LEAVES.get(leaf, ()):
            found = [self.tensor(f"{parent}.{expert}.{name}.weight") for name in leaves]
            if all(found):
                return [SourcePiece(info) for info in found if info]
        return []

    def _from_fused(self, module: str) -> list[SourcePiece]:
        number = module.rpartition(".experts.")[2].partition(".")[0]
        for holder, half, halves in fused_holders(module):
            fused = self._fused(holder)
            if fused is not None and int(number) < fused.shape[0]:
                part = self._slice(fused, int(number))
                if halves == 1:
                    return [part]
                return [replace(part, half=half, interleaved=self.interleaved)]
        return []

    def _fused(self, module: str) -> TensorInfo | None:
        found = self.tensor(module) or self.tensor(f"{module}.weight")
        return found if found is not None and len(found.shape) == 3 else None

    def _slice(self, info: TensorInfo, expert: int) -> SourcePiece:
        """One expert of a fused tensor, as it lies where `untold` names the tensor."""
        _, rows, columns = info.shape
        size = info.bytes // info.shape[0]
        start = info.start + expert * size
        one = replace(info, shape=(rows, columns), start=start, end=start + size)
        return SourcePiece(one, transposed=bool(self._input_first(info)))

    def untold(self, part: SourcePiece) -> bool:
        """Whether nothing tells which dimension of a fused tensor is the input."""
        whole = self.checkpoint.tensors[part.info.name]
        return len(whole.shape) == 3 and self._input_first(whole) is None

    def _input_first(self, info: TensorInfo) -> bool | None:
        return input_first(self.checkpoint.shapes, self.checkpoint.config, info.name)

    def weight(self, parts: list[SourcePiece]) -> torch.Tensor:
        """The pieces' rows together, [out, in], in the dtype of the file (dequantized: float32)."""
        import torch

        pieces = [self._read(part) for part in parts]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _read(self, part: SourcePiece) -> torch.Tensor:
        tensor = self.values(part.info)
        if part.transposed:
            tensor = tensor.T
        if part.half is not None:
            rows = tensor.shape[0] // 2
            start = part.half * rows
            chosen = slice(part.half, None, 2) if part.interleaved else slice(start, start + rows)
            tensor = tensor[chosen]
        return tensor.contiguous()

    def values(self, info: TensorInfo) -> torch.Tensor:
        """A tensor's values, FP8 blocks dequantized to float32."""
        scale = self.checkpoint.tensors.get(info.name + INVERSE_SCALE)
        tensor = read_tensor(info)
        if scale is None or info.dtype != "F8_E4M3":
            return tensor
        number = NumberFormat("fp8_e4m3", "block", block=weight_block(self.checkpoint.config))
        return dequantize(QuantWeight(number, tensor, read_tensor(scale).float()))


def short_name(name: str) -> str:
    """A tensor's name without the wrappers that Transformers versions add, drop and reorder."""
    parts = name.split(".")
    start = 0
    while start < len(parts) - 1 and parts[start] in _WRAPPERS:
        start += 1
    return ".".join(parts[start:])
