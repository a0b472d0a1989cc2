"""Number formats and the table of named schemes (standard library only).

A *number format* says how one tensor is stored: the element, how many values share a scale, and
whether the scale is computed while serving (`dynamic`). A *scheme* pairs the format of the
weights with that of the activations (None: activations stay in 16 bit).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Literal

Element = Literal["int2", "int3", "int4", "int8", "fp8_e4m3", "fp4_e2m1"]
Granularity = Literal["tensor", "channel", "group", "block", "token"]
ScaleFormat = Literal["float", "e4m3", "e8m0"]

BITS: dict[str, int] = {
    "int2": 2, "int3": 3, "int4": 4, "int8": 8, "fp8_e4m3": 8, "fp4_e2m1": 4,
}  # fmt: skip
SCALE_BITS: dict[str, int] = {"float": 16, "e4m3": 8, "e8m0": 8}


@dataclass(frozen=True)
class NumberFormat:
    """How one tensor is stored.

    `group` runs along the input dimension, `block` is (rows, columns), `channel` is one scale an
    output row, `token` one a row of activations. `scale="e4m3"` is NVFP4's two-level scale: an
    E4M3 scale a group times one float32 scale a tensor; `"e8m0"` is the OCP MX power of two.
    """

    element: Element
    granularity: Granularity
    group_size: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    dynamic: bool = False
    scale: ScaleFormat = "float"

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> NumberFormat:
        """The format whose fields (`asdict`) went through JSON, where a tuple becomes a list."""
        block = values.get("block")
        return cls(**{**values, "block": tuple(block) if block else None})

    @property
    def bits(self) -> int:
        return BITS[self.element]

    @property
    def is_int(self) -> bool:
        return self.element.startswith("int")

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Canonical [out, in] grid of scales for a weight of `shape` = [out, in]."""
        rows, columns = shape
        if self.granularity == "channel":
            return (rows, 1)
        if self.granularity == "group":
            assert self.group_size
            return (rows, ceil(columns / self.group_size))
        if self.granularity == "block":
            assert self.block
            return (ceil(rows / self.block[0]), ceil(columns / self.block[1]))
        return (1, 1)

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Stored bits a weight, scales and zero points included."""
        rows, columns = shape
        scales = self.scale_shape(shape)
        extra = SCALE_BITS[self.scale] + (0 if self.symmetric else self.bits)
        return self.bits + extra * scales[0] * scales[1] / (rows * columns)


@dataclass(frozen=True)
class Scheme:
    """The number formats of a layer's weights and of its input (None: 16 bit)."""

    name: str
    weight: NumberFormat
    input: NumberFormat | None = None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Scheme:
        """The scheme whose fields (`asdict`) went through JSON."""
        weight, given = values["weight"], values.get("input")
        return cls(
            values["name"],
            NumberFormat.from_json(weight),
            NumberFormat.from_json(given) if given else None,
        )

    def with_weight(self, **changes: object) -> Scheme:
        """This scheme with fields of its weight format replaced (`group_size`, `symmetric`)."""
        return replace(self, weight=replace(self.weight, **changes))  # type: ignore[arg-type]

    @property
    def described(self) -> str:
        """The name, with what a recipe may change of it: "w4a16 (group 128, asymmetric)"."""
        size = self.weight.group_size
        more = [f"group {size}"] if size else []
        more += [] if self.weight.symmetric else ["asymmetric"]
        return f"{self.name} ({', '.join(more)})" if more else self.name

    @property
    def sqnr_floor_db(self) -> float:
        """Weight SQNR (10 log10 |W|^2 / |W - Wq|^2) under which a layer counts as broken.

        Chosen under what any backend reaches on trained weights (about 31 dB FP8, 40 dB INT8, 19 dB
        4 bit; the worst layer of the demo model by GPTQ in groups of 64: 4.9 dB in 3 bit, -1.1 dB
        in 2 bit) and over what a wrong scale, swap or permutation leaves (a scale off by 1.5 leaves
        6 dB of 8 bit and 3 dB of 3 bit, a permutation -3 dB).
        """
        return {8: 16.0, 4: 9.0, 3: 4.0, 2: -2.0}[self.weight.bits]


