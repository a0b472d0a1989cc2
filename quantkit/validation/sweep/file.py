"""The sweep's YAML file: what it may say, and the cells that it asks for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from quantkit import __version__
from quantkit.backends.registry import load_recipe
from quantkit.checkpoint.directory import open_checkpoint
from quantkit.checkpoint.hub import resolve_model
from quantkit.checkpoint.whole_files import sha256_of
from quantkit.errors import InputError
from quantkit.recipe.documents import Location, explain, read_yaml_object
from quantkit.recipe.gates import parse_gate
from quantkit.recipe.load import as_changes
from quantkit.recipe.model import Positive
from quantkit.validation.search.budget import split_changes
from quantkit.validation.sweep.identity import identity_of

HINT = "models: [DIR], recipes: [rtn_w4a16, {method: rtn_w8a16, set: {seed: 1}}]"
AUTO = "auto"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _texts(value: object) -> object:
    """{KEY: VALUE} or ["KEY=VALUE"] as the latter."""
    return as_changes(value) if isinstance(value, dict) else value


Set = Annotated[list[str], BeforeValidator(_texts)]


class RecipeChoice(_Strict):
    """A method's name, or a recipe file, and what is changed in it."""

    method: str
    set: Set = []


def _named(value: object) -> object:
    """A method's name alone as a choice without changes."""
    return {"method": value} if isinstance(value, str) else value


class Setting(_Strict):
    """What is changed in every recipe."""

    set: Set = []


class Validation(_Strict):
    """How every cell is validated, as the flags of `quantkit validate` say it."""

    samples: Positive = 32
    data: str | None = None
    tasks: list[str] = []
    gates: list[str] = []
    throughput: bool = True
    broken_baseline: bool = False


class SweepFile(_Strict):
    """The keys of the file."""

    models: list[str] = Field(min_length=1)
    recipes: list[Annotated[RecipeChoice, BeforeValidator(_named)]] = Field(min_length=1)
    settings: list[Setting] = [Setting()]
    validate_: Validation = Field(Validation(), alias="validate")


@dataclass(frozen=True)
class Cell:
    """One thing to quantize and validate.

    model: its directory; name: what it is called. method: a name or a file. digest: of all that
    decides the result; two cells of one digest are the same.
    """

    model: str
    name: str
    method: str
    sets: tuple[str, ...]
    digest: str

    @property
    def recipe(self) -> str:
        """The method and its changes in one line."""
        title = Path(self.method).stem if self.method.endswith((".yaml", ".yml")) else self.method
        return " ".join([title, *self.sets])

    @property
    def key(self) -> str:
        """What it is compared with an earlier sweep's cell by."""
        return f"{self.name}: {self.recipe}"


def read_sweep(file: Path) -> tuple[SweepFile, list[Cell]]:
    """The file and its cells, in its order, each once.

    Raises InputError for keys and values that are none, and for methods, recipes, settings, gates
    and models that do not exist: all before any work.
    """
    data = read_yaml_object(file, "sweep", HINT)
    try:
        asked = SweepFile.model_validate(data)
    except ValidationError as error:
        raise explain(error, str(file), _locate, hint=HINT, code="sweep.invalid") from error
    for gate in asked.validate_.gates:
        parse_gate(gate)
    root = file.parent
    cells: dict[str, Cell] = {}
    validation = asked.validate_.model_dump()
    if asked.validate_.data:
        held = _beside(root, asked.validate_.data)
        if not Path(held).is_file():
            raise InputError(
                f"{file}: the data file {held} does not exist.", hint=HINT, code="sweep.data"
            )
        validation["data"] = sha256_of(Path(held))
    for name in asked.models:
        path = resolve_model(_beside(root, name))
        identity = identity_of(open_checkpoint(path))
        for choice in asked.recipes:
            method = _beside(root, choice.method)
            for setting in asked.settings:
                sets = (*choice.set, *setting.set)
                decided = {
                    "version": __version__,
                    "model": identity,
                    "recipe": _resolved(method, sets),
                    "validate": validation,
                }
                text = json.dumps(decided, sort_keys=True, default=str)
                digest = hashlib.sha256(text.encode()).hexdigest()[:16]
                title = Path(name).name if Path(path).exists() and Path(name).exists() else name
                cells.setdefault(
                    digest, Cell(str(path), title or name, method, tuple(sets), digest)
                )
    return asked, list(cells.values())


def data_file(file: Path, asked: SweepFile) -> Path | None:
    """The text that the cells are validated on, None for the held-out one."""
    return Path(_beside(file.parent, asked.validate_.data)) if asked.validate_.data else None


def _resolved(method: str, sets: Sequence[str]) -> Any:
    """What a recipe comes to, for its digest; of a search what it is asked for."""
    if method == AUTO:
        budget, rest = split_changes(sets)
        return {"auto": vars(budget), "set": rest}
    return load_recipe(method, tuple(sets)).model_dump(mode="json")


def _beside(root: Path, name: str) -> str:
    """A path as it is meant: beside the sweep's file where there is one, else as it stands."""
    beside = root / Path(name).expanduser()
    return str(beside) if beside.exists() else name


def _locate(location: Location) -> tuple[list[str], list[str]]:
    keys = [str(part) for part in location]
    inside: dict[str, type[BaseModel]] = {
        "recipes": RecipeChoice, "settings": Setting, "validate": Validation,
    }  # fmt: skip
    model = inside.get(keys[0], SweepFile) if len(keys) > 1 else SweepFile
    fields = model.model_fields.items()
    return keys, sorted(str(field.alias or name) for name, field in fields)
