"""Settings of compressed-tensors that would change what is computed, and that are not honoured.

Whatever an engine reads differently, or not at all, is refused here by its name and value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quantkit.checkpoint.directory import Checkpoint
from quantkit.errors import InputError

_STORED = (None, "compressed", "frozen")
"""The states in which the tensors are what the configuration says."""
_OPEN_FORMATS = (None, "mixed-precision")
"""Top-level formats beside which each group names its own."""
_FOREIGN_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}
_INPUTS: dict[str, tuple[str, ...]] = {
    "int 8": ("int 8",),
    "int 4": ("int 8", "int 4", "float 8"),
    "int 3": ("int 8", "float 8"),
    "int 2": ("int 8", "float 8"),
    "float 8": ("float 8",),
    "float 4": ("float 4", "float 8"),
}
"""The activations that have kernels, by the weights' type and number of bits."""


def check_settings(config: Mapping[str, Any]) -> None:
    """InputError (`format.*`) for a setting that is not honoured, or of the wrong type."""
    _check_method(config)
    status = config.get("quantization_status")
    if status not in _STORED:
        raise _unsupported(
            f"quantization_status is {status!r}: the weights were not stored quantized",
            "save the model compressed (LLM Compressor: save_pretrained(save_compressed=True))",
        )
    _check_transforms(config.get("transform_config"))
    for key, kind, wanted in (("sparsity_config", dict, "an object"), ("format", str, "a string")):
        if not isinstance(config.get(key), kind | None):
            raise _wrong_type(key, config[key], wanted)
    _list_of_names("ignore", config.get("ignore"))
    groups = config.get("config_groups")
    if not isinstance(groups, dict):
        raise _wrong_type("config_groups", groups, "an object")
    for name, group in groups.items():
        if isinstance(group, dict):
            _check_group(name, group, config.get("format"))
    cache = config.get("kv_cache_scheme")
    if cache is not None:
        _check_types("kv_cache_scheme", cache)
    _check_repeated_targets(groups)


def check_documents(checkpoint: Checkpoint) -> None:
    """InputError (`format.contradiction`) for a second configuration that says something else."""
    config = checkpoint.config
    text = config.get("text_config")
    stated = {
        "quantization_config": config.get("quantization_config"),
        "compression_config": config.get("compression_config"),
        "text_config.quantization_config": (text if isinstance(text, dict) else {}).get(
            "quantization_config"
        ),
    }
    used = checkpoint.quantization_config
    first = next((key for key, value in stated.items() if value), "")
    for key, value in stated.items():
        if value and value != used:
            raise _contradiction(
                f"{key} and {first} of {checkpoint.path}/config.json say different things",
                f"remove {key} from config.json if {first} describes the weights",
            )
    for file, method in _FOREIGN_FILES.items():
        if file in checkpoint.documents:
            raise _contradiction(
                f"{checkpoint.path} holds {file} of a {method} export beside a compressed-tensors "
                "configuration",
                f"remove {file}: it does not belong to this export",
            )


def _check_method(config: Mapping[str, Any]) -> None:
    if config.get("quant_method") is None:
        raise InputError(
            "quantization_config has config_groups of compressed-tensors and no quant_method; "
            "engines do not load it.",
            hint='add "quant_method": "compressed-tensors" to quantization_config in config.json',
            code="format.no_method",
        )


def _check_transforms(transforms: object) -> None:
    if transforms is None or transforms == {}:
        return
    if not isinstance(transforms, dict):
        raise _wrong_type("transform_config", transforms, "an object")
    groups = transforms.get("config_groups", transforms)
    if not groups:
        return
    entries = groups.values() if isinstance(groups, dict) else ()
    kinds = {str(entry.get("type")) for entry in entries if isinstance(entry, dict)}
    raise _unsupported(
        f"transform_config ({', '.join(sorted(kinds)) or groups!r}) is not supported: its "
        "rotations are computed while serving",
        "quantize the model without transforms (SpinQuant, QuIP) that run online",
    )


