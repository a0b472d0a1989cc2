"""FP8 checkpoints of `quant_method: fp8`: DeepSeek's and Qwen's blocks, Mistral's scalar scales.

`weight_block_size` makes it one scale a block and dynamic activations; without it a weight has one
scale, and its input one too where `activation_scheme` is static. The scale multiplies the codes,
whatever `_inv` in its name says. Sources of the names: Transformers 5.17
(`integrations/finegrained_fp8.py`), vLLM 0.32 (`quantization/fp8.py`, `models/mistral3.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.network.families import family
from quantkit.checkpoint.network.fp8_blocks import BLOCK_SIZE, two_sizes
from quantkit.checkpoint.network.modules import Module
from quantkit.checkpoint.schemes import NumberFormat, Scheme, scheme_for
from quantkit.errors import InputError
from quantkit.formats import inventory
from quantkit.formats.base import Declaration, LayerSpec, Problem, QuantWeight, TensorSpec
from quantkit.formats.inventory import Matcher, Parts, not_converted

if TYPE_CHECKING:
    import torch

    from quantkit.checkpoint.directory import Checkpoint

NAME = "fp8"

_FLOATS = ("F32", "BF16", "F16")
_SCALES = ("weight_scale_inv", "weight_scale", "scale_inv")
"""What a weight's scale is called; `scale_inv` beside a fused 3-D tensor (Transformers 5)."""
_INPUTS = ("activation_scale", "input_scale")
_SCALAR: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))
_PLAIN_KINDS = ("head", "router", "tower", "mtp")
_PLAIN_LEAVES = ("weights_proj",)
"""What the official exports leave in 16 bit and do not list: every engine builds it so."""


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether config.json says `quant_method: fp8`."""
    return (checkpoint.quantization_config or {}).get("quant_method") == NAME


def declare(checkpoint: Checkpoint) -> Declaration:
    """See `Format.declare`; every linear layer that no entry of the list names is declared, but
    the heads, routers, towers and MTP layers that are stored in 16 bit."""
    settings = checkpoint.quantization_config or {}
    scheme = _scheme(settings)
    found = inventory.take(checkpoint, quant_suffixes())
    config = checkpoint.config
    entries = settings.get("modules_to_not_convert") or settings.get("ignored_layers") or ()
    exclude = Matcher([not_converted(entry) for entry in entries])

    def unpacked(_: str, parts: Parts) -> tuple[int, ...] | None:
        return parts["weight"].shape if "weight" in parts else None

    def target(module: Module) -> LayerSpec | None:
        parts = found.modules[module.name]
        named = module.kind in _PLAIN_KINDS or module.name.endswith(_PLAIN_LEAVES)
        in_16_bit = parts["weight"].dtype in _FLOATS and named
        if module.kind == "embedding" or in_16_bit:
            return None
        packing = _names(parts, found.fused(module.name), scheme)
        return inventory.layer_spec(
            module, checkpoint, lambda shape: LayerSpec(scheme, packing, shape)
        )

    modules = inventory.linears(found, config, unpacked)
    layers, ignored, undeclared = inventory.sort_modules(modules, exclude.entry, target)
    return Declaration(
        quant_method=NAME,
        layers=layers,
        ignored=ignored,
        undeclared=undeclared,
        unmatched=exclude.unmatched(found, config),
        kv_cache="fp8" if settings.get("kv_cache_scheme") else "none",
        problems=_named_otherwise(checkpoint),
    )


def _named_otherwise(checkpoint: Checkpoint) -> tuple[Problem, ...]:
    """A warning for scales named as DeepSeek-V4's in a model of another family."""
    kind = str(checkpoint.config.get("model_type"))
    found = [info.stored for info in checkpoint.tensors.values() if info.stored]
    if not found or family(checkpoint.config).dotted_scales:
        return ()
    return (
        Problem(
            "format.scale_names",
            f"{len(found)} scales are named as in DeepSeek-V4 ({found[0]}); engines look for "
            f".weight_scale_inv in a {kind}",
            "quantize it again from here (rtn_* reads it), or rename the scales",
            "warning",
        ),
    )


def expected(spec: LayerSpec) -> dict[str, TensorSpec]:
    """See `Format.expected`."""
    scale, *static = spec.packing.split("+")
    number = spec.scheme.weight
    block = number.granularity == "block"
    grids = (number.scale_shape(spec.shape),) if block else _SCALAR
    result = {
        "weight": TensorSpec("weight", ("F8_E4M3",), (spec.shape,)),
        scale: TensorSpec("scale", (*_FLOATS, "F8_E8M0"), grids),
        "bias": TensorSpec("bias", _FLOATS, ((spec.shape[0],),), False),
    }
    result |= {name: TensorSpec("input_scale", _FLOATS, _SCALAR) for name in static}
    return inventory.fused(result, spec)


def quant_suffixes() -> frozenset[str]:
    """See `Format.quant_suffixes`."""
    return frozenset({*_SCALES, *_INPUTS})


def read(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> QuantWeight:
    """See `Format.read`."""
    scale, *static = spec.packing.split("+")
    number = spec.scheme.weight
    return QuantWeight(
        format=number,
        q=tensors["weight"],
        scale=tensors[scale].float().reshape(number.scale_shape(spec.shape)),
        input_scale=tensors[static[0]].float().reshape(()) if static else None,
        bias=tensors.get("bias"),
    )


def _scheme(settings: Mapping[str, Any]) -> Scheme:
    """The one scheme of the checkpoint; InputError (`format.unsupported`) for any other."""
    element, activations = settings.get("fmt") or "e4m3", settings.get("activation_scheme")
    stated = settings.get(BLOCK_SIZE)
    if element not in ("e4m3", "float8_e4m3fn"):
        raise _unsupported(f"fmt {element!r}", "fmt e4m3")
    if activations not in ("static", "dynamic"):
        raise _unsupported(f"activation_scheme {activations!r}", "static or dynamic")
    if stated is None:
        given = (
            NumberFormat("fp8_e4m3", "tensor")
            if activations == "static"
            else NumberFormat("fp8_e4m3", "token", dynamic=True)
        )
        return scheme_for(NumberFormat("fp8_e4m3", "tensor"), given)
    block = two_sizes(stated)
    if block is None:
        raise _unsupported(f"{BLOCK_SIZE} {stated!r}", "two positive numbers, or null")
    if activations == "static":
        raise _unsupported("static activations beside blocks", "activation_scheme dynamic")
    return scheme_for(
        NumberFormat("fp8_e4m3", "block", block=block),
        NumberFormat("fp8_e4m3", "group", group_size=block[1], dynamic=True),
    )


def _unsupported(what: str, wanted: str) -> InputError:
    return InputError(
        f"quant_method fp8 with {what} is not supported.",
        hint=f"supported: {wanted}; take config.json of the published model",
        code="format.unsupported",
    )


def _names(parts: Parts, fused: bool, scheme: Scheme) -> str:
    """What the scales of this layer are called: `packing` of its spec, "weight's+input's"."""
    usual = "scale_inv" if fused else "weight_scale_inv"
    scale = next((name for name in _SCALES if name in parts), usual)
    if scheme.input is None or scheme.input.dynamic:
        return scale
    other = "input_scale" if scale == "weight_scale" else "activation_scale"
    return f"{scale}+{next((name for name in _INPUTS if name in parts), other)}"
