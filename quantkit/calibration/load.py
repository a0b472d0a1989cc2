"""Finding and reading a calibration: a bundled name, a YAML file, or a data file as it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quantkit.calibration.config import (
    DATA_SUFFIXES,
    SOURCE_TYPES,
    CalibrationConfig,
    FileSource,
)
from quantkit.calibration.rows import guess_fields
from quantkit.checkpoint.paths import data_dir
from quantkit.errors import InputError
from quantkit.recipe.documents import Location, explain, meant, read_yaml_object

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
        data = {"name": file.stem, **read_yaml_object(file, "calibration", EXAMPLE)}
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
        raise explain(error, origin, _locate, hint=EXAMPLE, code="calibration.invalid") from error
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
        f"The calibration file {path} does not exist.{meant(path.name, names)}",
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
        f"There is no calibration {name!r}.{meant(name, files)}",
        hint="quantkit calibration list",
        code="calibration.unknown_name",
    )


def _data_file(file: Path) -> dict[str, Any]:
    source: dict[str, Any] = {"type": "file", "path": file.name}
    if file.suffix.lower() == ".txt":
        source["passage_chars"] = DATA_FILE_PASSAGE
    else:
        source |= guess_fields(file)
        if "turn_fields" in source:
            source["without_template"] = "plain"
    return {
        "name": file.stem,
        "description": f"The data file {file.name}",
        "sources": [source],
    }


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


def _locate(location: Location) -> tuple[list[str], list[str]]:
    """The key path without pydantic's union tags, and the keys that are allowed beside it."""
    model: type[Any] = CalibrationConfig
    keys: list[str] = []
    for part in location:
        if keys[:1] == ["sources"] and len(keys) == 2 and model is CalibrationConfig:
            model = SOURCE_TYPES[str(part)]
        else:
            keys.append(str(part))
    at_source = len(keys) == 2 and keys[0] == "sources" and model is CalibrationConfig
    return keys, list(SOURCE_TYPES if at_source else model.model_fields)
