"""Which backends exist, what each can do, and why it cannot (the parent's side; no library loads).

The adapters themselves live in `quantkit/backends/` and run in a child process. Other packages add
backends with the entry point group `quantkit.backends`, whose values are `"module:attr"` of a
`Backend`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from quantkit.errors import InputError
from quantkit.schemes import Scheme

if TYPE_CHECKING:
    from quantkit.recipe import Recipe

Folding = Literal["none", "multiplier", "norms"]
"""Whether a method rewrites weights that it keeps: not, only through an input multiplier that is
stored beside the codes, or also by folding scales into norms and neighbouring layers."""


class NoOptions(BaseModel):
    """The options of a backend that has none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Backend:
    """One quantization library, described.

    adapter: `"module:attr"` of the worker-side `run(job, report, result)`; None for the built-in
        streaming backend, which needs no child process.
    library: the import name that must exist in the interpreter; distribution: its name on PyPI.
    extra: quantkit's optional dependency that installs it.
    layout: the on-disk layout that it writes.
    methods: scheme name → the library's own name of it (shown to users, stamped in the card).
    folding: scheme name → how the method rewrites kept tensors (absent: "none").
    calibrated: schemes that need calibration tokens.
    unsupported: a reason why this recipe cannot run in this backend, or None.
    """

    name: str
    adapter: str | None
    library: str
    distribution: str
    extra: str
    layout: str
    methods: Mapping[str, str]
    calibrated: frozenset[str] = frozenset()
    folding: Mapping[str, Folding] = field(default_factory=dict)
    options: type[BaseModel] = NoOptions
    kv_caches: tuple[str, ...] = ("none",)
    saves_state: bool = False
    unsupported: Callable[[Recipe], str | None] | None = None


class ModelOptOptions(BaseModel):
    """What a ModelOpt recipe may set under `options`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    algorithm: Literal["max", "mse", "smoothquant", "awq_lite", "awq_full", "awq_clip"] | None = (
        None
    )
    """The calibration algorithm; None is the one ModelOpt pairs with the scheme."""


def _modelopt_unsupported(recipe: Recipe) -> str | None:
    if recipe.overrides:
        return "ModelOpt recipes have one scheme; overrides are not supported"
    if recipe.on_nan == "keep16":
        return "on_nan=keep16 is not supported by ModelOpt"
    return None


MODELOPT = Backend(
    name="modelopt",
    adapter="quantkit.backends.modelopt:run",
    library="modelopt",
    distribution="nvidia-modelopt",
    extra="modelopt",
    layout="modelopt",
    methods={
        "fp8": "FP8",
        "nvfp4": "NVFP4",
        "w8a8": "W8A8_SQ_PER_CHANNEL",
        "w4a16": "W4A16_AWQ",
    },
    calibrated=frozenset({"fp8", "nvfp4", "w8a8", "w4a16"}),
    folding={"w8a8": "multiplier", "w4a16": "norms"},
    options=ModelOptOptions,
    kv_caches=("none", "fp8", "nvfp4"),
    saves_state=True,
    unsupported=_modelopt_unsupported,
)

_BUILT_IN = (MODELOPT,)


@cache
def backends() -> dict[str, Backend]:
    """Every known backend by name, the built-in ones first."""
    found = {backend.name: backend for backend in _BUILT_IN}
    for entry in entry_points(group="quantkit.backends"):
        backend = entry.load()
        if not isinstance(backend, Backend):
            raise InputError(
                f"The plugin {entry.name} ({entry.value}) is a {type(backend).__name__}, "
                "not a quantkit.registry.Backend.",
                hint=f"ask the makers of {entry.dist.name if entry.dist else entry.name}",
                code="backend.bad_plugin",
            )
        found.setdefault(backend.name, backend)
    return found


def backend_named(name: str) -> Backend:
    """The backend of that name; InputError with the known ones otherwise."""
    known = backends()
    if name not in known:
        raise InputError(
            f"There is no backend {name!r}; known are {', '.join(sorted(known))}.",
            hint="quantkit methods",
            code="backend.unknown",
        )
    return known[name]


def refusals(backend: Backend, recipe: Recipe, scheme: Scheme) -> list[str]:
    """Every reason why the backend cannot do what the recipe asks, before anything is loaded."""
    reasons = []
    if scheme.name not in backend.methods:
        known = ", ".join(sorted(backend.methods))
        reasons.append(
            f"{backend.name} does not write the scheme {scheme.name} (it writes {known})"
        )
    if recipe.kv_cache not in backend.kv_caches:
        known = ", ".join(backend.kv_caches)
        reasons.append(
            f"{backend.name} cannot quantize the KV cache as {recipe.kv_cache} ({known})"
        )
    own = backend.unsupported(recipe) if backend.unsupported else None
    return [*reasons, own] if own else reasons