def _int(bits: int, granularity: Granularity, **more: object) -> NumberFormat:
    return NumberFormat(f"int{bits}", granularity, **more)  # type: ignore[arg-type]


def _fp8(granularity: Granularity, **more: object) -> NumberFormat:
    return NumberFormat("fp8_e4m3", granularity, **more)  # type: ignore[arg-type]


_NVFP4 = NumberFormat("fp4_e2m1", "group", group_size=16, scale="e4m3")
_MXFP4 = NumberFormat("fp4_e2m1", "group", group_size=32, scale="e8m0")
_MXFP8 = NumberFormat("fp8_e4m3", "group", group_size=32, scale="e8m0")

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp8", _fp8("tensor"), _fp8("tensor")),
        Scheme("fp8_dynamic", _fp8("channel"), _fp8("token", dynamic=True)),
        Scheme(
            "fp8_block",
            _fp8("block", block=(128, 128)),
            _fp8("group", group_size=128, dynamic=True),
        ),
        Scheme("fp8_block_weight_only", _fp8("block", block=(128, 128))),
        Scheme("w8a8", _int(8, "channel"), _int(8, "tensor")),
        Scheme("w8a8_dynamic", _int(8, "channel"), _int(8, "token", dynamic=True)),
        Scheme("w4a8_dynamic", _int(4, "channel"), _int(8, "token", dynamic=True)),
        Scheme("w4a4_dynamic", _int(4, "channel"), _int(4, "token", dynamic=True)),
        Scheme("w4a8_awq", _int(4, "group", group_size=128), _fp8("tensor")),
        Scheme("w8a16", _int(8, "channel")),
        Scheme("w4a16", _int(4, "group", group_size=128)),
        Scheme("w3a16", _int(3, "group", group_size=128)),
        Scheme("w2a16", _int(2, "group", group_size=128)),
        Scheme("nvfp4", _NVFP4, replace(_NVFP4, dynamic=True)),
        Scheme("nvfp4a16", _NVFP4),
        Scheme("mxfp4", _MXFP4, replace(_MXFP4, dynamic=True)),
        Scheme("mxfp4a16", _MXFP4),
        Scheme("mxfp8", _MXFP8, replace(_MXFP8, dynamic=True)),
        Scheme("mxfp8a16", _MXFP8),
        Scheme("w8a8_asym", _int(8, "channel"), _int(8, "tensor", symmetric=False)),
        Scheme("gguf_q4_k_m", _int(4, "group", group_size=32, symmetric=False)),
    )
}


def scheme_for(weight: NumberFormat, activation: NumberFormat | None) -> Scheme:
    """The named scheme of this pair, with the pair's own group size, block and symmetry.

    A pair that has no name gets one that describes it.
    """
    for scheme in SCHEMES.values():
        if _alike(scheme.weight, weight) and _alike(scheme.input, activation):
            return Scheme(scheme.name, weight, activation)
    if activation is None and weight.is_int:
        return Scheme(f"w{weight.bits}a16", weight)
    parts = [f"{number.element}_{number.granularity}" for number in (weight, activation) if number]
    return Scheme("_".join(parts), weight, activation)


def _alike(first: NumberFormat | None, second: NumberFormat | None) -> bool:
    if first is None or second is None:
        return first is second
    size = second.group_size if first.scale == "float" and first.group_size else first.group_size
    block = second.block if first.block else first.block
    return replace(first, group_size=size, block=block, symmetric=second.symmetric) == second


def described(scheme: Scheme | None) -> str:
    """`Scheme.described`, or "16 bit" for a layer that is not quantized."""
    return scheme.described if scheme else "16 bit"


KVCache = Literal["none", "fp8", "nvfp4"]

Placement = Literal["resident", "layerwise", "spread"]
"""Where a model's weights lie while a library works: on one device, in files but for the decoder
block at work, or over several devices and the host."""
