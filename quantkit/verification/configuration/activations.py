"""Scales of activations and of the KV cache: present as declared, and really calibrated."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from math import inf, isclose, isfinite
from statistics import median

from quantkit.checkpoint.directory import TensorInfo
from quantkit.checkpoint.network.modules import fused_groups, layer_index
from quantkit.checkpoint.tensors import read_tensor
from quantkit.formats.base import is_kv_cache_tensor
from quantkit.formats.quantized import FLOAT_DTYPES, QuantizedCheckpoint
from quantkit.verification.findings import Finding, error, warning

_ROLES = ("input_scale", "input_global_scale", "input_global_scale_inverse")
_MIN_LAYERS = 3
_MOST_APART = 100.0
_MOST_UNUSUAL = 1000.0
"""Real models with massive activations reach 160 × the median."""

_LARGEST_KV_SCALE = 1e4
"""In FP8 that is a key of 4 million; no 16-bit model computes with such."""

_KV_FORMATS = frozenset(
    {
        "fp8", "fp8_e4m3", "fp8_affine", "fp8_cast", "int8", "fp4", "nvfp4", "nvfp4_affine",
        "nvfp4_rotate", "nvfp4_cast",
    }
)  # fmt: skip
_CALIBRATE = "calibrate again on real text, and measure the result (quantkit validate)"


def check_input_scales(subject: QuantizedCheckpoint, broken: set[str]) -> Iterator[Finding]:
    """Static activation scales that are all one value: no calibration gives that.

    A SmoothQuant export of ModelOpt is the exception: the multiplier normalises every input to
    [-1, 1], so that its INT8 scale is 1/127 in every layer. In `quant_method: fp8`, which makers
    publish after training with the scale, one value other than 1 is worth a warning only.
    """
    scales = {
        module: read_tensor(info).float().flatten().tolist()
        for module in subject.declaration.layers
        if module not in broken and (info := subject.part(module, *_ROLES)) is not None
    }
    yield from _check_siblings(scales)
    yield from _check_outliers(scales)
    values = {value for of_layer in scales.values() for value in of_layer}
    count = len(scales)
    smoothed = all(subject.part(module, "input_multiplier") is not None for module in scales)
    if count < _MIN_LAYERS or len(values) != 1:
        return
    value = values.pop()
    if smoothed and isclose(value, 1 / 127, rel_tol=1e-3):
        return
    if subject.declaration.quant_method == "fp8" and value != 1:
        yield warning(
            "input_scale.one_value",
            f"the static activation scale of all {count} layers is {value:g}: fixed, not measured "
            "by calibration; right where the model was trained with it",
            "compare with the published model, and measure the result (quantkit validate)",
        )
        return
    yield error(
        "input_scale.uncalibrated",
        f"the static activation scale of all {count} layers is {value:g}; calibration never ran, "
        "or its result was lost",
        _CALIBRATE,
    )


def _check_siblings(scales: Mapping[str, list[float]]) -> Iterator[Finding]:
    """Layers that engines merge have one input, and so about one scale."""
    for members in fused_groups(scales):
        values = {name.rpartition(".")[2]: max(scales[name], default=0.0) for name in members}
        least, most = min(values.values()), max(values.values())
        if least > 0 and most / least > _MOST_APART:
            parent = members[0].rpartition(".")[0]
            listed = ", ".join(f"{leaf} {value:g}" for leaf, value in values.items())
            yield error(
                "input_scale.siblings_differ",
                f"{parent}: the static activation scales of one input differ more than "
                f"{_MOST_APART:g} × ({listed})",
                _CALIBRATE,
                parent,
            )


def _check_outliers(scales: Mapping[str, list[float]]) -> Iterator[Finding]:
    """Scales far from those of the same layer in other blocks; massive activations are real."""
    by_leaf: dict[str, dict[str, float]] = defaultdict(dict)
    for name, values in scales.items():
        by_leaf[name.rpartition(".")[2]][name] = max(values, default=0.0)
    for of_leaf in by_leaf.values():
        middle = median(of_leaf.values())
        if len(of_leaf) < _MIN_LAYERS or not middle > 0:
            continue
        for name, value in of_leaf.items():
            if value > 0 and not 1 / _MOST_UNUSUAL <= value / middle <= _MOST_UNUSUAL:
                yield warning(
                    "input_scale.unusual",
                    f"{name} has the static activation scale {value:g}, its kind {middle:g} in "
                    "the median",
                    "look at what the layer sees, and measure the result (quantkit validate)",
                    name,
                )


def check_kv_cache(subject: QuantizedCheckpoint) -> Iterator[Finding]:
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
    if kind not in _KV_FORMATS:
        yield error(
            "kv.unknown_format",
            f"the config declares a KV cache of the unknown format {kind!r}",
            f"known: {', '.join(sorted(_KV_FORMATS))}",
        )
    if not scales:
        yield warning(
            "kv.no_scales",
            f"the config declares a {kind} KV cache without scales; engines use 1.0",
            "measure with the KV cache quantized (quantkit validate), or set kv_cache=none",
        )
        return
    yield from _check_every_layer(subject, [i.name for i in scales])
    yield from _check_shapes(scales)
    floats = [i for i in scales if i.dtype in FLOAT_DTYPES]
    values = {i.name: read_tensor(i).float().flatten().tolist() for i in floats}
    for name, numbers in values.items():
        most = inf if "global" in name else _LARGEST_KV_SCALE
        bad = [v for v in numbers if not (isfinite(v) and 0 < v <= most)]
        if bad:
            yield error("kv.bad_scale", f"{name} is {bad[0]:g}", _CALIBRATE, name)
    if values and all(v == 1.0 for numbers in values.values() for v in numbers):
        yield warning(
            "kv.uncalibrated",
            f"all {len(scales)} KV-cache scales are exactly 1.0",
            "calibrate the KV cache, or measure with it quantized (quantkit validate)",
        )


def _check_shapes(scales: list[TensorInfo]) -> Iterator[Finding]:
    """Floating-point scales, of one shape for every layer."""
    by_role: dict[str, list[TensorInfo]] = defaultdict(list)
    for info in scales:
        if info.dtype not in FLOAT_DTYPES:
            yield error(
                "kv.bad_scale",
                f"{info.name} is of dtype {info.dtype}; scales are floating-point numbers",
                _CALIBRATE,
                info.name,
            )
        by_role[info.name.rpartition(".")[2]].append(info)
    for infos in by_role.values():
        usual = Counter(i.elements for i in infos).most_common(1)[0][0]
        for info in infos:
            if info.elements != usual:
                yield error(
                    "kv.bad_scale",
                    f"{info.name} has shape {list(info.shape)}, that of other layers {usual} "
                    "elements",
                    _CALIBRATE,
                    info.name,
                )


def _check_every_layer(subject: QuantizedCheckpoint, scales: list[str]) -> Iterator[Finding]:
    """The kinds of scales that any layer has, in every layer with attention."""
    have = {(layer_index(name), _kind(name)) for name in scales}
    attention = {
        index for name in subject.modules
        if name.endswith(("k_proj", "v_proj", "qkv_proj", "kv_b_proj"))
        and subject.modules[name].kind not in ("tower", "mtp")
        and (index := layer_index(name)) is not None
    }  # fmt: skip
    for kind in sorted({kind for _, kind in have if kind != "q"}):
        lacking = sorted(index for index in attention if (index, kind) not in have)
        if lacking:
            yield error(
                "kv.missing_scale",
                f"the KV cache is declared quantized; layer {lacking[0]} (and {len(lacking) - 1} "
                f"more) has no {kind} scale",
                _CALIBRATE,
                f"layers.{lacking[0]}",
            )


def _kind(name: str) -> str:
    """What a scale of the KV cache is of: "k", "v", "q", or "KV-cache"."""
    parent, _, suffix = name.rpartition(".")
    for word in (suffix, parent.rpartition(".")[2]):
        if word.startswith(("k_", "v_", "q_")):
            return word[0]
    return "KV-cache"
