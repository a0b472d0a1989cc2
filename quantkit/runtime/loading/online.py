"""16-bit layers rounded to nearest as they are read, as an engine's online method does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantkit.backends.streaming.rtn import quantize_rows
from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.network.modules import classify, linear_modules
from quantkit.checkpoint.schemes import Scheme
from quantkit.engines.online import Online
from quantkit.errors import InputError
from quantkit.formats.base import LayerSpec, QuantWeight
from quantkit.formats.dequantize import decode_e8m0
from quantkit.runtime.linear.activations import FP8_MAX

LAYOUT = "compressed-tensors"
"""By whose rules the engine's kernels for such layers are known."""


@dataclass(frozen=True)
class OnlineLayers:
    """The layers of a 16-bit checkpoint that a method rounds, by name, and their scheme."""

    scheme: Scheme
    names: frozenset[str]

    @classmethod
    def of(cls, checkpoint: Checkpoint, online: Online) -> OnlineLayers:
        """Linear layers and experts, as the engine has them: no head, router or tower.

        Raises InputError (`online.nothing`) where the method is of experts and there are none.
        """
        modules = linear_modules(classify(checkpoint.shapes, checkpoint.config))
        kinds = ("experts",) if online.experts_alone else ("linear", "experts")
        names = frozenset(
            module.name
            for module in modules
            if module.kind in kinds or (online.experts_alone and ".experts." in module.name)
        )
        if not names:
            raise InputError(
                f"{online.name} rounds experts, of which {checkpoint.path} has none.",
                hint="--against-online fp8",
                code="online.nothing",
            )
        return cls(online.scheme, names)

    def cover(self, names: Sequence[str]) -> bool:
        """Whether all these layers are rounded; they are one layer of the engine."""
        return all(name in self.names for name in names)

    def spec(self, shape: tuple[int, int]) -> LayerSpec:
        """How such a layer would be declared."""
        return LayerSpec(self.scheme, "", shape)

    def rounded(self, name: str, weight: torch.Tensor) -> QuantWeight:
        """Codes and scales of a weight [out, in], scales in float32.

        Raises InputError (`online.group`) where the groups do not divide its inputs.
        """
        number, columns = self.scheme.weight, weight.shape[1]
        if number.group_size and columns % number.group_size:
            raise InputError(
                f"{name} has {columns} inputs, which groups of {number.group_size} do not divide.",
                hint="--against-online fp8",
                code="online.group",
            )
        values = weight.float()
        if number.granularity == "tensor":
            scale = (values.abs().amax() / FP8_MAX).reshape(1, 1)
            codes = (values * (1 / scale)).clamp_(-FP8_MAX, FP8_MAX)
            return QuantWeight(number, codes.to(torch.float8_e4m3fn), scale)
        rows = quantize_rows(values, number)
        scale = decode_e8m0(rows.scale) if number.scale == "e8m0" else rows.scale.float()
        return QuantWeight(number, rows.codes, scale)
