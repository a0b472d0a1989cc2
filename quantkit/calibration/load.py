"""Finding and reading a calibration: a bundled name, a YAML file, or a data file as it is."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from quantkit.calibration.config import (
    DATA_SUFFIXES,
    SOURCE_TYPES,
    CalibrationConfig,
    FileSource,
)
from quantkit.calibration.rows import guess_field
from quantkit.checkpoint.paths import data_dir
from quantkit.errors import InputError
from quantkit.recipe.documents import parse_yaml

EXAMPLE = "quantkit calibration show default  # every key with its value"
YAML_SUFFIXES = (".yaml", ".yml")
DATA_FILE_PASSAGE = 2000


def calibration_files() -> dict[str, Path]:
    """The bundled calibrations, by name."""
    return {file.stem: file for file in sorted(data_dir("calibration").glob("*.yaml"))}


def load_calibration(
    name_or_path: str, overrides: Mapping[str, object] | None = None
) -> CalibrationConfig:
    """The calibration of a bundled name, a YAML file or a data file (.jsonl, .json, .csv,
    .parquet, .txt).

    `overrides` maps key paths (`samples`, `sources.0.weight`) to values; None leaves a key as it
    is. Raises InputError that names the file, the key path, the value and what is allowed.
    """
    path = Path(name_or_path)
    if path.suffix.lower() in DATA_SUFFIXES:
        file = _existing(path)
        data = _data_file(file)
    else:
        file = _existing(path) if path.suffix in YAML_SUFFIXES else _bundled(name_or_path)
        data = {"name": file.stem, **_read_yaml(file)}
    changes = {key: value for key, value in (overrides or {}).items() if value is not None}
    origin = str(file)
    if changes:
        origin += " with " + ", ".join(f"{key}={value}" for key, value in changes.items())
    data = copy.deepcopy(data)
    for key, value in changes.items():
        _put(data, key, value, origin)
    try:
        config = CalibrationConfig.model_validate(data)
    except ValidationError as error:
        raise _explain(error, origin) from error
    sources = [
        source.model_copy(update={"path": str(file.parent.resolve() / source.path)})
        if isinstance(source, FileSource)
        else source
        for source in config.sources
    ]
    return config.model_copy(update={"sources": sources})


def _existing(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        raise InputError(
            f"The calibration {path} is a directory, not a file.",
            hint=f"name a file in it, or write a calibration whose source is a file: {EXAMPLE}",
            code="calibration.missing",
        )
    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    raise InputError(
        f"The calibration file {path} does not exist.{_meant(path.name, names)}",
        hint="name a file, or one of: " + ", ".join(calibration_files()),
        code="calibration.missing",
    )


def _bundled(name: str) -> Path:
    files = calibration_files()
    if name in files:
        return files[name]
    if Path(name).exists():
        raise InputError(
            f"{name} is no calibration: it ends in none of "
            f"{', '.join((*YAML_SUFFIXES, *DATA_SUFFIXES))}.",
            hint="rename the file, or write a calibration that names it: " + EXAMPLE,
            code="calibration.unknown_type",
        )
    raise InputError(
        f"There is no calibration {name!r}.{_meant(name, files)}",
        hint="quantkit calibration list",
        code="calibration.unknown_name",
    )


def _meant(name: str, known: Mapping[str, object] | list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _data_file(file: Path) -> dict[str, Any]:
    source: dict[str, Any] = {"type": "file", "path": file.name}
    if file.suffix.lower() == ".txt":
        source["passage_chars"] = DATA_FILE_PASSAGE
    else:
        kind, field = guess_field(file)
        source[kind] = field
        if kind == "turn_fields":
            source["without_template"] = "plain"
    return {
        "name": file.stem,
        "description": f"The data file {file.name}",
        "sources": [source],
    }


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        data = parse_yaml(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise InputError(
            f"The calibration {file} cannot be read: {' '.join(str(error).split())}",
            hint=EXAMPLE,
            code="calibration.unreadable",
        ) from error
    if not isinstance(data, dict):
        raise InputError(
            f"The calibration {file} holds a {type(data).__name__}, not keys and values.",
            hint=EXAMPLE,
            code="calibration.unreadable",
        )
    return data


def _put(data: dict[str, Any], path: str, value: object, origin: str) -> None:
    *parents, last = path.split(".")
    place: Any = data
    try:
        for key in parents:
            place = place[int(key)] if isinstance(place, list) else place[key]
        if isinstance(place, list):
            place[int(last)] = value
        else:
            place.update({last: value})
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"{origin}: there is no place for {path}.",
            hint="name a key such as samples, seed or sources.0.weight",
            code="calibration.invalid",
        ) from error


def _explain(error: ValidationError, origin: str) -> InputError:
    first = error.errors()[0]
    keys, allowed = _locate(first["loc"])
    path, value = ".".join(keys), first["input"]
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = (
            f"{origin}: unknown key {path} = {value!r}.{_meant(keys[-1], allowed)} "
            f"Allowed here: {', '.join(allowed)}."
        )
    elif first["type"] == "missing":
        message = f"{origin}: the key {path} is missing."
    elif first["type"] == "union_tag_not_found":
        message = f"{origin}: {path}.type is missing; it is one of {', '.join(SOURCE_TYPES)}."
    elif isinstance(value, dict):
        message = f"{origin}: {path + ': ' if path else ''}{reason}."
    else:
        message = f"{origin}: {path} = {value!r}: {reason}."
    more = len(error.errors()) - 1
    return InputError(
        message + (f" ({more} more)" if more else ""), hint=EXAMPLE, code="calibration.invalid"
    )


def _locate(location: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """The key path without pydantic's union tags, and the keys that are allowed beside it."""
    model: type[Any] = CalibrationConfig
    keys: list[str] = []
    for part in location:
        if keys[:1] == ["sources"] and len(keys) == 2 and model is CalibrationConfig:
            model = SOURCE_TYPES[str(part)]
        else:
            keys.append(str(part))
    return keys, list(model.model_fields)
