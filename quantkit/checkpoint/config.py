"""config.json as it is read from a directory: the parts that everything relies on are checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.headers import read_json
from quantkit.errors import InputError

MAX_COUNT = 100_000
"""More layers, or experts in all layers together, than any network has."""

_OBJECTS = (
    "quantization_config", "compression_config", "text_config", "llm_config", "language_config",
    "thinker_config",
)  # fmt: skip
_LAYERS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_nextn_predict_layers",
    "mtp_num_hidden_layers", "num_mtp_layers", "mtp_layers",
)  # fmt: skip
_EXPERTS = (
    "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "n_shared_experts",
)  # fmt: skip


def read_model_config(file: Path) -> dict[str, Any]:
    """A config.json; InputError (`checkpoint.bad_config`) where a part has an impossible value."""
    config = read_json(file)
    for where, level in _levels("", config):
        _check_types(file, where, level)
        layers, experts = (
            _largest(file, where, level, _LAYERS),
            _largest(file, where, level, _EXPERTS),
        )
        if layers * experts > MAX_COUNT:
            raise _impossible(
                file, f"{layers} layers of {experts} experts", f"at most {MAX_COUNT} experts"
            )
    return config


def _levels(where: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The config and every nested model config, each with its name's prefix."""
    yield where, config
    for key in _OBJECTS[2:]:
        if isinstance(config.get(key), dict):
            yield from _levels(f"{where}{key}.", config[key])


def _check_types(file: Path, where: str, config: Mapping[str, Any]) -> None:
    for key in _OBJECTS:
        if not isinstance(config.get(key), dict | None):
            raise _impossible(file, f"{where}{key} {config[key]!r}", "an object")
    names = config.get("architectures")
    if names is None:
        return
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _impossible(file, f"{where}architectures {names!r}", "a list of class names")


def _largest(file: Path, where: str, config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    stated = {key: config[key] for key in keys if isinstance(config.get(key), int)}
    for key, value in stated.items():
        if value > MAX_COUNT:
            raise _impossible(file, f"{where}{key} {value}", f"at most {MAX_COUNT}")
    return max(stated.values(), default=0)


def _impossible(file: Path, what: str, wanted: str) -> InputError:
    return InputError(
        f"{file} has {what}, where {wanted} belongs.",
        hint=f"correct it, or copy the model's own {file.name} here again",
        code="checkpoint.bad_config",
    )
