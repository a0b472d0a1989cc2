"""Linear layers made from a checkpoint: read, fused as engines do, given to a kernel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from quantkit.checkpoint.schemes import Scheme
from quantkit.engines import Gpu
from quantkit.formats.base import LayerSpec, QuantWeight
from quantkit.runtime.linear.description import centred, contiguous_groups, describe
from quantkit.runtime.linear.grouped.select import kernels_of_experts
from quantkit.runtime.linear.kernels.select import Choice, choose
from quantkit.runtime.linear.modules import JoinedLinear, PlainLinear, QuantLinear
from quantkit.runtime.loading.as_served import as_served, rounded_scales
from quantkit.runtime.loading.fuse import Fuse, harmonize, join
from quantkit.runtime.loading.memory import release
from quantkit.runtime.loading.online import LAYOUT, OnlineLayers
from quantkit.runtime.loading.source import CheckpointReader, wrong_shape


@dataclass(frozen=True)
class LayerRecord:
    """How one module of the checkpoint is computed; `refused` is why not by an earlier kernel.

    weights_only: the kernel leaves out the rounding of activations. activations_as_declared: False
    where the engine leaves it out on this GPU, and so does every kernel here. scales_as_declared:
    False where the engine rounds scales on this GPU, and they are rounded here.
    """

    module: str
    scheme: str
    kernel: str
    refused: dict[str, str]
    weights_only: bool
    activations_as_declared: bool = True
    scales_as_declared: bool = True

    @classmethod
    def of(cls, module: str, declared: Scheme, computed: Scheme, choice: Choice) -> LayerRecord:
        refused = dict(choice.refused)
        return cls(
            module, declared.name, choice.kernel.NAME, refused, choice.weights_only,
            (declared.input is None) == (computed.input is None),
            not _rounds_scales(declared, computed),
        )  # fmt: skip


def _rounds_scales(declared: Scheme, computed: Scheme) -> bool:
    both = (declared.input, computed.input)
    return None not in both and declared.input != computed.input


def inputs_left_in_16_bit(records: Iterable[LayerRecord]) -> list[str]:
    """Schemes whose activations stay in 16 bit here because the engine leaves them so."""
    return sorted({one.scheme for one in records if not one.activations_as_declared})


def notes_as_served(records: Sequence[LayerRecord]) -> list[str]:
    """Sentences on what is computed otherwise than declared because the engine does so."""
    notes = []
    if schemes := ", ".join(inputs_left_in_16_bit(records)):
        notes.append(f"activations of {schemes} are in 16 bit, as vLLM leaves them")
    if rounded := sorted({one.scheme for one in records if not one.scales_as_declared}):
        notes.append(
            f"scales of {', '.join(rounded)} are rounded to powers of two, as vLLM's DeepGEMM has "
            "them; VLLM_USE_DEEP_GEMM_E8M0=0 keeps them, here and there"
        )
    return notes


@dataclass
class LayerMaker:
    """Makes layers of one checkpoint on one device; `records` grows with each quantized one.

    `kernels` are the names that may be chosen, in order (empty: all). `gpu` is the one whose engine
    decides which activations are rounded (None: as declared). `online` are layers of a 16-bit
    checkpoint that are rounded as they are read. `experts` says that they are those of a layer
    which may be computed as one product.
    """

    source: CheckpointReader
    device: torch.device
    dtype: torch.dtype
    kernels: Sequence[str]
    fuse: Fuse
    gpu: Gpu | None = None
    online: OnlineLayers | None = None
    experts: bool = False
    records: list[LayerRecord] = field(default_factory=list)

    def linear(self, name: str, shape: tuple[int, int], bias: bool = False) -> nn.Module:
        """One layer, weight [out, in]; `bias` says that it must have one."""
        return self.merged([name], [shape], bias)

    def merged(
        self, names: Sequence[str], shapes: Sequence[tuple[int, int]], bias: bool = False
    ) -> nn.Module:
        """Layers of one input as one module, whose output is theirs side by side."""
        declared = [name in self.source.layers for name in names]
        if not any(declared):
            plain, offset = self._plain(names, shapes, bias)
            if self.online is not None and self.online.cover(names):
                return self._rounded(names, plain, offset)
            return self.plain(names, shapes, plain, offset)
        if not all(declared):
            pairs = zip(names, shapes, strict=True)
            return JoinedLinear([self.linear(name, shape, bias) for name, shape in pairs])
        weights = self._read(names, shapes, bias)
        specs = [self.source.layers[name] for name in names]
        whole = join(weights) if len({spec.scheme for spec in specs}) == 1 else None
        if whole is not None:
            weights.clear()
            return self._quantized(names, specs[0], whole)
        return JoinedLinear(
            [
                self._quantized([name], spec, weight)
                for name, spec, weight in zip(names, specs, weights, strict=True)
            ]
        )

    def separate(
        self, names: Sequence[str], shapes: Sequence[tuple[int, int]], bias: bool = False
    ) -> list[nn.Module]:
        """The same as `merged` computes, as one module each."""
        if not all(name in self.source.layers for name in names):
            pairs = zip(names, shapes, strict=True)
            return [self.linear(name, shape, bias) for name, shape in pairs]
        weights = self._read(names, shapes, bias)
        return [
            self._quantized([name], self.source.layers[name], weight)
            for name, weight in zip(names, weights, strict=True)
        ]

    def stacked(
        self,
        name: str,
        count: int,
        shape: tuple[int, int],
        *,
        transposed: bool,
        bias: str | None = None,
    ) -> list[nn.Module]:
        """The `count` layers, weight [out, in] each, of a 3-D tensor that holds [in, out] where it
        is `transposed`; `bias` is the tensor [count, out] of their biases.

        The tensor may hold more of them, which are left.
        """
        spec = self.source.layers.get(name)
        if spec is not None:
            made: list[nn.Module] = []
            for number, weight in enumerate(self.source.stacked(name, count, shape, bool(bias))):
                moved = _to(centred(weight), self.device)
                made.append(self._quantized([f"{name}[{number}]"], spec, moved))
            return made
        whole = self.tensor(name, None)
        wanted = (shape[1], shape[0]) if transposed else shape
        if whole.dim() != 3 or len(whole) < count or tuple(whole.shape[1:]) != wanted:
            raise wrong_shape(name, tuple(whole.shape), (count, *wanted))
        biases = self.tensor(bias, (len(whole), shape[0])) if bias else [None] * len(whole)
        weights = [one.T if transposed else one for one in whole[:count]]
        pairs = list(zip(weights, biases[:count], strict=True))
        if self.online is not None and self.online.cover([name]):
            return [
                self._rounded([f"{name}[{number}]"], weight.contiguous(), one)
                for number, (weight, one) in enumerate(pairs)
            ]
        return [
            self.plain([f"{name}[{number}]"], [shape], weight.contiguous(), one)
            for number, (weight, one) in enumerate(pairs)
        ]

    def plain(
        self,
        names: Sequence[str],  # noqa: ARG002  who watches layers wants to know which
        shapes: Sequence[tuple[int, int]],  # noqa: ARG002
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> nn.Module:
        """The module of 16-bit layers whose weights [out, in] lie one below the other in `weight`,
        as their biases do; an expert of a 3-D tensor is called NAME[number]."""
        return PlainLinear(weight, bias)

    def tensor(self, name: str, shape: tuple[int, ...] | None) -> torch.Tensor:
        """A 16-bit tensor on the device."""
        return self.source.plain(name, shape, self.dtype).to(self.device)

    def _read(
        self, names: Sequence[str], shapes: Sequence[tuple[int, int]], bias: bool
    ) -> list[QuantWeight]:
        schemes = {self.source.layers[name].scheme for name in names}
        weights = []
        for name, shape in zip(names, shapes, strict=True):
            weight = centred(self.source.quantized(name, shape, bias))
            weights.append(_to(weight, self.device))
            release()
        if self.fuse == "engine" and len(names) > 1 and len(schemes) == 1:
            return harmonize(names, weights, schemes.pop())
        return weights

    def _quantized(self, names: Sequence[str], spec: LayerSpec, weight: QuantWeight) -> QuantLinear:
        shape = (weight.q.shape[0], weight.q.shape[1])
        layout = self.source.layout if self.online is None else LAYOUT
        scheme = as_served(layout, spec, self.gpu, names[0], shape)
        if _rounds_scales(spec.scheme, scheme):
            weight = rounded_scales(weight)
        weight, order = contiguous_groups(names[0], weight)
        layer = describe(names[0], scheme, weight, self.dtype)
        usual = kernels_of_experts(scheme, self.device) if self.experts else []
        choice = choose(layer, self.device, self.kernels or usual)
        self.records += [LayerRecord.of(name, spec.scheme, scheme, choice) for name in names]
        made = QuantLinear(layer, choice, weight, order)
        release()
        return made

    def _rounded(
        self, names: Sequence[str], weight: torch.Tensor, bias: torch.Tensor | None
    ) -> QuantLinear:
        assert self.online is not None
        made = replace(centred(self.online.rounded(names[0], weight)), bias=bias)
        return self._quantized(names, self.online.spec((weight.shape[0], weight.shape[1])), made)

    def _plain(
        self, names: Sequence[str], shapes: Sequence[tuple[int, int]], bias: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weights of 16-bit layers below one another, and their biases, None for none."""
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        weight = torch.empty(rows, columns, dtype=self.dtype, device=self.device)
        biases: list[torch.Tensor | None] = []
        start = 0
        for name, shape in zip(names, shapes, strict=True):
            weight[start : start + shape[0]] = self.source.plain(
                f"{name}.weight", shape, self.dtype
            )
            biases.append(self.source.bias(name, shape[0], self.dtype, bias))
            start += shape[0]
        if all(one is None for one in biases):
            return weight, None
        whole = [
            weight.new_zeros(shape[0]) if one is None else one.to(self.device)
            for one, shape in zip(biases, shapes, strict=True)
        ]
        return weight, torch.cat(whole)


def _to(weight: QuantWeight, device: torch.device) -> QuantWeight:
    """The weight with its tensors on the device."""
    moved: dict[str, Any] = {
        name: value.to(device)
        for name, value in vars(weight).items()
        if isinstance(value, torch.Tensor)
    }
    return replace(weight, **moved)
