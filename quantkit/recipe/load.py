"""The YAML boundary: a recipe says what to do, completely; everything after it is derived.

A recipe is read from `recipes/NAME.yaml` or a file, changed by `--set key.path=value`, checked by
pydantic with unknown keys refused, and stored as resolved in the checkpoint's `quantkit.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    BaseModel,
    ValidationError,
)

from quantkit.checkpoint.paths import data_dir
from quantkit.checkpoint.schemes import SCHEMES
from quantkit.errors import InputError
from quantkit.recipe.documents import (
    Location,
    TooDeepError,
    explain,
    meant,
    parse_yaml,
    read_yaml_object,
)
from quantkit.recipe.model import CalibrationChoice, Override, Recipe

EXAMPLE = "quantkit recipes show modelopt_fp8  # a recipe that works"


@cache
def recipe_files() -> dict[str, Path]:
    """Every bundled method name, aliases included, with its file."""
    found: dict[str, Path] = {}
    for file in sorted(data_dir("recipes").glob("*.yaml")):
        found[file.stem] = file
        for alias in read_yaml_object(file, "recipe", EXAMPLE).get("aliases", []):
            found[str(alias)] = file
    return found


def read_recipe(name_or_path: str, sets: tuple[str, ...] = ()) -> tuple[Recipe, str]:
    """The recipe of a method name or a YAML file with `--set` changes applied, and the words for
    where it is from. Its options are still to be checked, by its backend.

    Raises InputError that names the file, the key path, the value and what is allowed.
    """
    file = _find(name_or_path)
    data = read_yaml_object(file, "recipe", EXAMPLE)
    data.setdefault("name", file.stem)
    return as_recipe(data, sets, file.name if sets else str(file))


def as_recipe(data: dict[str, Any], sets: tuple[str, ...], where: str) -> tuple[Recipe, str]:
    """As `read_recipe`, of what the file `where` holds."""
    for change in sets:
        _apply(data, change)
    origin = f"{where} with --set {' '.join(sets)}" if sets else where
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise explain_recipe(error, origin, Recipe) from error
    scheme = SCHEMES[recipe.scheme]
    if recipe.group_size is not None and scheme.weight.granularity != "group":
        raise InputError(
            f"{origin}: group_size={recipe.group_size}, but the scheme {scheme.name} has one scale "
            f"a {scheme.weight.granularity}.",
            hint="remove group_size",
            code="recipe.invalid",
        )
    return recipe, origin


def as_changes(values: Mapping[str, Any]) -> list[str]:
    """Key path → value, as the texts that `--set` takes; `KEY+` appends.

    Raises InputError for a value that YAML does not know, or a key that is none.
    """
    changes = []
    for key, value in values.items():
        try:
            if not isinstance(key, str) or "=" in key:
                raise ValueError("the key is no path such as calibration.samples")
            text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(
                f"{key!r}: {value!r} cannot be set: {' '.join(str(error).split())}.",
                hint="plain values: None, bool, int, float, str, lists and dicts of them",
                code="recipe.bad_set",
            ) from error
        changes.append(f"{key}={text.removesuffix('...' + chr(10)).strip()}")
    return changes


def _find(name_or_path: str) -> Path:
    bundled = data_dir("recipes") / f"{name_or_path}.yaml"
    if bundled.name == f"{name_or_path}.yaml" and bundled.is_file():
        return bundled
    files = recipe_files()
    if name_or_path in files:
        return files[name_or_path]
    if name_or_path == "auto":
        raise InputError(
            "The method auto is a search that `quantkit quantize` does; it is no recipe before.",
            hint="quantkit quantize MODEL --method auto --set target_bits=5.4 --out DIR",
            code="recipe.auto",
        )
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        found = "is a directory" if path.is_dir() else "does not exist"
        raise InputError(
            f"The recipe file {path} {found}.",
            hint="quantkit recipes list",
            code="recipe.missing",
        )
    raise InputError(
        f"There is no method {name_or_path!r}.{meant(name_or_path, files)}",
        hint="quantkit methods",
        code="recipe.unknown_method",
    )


def _apply(data: dict[str, Any], change: str) -> None:
    path, sign, text = change.partition("=")
    append = path.endswith("+")
    keys = path.removesuffix("+").split(".")
    if not sign or not all(keys):
        raise InputError(
            f"--set {change!r} is not KEY=VALUE.",
            hint="for example --set kv_cache=fp8, or --set ignore+='re:.*o_proj'",
            code="recipe.bad_set",
        )
    try:
        value = parse_yaml(text)
    except TooDeepError as error:
        raise InputError(
            f"--set {path}: the value cannot be read: {error}.",
            hint="for example --set kv_cache=fp8, or --set ignore+='re:.*o_proj'",
            code="recipe.bad_set",
        ) from error
    except (yaml.YAMLError, ValueError):  # a preset or a glob: @ and * begin no plain YAML text
        value = text
    place = data
    for key in keys[:-1]:
        if place.get(key) is None:
            place[key] = {}
        inner = place[key]
        if not isinstance(inner, dict):
            raise InputError(
                f"--set {change!r}: {key} holds {inner!r}, which has no keys of its own.",
                hint=f"set {key} itself",
                code="recipe.bad_set",
            )
        place = inner
    if append:
        default = Recipe.model_fields[keys[-1]].default if keys[-1] in Recipe.model_fields else []
        old = place.get(keys[-1], default)
        added = value if isinstance(value, list) else [value]
        value = [*(old if isinstance(old, list) else [old]), *added]
    place[keys[-1]] = value


def explain_recipe(
    error: ValidationError, origin: str, model: type[BaseModel], *prefix: str
) -> InputError:
    """The first fault of a recipe, or of the part of it under the keys `prefix`."""

    def locate(location: Location) -> tuple[list[str], list[str]]:
        parts = [str(part) for part in location]
        return [*prefix, *parts], sorted(_fields(model, parts[:-1]))

    hint = "quantkit recipes show modelopt_fp8  # every key with its value"
    return explain(error, origin, locate, hint=hint, code="recipe.invalid")


def _fields(model: type[BaseModel], path: list[str]) -> list[str]:
    known: dict[str, type[BaseModel]] = {"calibration": CalibrationChoice, "overrides": Override}
    for part in path:
        model = known.get(part, model)
    return list(model.model_fields)
