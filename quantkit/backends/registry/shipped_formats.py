"""ModelOpt's quantizer settings as the number formats that they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantkit.checkpoint.schemes import SCHEMES, NumberFormat

_ELEMENTS = {"e4m3": "fp8_e4m3", (4, 3): "fp8_e4m3", "e2m1": "fp4_e2m1", (2, 1): "fp4_e2m1",
             8: "int8", 4: "int4"}  # fmt: skip
_SCALES = {"e4m3": "e4m3", (4, 3): "e4m3", "e8m0": "e8m0", (8, 0): "e8m0", None: "float"}
_KNOWN = {"num_bits", "axis", "block_sizes", "type", "effective_bits", "enable"}

Settings = Mapping[str, Any]


def scheme_named(weight: Any, given: Any) -> str | None:
    """The scheme of quantizers of weights and inputs (None: 16 bit); None where there is none."""
    if isinstance(weight, list):  # integers, and FP8 of what they stand for
        kinds = [_format(one) for one in weight]
        fp8 = NumberFormat("fp8_e4m3", "tensor")
        int4 = NumberFormat("int4", "group", group_size=128)
        return "w4a8_awq" if kinds == [int4, fp8] and _format(given) == fp8 else None
    held, input_held = _format(weight), _format(given) if given else None
    if input_held is not None and input_held.scale != "float":
        input_held = replace(input_held, dynamic=True)
    if held is None or (given and input_held is None):
        return None
    for name, scheme in SCHEMES.items():
        if scheme.weight == held and scheme.input == input_held and name != "w4a8_awq":
            return name
    return None


def cache_named(settings: Any) -> str | None:
    """The `kv_cache` of the quantizers of keys and values."""
    found = _format(settings)
    if found == NumberFormat("fp8_e4m3", "tensor"):
        return "fp8"
    return "nvfp4" if found == SCHEMES["nvfp4"].weight else None


def _format(settings: Any) -> NumberFormat | None:
    """None for settings that say more than a number format does."""
    if not isinstance(settings, dict) or settings.keys() - _KNOWN:
        return None
    bits = settings.get("num_bits")
    element: Any = _ELEMENTS.get(tuple(bits) if isinstance(bits, list) else bits)
    blocks = dict(settings.get("block_sizes") or {})
    if element is None:
        return None
    kind, scale = blocks.pop("type", "static"), blocks.pop("scale_bits", None)
    scale = _SCALES.get(tuple(scale) if isinstance(scale, list) else scale)
    if settings.get("type") == "dynamic" and blocks == {-1: None}:
        return NumberFormat(element, "token", dynamic=True)
    if scale is None or settings.get("type") not in (None, "static"):
        return None
    if scale != "float":
        return NumberFormat(element, "group", group_size=blocks.get(-1), scale=scale)  # type: ignore[arg-type]
    if kind != "static":
        return None
    if blocks.keys() == {-1}:
        return NumberFormat(element, "group", group_size=blocks[-1])
    if blocks.keys() == {-1, -2}:
        return NumberFormat(element, "block", block=(blocks[-2], blocks[-1]))
    if blocks:
        return None
    return NumberFormat(element, "tensor" if settings.get("axis") is None else "channel")
