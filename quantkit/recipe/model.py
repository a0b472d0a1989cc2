"""What a recipe says: its fields, their types and what is refused."""

from __future__ import annotations

from math import isfinite
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
)

from quantkit.checkpoint.network.modules import PRESETS
from quantkit.checkpoint.network.patterns import pattern_fault
from quantkit.checkpoint.schemes import SCHEMES, KVCache, Placement, Scheme
from quantkit.engines import engines
from quantkit.errors import InputError
from quantkit.recipe.gates import parse_gate
from quantkit.recipe.units import parse_bytes


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
    experts: Literal["all", "routed"] = "all"
    """Whether calibration brings every token to every expert, or to those that it is routed to."""
    expert_floor: Positive = 1
    """The fewest calibration tokens that an expert must see."""
    on_unseen: Literal["error", "keep16", "rtn"] = "error"
    """What becomes of an expert that saw fewer: keep16 keeps the experts of its layer in 16 bit
    (engines give them one scheme), rtn rounds its weights to nearest."""
    options: dict[str, Any] = {}
    gates: list[str] = []
    on_nan: Literal["error", "keep16"] = "error"
    on_misfit: Literal["error", "keep16", "fit"] = "error"
    placement: Literal["auto"] | Placement = "auto"
    """Where the weights lie while a library works; auto takes the first that fits."""
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
