"""The YAML boundary: a recipe says what to do, completely; everything after it is derived.

A recipe is read from `recipes/NAME.yaml` or a file, changed by `--set key.path=value`, checked by
pydantic with unknown keys refused, and stored as resolved in the checkpoint's `quantkit.json`.
"""

from __future__ import annotations

import difflib
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from quantkit.checkpoint.network.modules import PRESETS
from quantkit.checkpoint.network.patterns import pattern_fault
from quantkit.checkpoint.schemes import SCHEMES, KVCache, Scheme
from quantkit.documents import TooDeepError, parse_yaml
from quantkit.engines import engines
from quantkit.errors import InputError
from quantkit.gates import parse_gate
from quantkit.paths import data_dir
from quantkit.registry import backend_named
from quantkit.units import parse_bytes


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _no_boolean(value: object) -> object:
    """Python counts true as 1."""
    if isinstance(value, bool):
        raise ValueError("a whole number is wanted, not true or false")
    return value


SMALLEST_GROUP = 8
Whole = Annotated[int, BeforeValidator(_no_boolean)]
Positive = Annotated[int, Field(gt=0), BeforeValidator(_no_boolean)]
GroupSize = Annotated[int, Field(ge=SMALLEST_GROUP), BeforeValidator(_no_boolean)]


class CalibrationChoice(_Strict):
    """Which tokens the backend sees; None keeps the mixture's own value."""

    name: str = "default"
    samples: Positive | None = None
    sequence_length: Positive | None = None
    seed: Whole | None = None
    short: Literal["pack", "pad", "drop"] | None = None
    allow_fewer: bool | None = None
    batch_size: Positive = 8

    def overrides(self) -> dict[str, object]:
        """What this choice changes in the named mixture."""
        return self.model_dump(exclude={"name", "batch_size"}, exclude_none=True)


class Override(_Strict):
    """A scheme of their own for the modules that `match` names; `keep` leaves them in 16 bit."""

    match: str
    scheme: str
    group_size: GroupSize | None = None

    @field_validator("scheme")
    @classmethod
    def _known(cls, value: str) -> str:
        return value if value == "keep" else _scheme_name(value)

    @field_validator("match")
    @classmethod
    def _names(cls, value: str) -> str:
        return _entry(value)


class Serve(_Strict):
    """Where the result must load; a plan that one of these would refuse is refused itself."""

    engines: list[str] = []
    tp: list[Positive] = Field([1], min_length=1)
    """Tensor-parallel sizes."""
    gpu: str | None = None

    @field_validator("engines")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in engines():
                raise ValueError(
                    f"no rules are known for {name!r}, only for {', '.join(engines())}"
                )
        return value


class Recipe(_Strict):
    """One quantization job without the model."""

    schema_version: Literal[1] = 1
    name: str
    description: str = ""
    aliases: list[str] = []
    backend: str
    scheme: str
    group_size: GroupSize | None = None
    symmetric: bool = True
    targets: list[str] = ["@linear"]
    ignore: list[str] = ["@head", "@embeddings", "@routers", "@towers", "@mtp"]
    overrides: list[Override] = []
    kv_cache: KVCache = "none"
    calibration: CalibrationChoice | None = CalibrationChoice()
    options: dict[str, Any] = {}
    gates: list[str] = []
    on_nan: Literal["error", "keep16"] = "error"
    on_misfit: Literal["error", "keep16", "fit"] = "error"
    shard_size: str = Field("5GB", pattern=r"^\d+(\.\d+)?\s*(KB|MB|GB|TB)$")
    seed: Whole = 0
    python: str | None = None
    serve: Serve = Serve()

    @field_validator("scheme")
    @classmethod
    def _known(cls, value: str) -> str:
        return _scheme_name(value)

    @field_validator("gates")
    @classmethod
    def _gates(cls, value: list[str]) -> list[str]:
        try:
            gates = [parse_gate(entry) for entry in value]
        except InputError as error:
            raise ValueError(error.message.removesuffix(".")) from error
        for gate in gates:
            if not isfinite(gate.limit):
                raise ValueError(f"the gate {gate} holds nothing; leave it out")
        return [str(gate) for gate in gates]

    @field_validator("ignore", "targets")
    @classmethod
    def _entries(cls, value: list[str]) -> list[str]:
        return [_entry(entry) for entry in value]

    def resolved_scheme(self) -> Scheme:
        """The named scheme with this recipe's group size and symmetry."""
        return adjusted(SCHEMES[self.scheme], self.group_size, self.symmetric)

    def shard_bytes(self) -> int:
        return parse_bytes("shard_size", self.shard_size)