def _check_group(name: str, group: Mapping[str, Any], top: object) -> None:
    where = f"config group {name!r}"
    _list_of_names(f"targets of {where}", group.get("targets"))
    weights, inputs = group.get("weights"), group.get("input_activations")
    outputs = group.get("output_activations")
    if outputs is not None:
        raise _unsupported(
            f"output_activations of {where} is {_said(outputs)}, and outputs stay in 16 bit",
            "quantize weights and input activations alone",
        )
    for part, value in (("weights", weights), ("input_activations", inputs)):
        if value is not None:
            _check_types(f"{part} of {where}", value)
    if weights is not None and weights.get("dynamic", False) is not False:
        raise _unsupported(
            f"dynamic of the weights of {where} is {weights['dynamic']!r}; the scales of weights "
            "are stored",
            'set "dynamic": false',
        )
    if weights is not None and inputs is not None:
        _check_pair(where, weights, inputs)
    stored = group.get("format")
    if stored is not None and top not in _OPEN_FORMATS and stored != top:
        raise _contradiction(
            f"the format of {where} is {stored!r} and that of quantization_config {top!r}",
            'set the format that the tensors have, "mixed-precision" above groups that differ',
        )


def _check_types(where: str, arguments: object) -> None:
    if not isinstance(arguments, dict):
        raise _wrong_type(where, arguments, "an object")
    for key in ("num_bits", "group_size"):
        value = arguments.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise _wrong_type(f"{key} of {where}", value, "a whole number")
    for key in ("type", "strategy"):
        value = arguments.get(key)
        if value is not None and not isinstance(value, str):
            raise _wrong_type(f"{key} of {where}", value, "a string")
    if not _is_block(arguments.get("block_structure")):
        value = arguments["block_structure"]
        raise _wrong_type(f"block_structure of {where}", value, "two whole numbers")
    symmetric, dynamic = arguments.get("symmetric", True), arguments.get("dynamic", False)
    if not isinstance(symmetric, bool):
        raise _wrong_type(f"symmetric of {where}", symmetric, "true or false")
    if not isinstance(dynamic, bool) and dynamic != "local":
        raise _wrong_type(f"dynamic of {where}", dynamic, 'true, false or "local"')


def _is_block(value: object) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"[1-9]\d*x[1-9]\d*", value) is not None
    if not isinstance(value, list):
        return value is None
    return len(value) == 2 and all(type(side) is int and side > 0 for side in value)


def _check_pair(where: str, weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    weight, activation = _element(weights), _element(inputs)
    if weight in _INPUTS and activation not in _INPUTS[weight]:
        raise _unsupported(
            f"{where} has {activation} bit input_activations for {weight} bit weights, which "
            "nothing computes",
            "correct num_bits and type of input_activations in config.json, or export again",
        )


def _element(arguments: Mapping[str, Any]) -> str:
    return f"{str(arguments.get('type') or 'int').lower()} {arguments.get('num_bits', 8)}"


def _check_repeated_targets(groups: Mapping[str, Any]) -> None:
    first: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for name, group in groups.items():
        for target in group.get("targets") or () if isinstance(group, dict) else ():
            other, settings = first.setdefault(target, (name, group))
            if any(settings.get(k) != group.get(k) for k in ("weights", "input_activations")):
                raise _contradiction(
                    f"config groups {other!r} and {name!r} give {target!r} different settings",
                    "leave the target in the group that its tensors were written with",
                )


def _list_of_names(what: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise _wrong_type(what, value, "a list of names")


def _said(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _wrong_type(what: str, value: object, wanted: str) -> InputError:
    return InputError(
        f"{what} is {_said(value)}, not {wanted}.",
        hint="correct quantization_config in config.json, or export the model again",
        code="format.wrong_type",
    )


def _unsupported(what: str, hint: str) -> InputError:
    return InputError(f"{what}.", hint=hint, code="format.unsupported")


def _contradiction(what: str, hint: str) -> InputError:
    return InputError(f"{what}.", hint=hint, code="format.contradiction")
