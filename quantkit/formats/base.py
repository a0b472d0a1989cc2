"""The contract of an on-disk layout: what a config declares, which tensors that needs, what they
mean as a canonical weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from quantkit.schemes import NumberFormat, Scheme

if TYPE_CHECKING:
    import torch

    from quantkit.checkpoint import Checkpoint

Role = Literal[
    "weight",  # codes, packed or not
    "scale",  # multiplies the codes
    "scale_e8m0",  # power-of-two exponents, biased by 127
    "global_scale",  # one a tensor, multiplies the scales
    "global_scale_inverse",  # one a tensor, divides the scales (compressed-tensors NVFP4)
    "zero_point",
    "group_index",  # g_idx: the group of each input column (act-order)
    "shape",  # the unpacked shape
    "input_scale",  # static activation scale
    "input_global_scale",
    "input_zero_point",
    "input_multiplier",  # per input channel, applied to the activations (pre_quant_scale)
    "offset",  # anything additive of the Ascend layout (scale_bias, deq offsets, quant_bias)
    "bias",
]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that a declared layer must (or may) have."""

    role: Role
    dtypes: tuple[str, ...]
    """Legal safetensors dtypes, e.g. ("F32",)."""
    shapes: tuple[tuple[int, ...], ...]
    """Legal shapes, e.g. ((), (1,)) for a scalar."""
    required: bool = True


@dataclass(frozen=True)
class LayerSpec:
    """One quantized linear layer, as the checkpoint's config declares it.

    `packing` is the layout's own variant name (e.g. "pack-quantized"); `shape` is the unpacked
    [out, in].
    """

    scheme: Scheme
    packing: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class Problem:
    """Something about the declaration that is wrong in itself; becomes a finding of `verify`."""

    code: str
    message: str
    hint: str
    severity: Literal["error", "warning"] = "error"


@dataclass(frozen=True)
class Declaration:
    """What the configuration files say about every linear module of the checkpoint.

    `layers` are the modules declared quantized, `ignored` those that an ignore entry keeps
    (module → entry), `undeclared` those that no target and no ignore entry names (they are 16 bit by
    silence). `unmatched` are ignore entries that name nothing in the checkpoint.
    """

    quant_method: str
    layers: Mapping[str, LayerSpec]
    ignored: Mapping[str, str] = field(default_factory=dict)
    undeclared: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    kv_cache: str = "none"
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class QuantWeight:
    """The canonical quantized weight. With g = the scale's group of a column:

        W[o, i] = (code(q[o, i]) - zero_point[o, g]) * scale[o, g] * global_scale * input_multiplier[i]

    q: [out, in]; integer codes in any integer dtype, float8_e4m3fn for FP8, uint8 holding one E2M1
       code (0 … 15) an element for FP4.
    scale: float32 on the grid of `NumberFormat.scale_shape` ([1,1], [out,1], [out, in/g], blocks).
    zero_point: same grid as scale, float32 (None: 0).
    global_scale: float32 scalar that multiplies (None: 1).
    g_idx: int32 [in], the group of each column when groups are not contiguous.
    input_scale: static activation scale, float32 (None: dynamic or 16 bit).
    input_multiplier: float32 [in] (ModelOpt's pre_quant_scale), applied to the activations.
    bias: [out] or None.
    """

    format: NumberFormat
    q: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None
    g_idx: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    input_multiplier: torch.Tensor | None = None
    bias: torch.Tensor | None = None


class Format(Protocol):
    """What each file of this folder provides, as module-level functions."""

    NAME: str

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Whether the checkpoint's configuration is of this layout."""

    def declare(self, checkpoint: Checkpoint) -> Declaration:
        """Read the configuration against the checkpoint's tensor names; reads no weights."""

    def expected(self, spec: LayerSpec) -> dict[str, TensorSpec]:
        """Tensor suffix (e.g. "weight_scale") → what a layer of `spec` must hold there."""

    def quant_suffixes(self) -> frozenset[str]:
        """Suffixes whose presence marks a module as quantized in this layout (not `weight`, `bias`)."""

    def read(self, tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> QuantWeight:
        """Tensors by suffix → the canonical weight."""

    def write(self, weight: QuantWeight, spec: LayerSpec) -> dict[str, torch.Tensor]:
        """The canonical weight → tensors by suffix; `read(write(w)) == w`."""