def adjusted(scheme: Scheme, group_size: int | None, symmetric: bool = True) -> Scheme:
    """A scheme with another group size or asymmetric weights where its format allows that."""
    changes: dict[str, object] = {}
    if group_size is not None and scheme.weight.group_size is not None:
        changes["group_size"] = group_size
    if not symmetric:
        changes["symmetric"] = False
    return scheme.with_weight(**changes) if changes else scheme


def _entry(value: str) -> str:
    """A preset, a pattern or a name, as `targets`, `ignore` and overrides hold them."""
    if value.startswith("@") and value not in PRESETS:
        raise ValueError(f"{value} is no preset; there are {', '.join(PRESETS)}")
    if fault := pattern_fault(value):
        raise ValueError(f"{value} is no regular expression: {fault}")
    return value


def _scheme_name(value: str) -> str:
    if value not in SCHEMES:
        raise ValueError(f"{value!r} is no scheme; there are {', '.join(sorted(SCHEMES))}")
    return value


@cache
def recipe_files() -> dict[str, Path]:
    """Every bundled method name, aliases included, with its file."""
    found: dict[str, Path] = {}
    for file in sorted(data_dir("recipes").glob("*.yaml")):
        found[file.stem] = file
        for alias in _read_yaml(file).get("aliases", []):
            found[str(alias)] = file
    return found


def load_recipe(name_or_path: str, sets: tuple[str, ...] = ()) -> Recipe:
    """The recipe of a method name or a YAML file, with `--set` changes applied.

    Raises InputError that names the file, the key path, the value and what is allowed.
    """
    file = _find(name_or_path)
    data = _read_yaml(file)
    data.setdefault("name", file.stem)
    for change in sets:
        _apply(data, change)
    origin = f"{file.name} with --set {' '.join(sets)}" if sets else str(file)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise _explain(error, origin, Recipe) from error
    backend = backend_named(recipe.backend)
    try:
        options = backend.options.model_validate(recipe.options)
    except ValidationError as error:
        raise _explain(error, origin, backend.options, prefix="options") from error
    scheme = SCHEMES[recipe.scheme]
    if recipe.group_size is not None and scheme.weight.granularity != "group":
        raise InputError(
            f"{origin}: group_size={recipe.group_size}, but the scheme {scheme.name} has one scale "
            f"a {scheme.weight.granularity}.",
            hint="remove group_size",
            code="recipe.invalid",
        )
    return recipe.model_copy(update={"options": options.model_dump(exclude_none=True)})


def _find(name_or_path: str) -> Path:
    files = recipe_files()
    if name_or_path in files:
        return files[name_or_path]
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
    close = difflib.get_close_matches(name_or_path, files, n=3, cutoff=0.5)
    raise InputError(
        f"There is no method {name_or_path!r}."
        + (f" Did you mean {' or '.join(close)}?" if close else ""),
        hint="quantkit methods",
        code="recipe.unknown_method",
    )


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        data = parse_yaml(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise InputError(
            f"The recipe {file} cannot be read: {' '.join(str(error).split())}",
            hint="quantkit recipes show modelopt_fp8  # a recipe that works",
            code="recipe.unreadable",
        ) from error
    if not isinstance(data, dict):
        raise InputError(
            f"The recipe {file} holds a {type(data).__name__}, not keys and values.",
            hint="quantkit recipes show modelopt_fp8  # a recipe that works",
            code="recipe.unreadable",
        )
    return data


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


def _explain(
    error: ValidationError, origin: str, model: type[BaseModel], prefix: str = ""
) -> InputError:
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"]]
    path = ".".join([prefix, *parts] if prefix else parts)
    if first["type"] == "extra_forbidden":
        allowed = sorted(_fields(model, parts[:-1]))
        close = difflib.get_close_matches(parts[-1], allowed, n=1)
        meant = f" Did you mean {close[0]}?" if close else ""
        message = (
            f"{origin}: unknown key {path} = {first['input']!r}.{meant} "
            f"Allowed here: {', '.join(allowed) or 'nothing'}."
        )
    elif first["type"] == "missing":
        message = f"{origin}: the key {path} is missing."
    else:
        reason = first["msg"].removeprefix("Value error, ")
        message = f"{origin}: {path} = {first['input']!r}: {reason}."
    more = len(error.errors()) - 1
    return InputError(
        message + (f" ({more} more)" if more else ""),
        hint="quantkit recipes show modelopt_fp8  # every key with its value",
        code="recipe.invalid",
    )


def _fields(model: type[BaseModel], path: list[str]) -> list[str]:
    known: dict[str, type[BaseModel]] = {"calibration": CalibrationChoice, "overrides": Override}
    for part in path:
        model = known.get(part, model)
    return list(model.model_fields)
