"""Scales of activations and of the KV cache: present as declared, and really calibrated."""

from __future__ import annotations

from collections.abc import Iterator
from math import isclose, isfinite

from quantkit.formats.base import is_kv_cache_tensor
from quantkit.modules import layer_index
from quantkit.verify.findings import Finding, error, warning
from quantkit.verify.reading import read_tensor
from quantkit.verify.subject import Subject

_ROLES = ("input_scale", "input_global_scale", "input_global_scale_inverse")
_MIN_LAYERS = 3
_CALIBRATE = "calibrate again on real text, and measure the result (quantkit validate)"


def check_input_scales(subject: Subject, broken: set[str]) -> Iterator[Finding]:
    """Static activation scales that are all one value: no calibration gives that.

    A SmoothQuant export of ModelOpt is the exception: the multiplier normalises every input to
    [-1, 1], so that its INT8 scale is 1/127 in every layer.
    """
    values: set[float] = set()
    count, smoothed = 0, True
    for module in subject.declaration.layers.keys() - broken:
        info = subject.part(module, *_ROLES)
        if info is None:
            continue
        count += 1
        smoothed = smoothed and subject.part(module, "input_multiplier") is not None
        values.update(read_tensor(info).float().flatten().tolist())
    if count < _MIN_LAYERS or len(values) != 1:
        return
    value = values.pop()
    if smoothed and isclose(value, 1 / 127, rel_tol=1e-3):
        return
    yield error(
        "input_scale.uncalibrated",
        f"the static activation scale of all {count} layers is {value:g}; calibration never ran, "
        "or its result was lost",
        _CALIBRATE,
    )


def check_kv_cache(subject: Subject) -> Iterator[Finding]:
    """KV-cache scales are there if and only if declared, in every layer, and not left at 1.0."""
    kind = subject.declaration.kv_cache
    infos = [i for name, i in subject.checkpoint.tensors.items() if is_kv_cache_tensor(name)]
    scales = [i for i in infos if i.name.endswith("_scale")]
    if infos and kind == "none":
        yield error(
            "kv.undeclared",
            f"{len(infos)} KV-cache tensors exist ({infos[0].name}) and the config declares no "
            "quantized KV cache",
            "declare it (kv_cache_scheme, or kv_cache_quant_algo), or remove the tensors",
            infos[0].name,
        )
    if kind == "none":
        return
    if not scales:
        yield warning(
            "kv.no_scales",
            f"the config declares a {kind} KV cache without scales; engines use 1.0",
            "measure with the KV cache quantized (quantkit validate), or set kv_cache=none",
        )
        return
    yield from _check_every_layer(subject, [i.name for i in scales])
    values = {i.name: read_tensor(i).float().flatten().tolist() for i in scales}
    for name, numbers in values.items():
        if not all(isfinite(v) and v > 0 for v in numbers):
            yield error("kv.bad_scale", f"{name} is {min(numbers):g}", _CALIBRATE, name)
    if all(v == 1.0 for numbers in values.values() for v in numbers):
        yield warning(
            "kv.uncalibrated",
            f"all {len(scales)} KV-cache scales are exactly 1.0",
            "calibrate the KV cache, or measure with it quantized (quantkit validate)",
        )


def _check_every_layer(subject: Subject, scales: list[str]) -> Iterator[Finding]:
    have = {layer_index(name) for name in scales}
    attention = {
        index for name in subject.modules
        if name.endswith(("k_proj", "v_proj", "qkv_proj", "kv_b_proj"))
        and subject.modules[name].kind not in ("tower", "mtp")
        and (index := layer_index(name)) is not None
    }  # fmt: skip
    lacking = sorted(attention - have)
    if lacking:
        yield error(
            "kv.missing_scale",
            f"the KV cache is declared quantized; layer {lacking[0]} (and {len(lacking) - 1} more) "
            "has no KV-cache scale",
            _CALIBRATE,
            f"layers.{lacking[0]}",
        )
