"""The contract of an on-disk layout: what a config declares, which tensors that needs, what they
mean as a canonical weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from quantkit.checkpoint.schemes import NumberFormat, Scheme

if TYPE_CHECKING:
    import torch

    from quantkit.checkpoint.directory import Checkpoint

Role = Literal[
    "weight",  # codes, packed or not
    "scale",  # multiplies the codes
    "scale_e8m0",  # power-of-two exponents, biased by 127
    "global_scale",  # one a tensor, multiplies the scales
    "global_scale_inverse",  # one a tensor, divides the scales (compressed-tensors NVFP4)
    "dequant_scale",  # weight scale × input scale (Ascend), float32 or its bits in int64
    "cast_scale",  # one a tensor, used by kernels that cast the dequantized weight to FP8
    "zero_point",
    "group_index",  # g_idx: the group of each input column (act-order)
    "shape",  # the unpacked shape
    "input_scale",  # static activation scale
    "input_global_scale",  # multiplies the activation's group scales
    "input_global_scale_inverse",  # divides them (compressed-tensors NVFP4)
    "input_zero_point",
    "input_multiplier",  # per input channel, applied to the activations (pre_quant_scale)
    "offset",  # anything additive of the Ascend layout (scale_bias, deq offsets, quant_bias)
    "bias",
]

KV_CACHE_SUFFIXES = frozenset(
    {
        "k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point",
        "k_global_scale", "v_global_scale", "q_global_scale", "k_bias", "v_bias",
        "kv_cache_scale", "kv_cache_offset", "kv_scale", "output_scale", "prob_output_scale",
    }
)  # fmt: skip
"""Last name parts of KV-cache (and attention) scales; they belong to no linear layer."""


def is_kv_cache_tensor(name: str) -> bool:
    """Whether a tensor of this name is a KV-cache scale, offset or zero point."""
    return name.rpartition(".")[2] in KV_CACHE_SUFFIXES


def kv_cache_scales(names: Iterable[str]) -> tuple[str, ...]:
    """Those of the names that are scales of keys and values in the cache."""
    kinds = ("k_scale", "v_scale", "kv_scale", "kv_cache_scale", "output_scale")
    return tuple(name for name in names if name.rpartition(".")[2] in kinds)


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
    [out, in], of one expert where `experts` > 0: a fused 3-D tensor of that many. `transposed`
    says that a fused tensor is stored [experts, in, out].
    """

    scheme: Scheme
    packing: str
    shape: tuple[int, int]
    experts: int = 0
    transposed: bool = False


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
    (module → entry), `undeclared` those that no target and no ignore entry names (16 bit by
    silence). `unmatched` are ignore entries that name nothing in the checkpoint; the output head
    of a tied model is no such entry. `kv_cache` is "none" or the cache's element ("fp8", …).
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

        W[o, i] = (code(q[o, i]) - zero_point[o, g]) * scale[o, g] * global_scale
                  * input_multiplier[i]

    q: [out, in]; integer codes in any integer dtype, float8_e4m3fn for FP8, uint8 holding one E2M1
       code (0 … 15) an element for FP4.
    scale: float32 on the grid of `NumberFormat.scale_shape` ([1,1], [out,1], [out, in/g], blocks).
    zero_point: same grid as scale, float32 (None: 0).
    global_scale: float64 scalar that multiplies (None: 1); float64 because a layout may store its
       inverse, and both must come back unchanged.
    g_idx: int32 [in], the group of each column when groups are not contiguous.
    input_scale: static activation scale, float32 (None: dynamic or 16 bit).
    input_zero_point: float32, beside a static input_scale: x ≈ (code - zero point) × scale.
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
    input_zero_point: torch.Tensor | None = None
    input_multiplier: torch.Tensor | None = None
    bias: torch.Tensor | None = None


class Format(Protocol):
    """What each file of this folder provides, as module-level functions."""

    NAME: str

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Whether the checkpoint's configuration is of this layout."""

    def declare(self, checkpoint: Checkpoint) -> Declaration:
        """Read the configuration against tensor names and headers; reads no weights.

        Raises InputError (`format.*`) for a configuration that cannot be understood.
        """

    def expected(self, spec: LayerSpec) -> dict[str, TensorSpec]:
        """Tensor suffix (e.g. "weight_scale") → what a layer of `spec` must hold there."""

    def quant_suffixes(self) -> frozenset[str]:
        """Suffixes that mark a module as quantized in this layout (not `weight`, `bias`)."""

    def read(self, tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> QuantWeight:
        """Tensors by suffix → the canonical weight (of one expert: see `inventory.expert`)."""


class WritableFormat(Format, Protocol):
    """A layout that this package also writes: the streaming backend its tensors."""

    def quantization_config(
        self, layers: Mapping[str, LayerSpec], ignore: Sequence[str]
    ) -> dict[str, Any]:
        """`quantization_config` of config.json; `ignore` names linear modules left in 16 bit."""
