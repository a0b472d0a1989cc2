"""Which backends exist, what each can do, and why it cannot (the parent's side; no library loads).

One file describes one backend; the adapters themselves live in `quantkit/backends/adapters/` and
run in a child process. Other packages add backends with the entry point group `quantkit.backends`,
whose values are `"module:attr"` of a `Backend`.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from pydantic import ValidationError

from quantkit.backends.registry.autoround import AUTOROUND
from quantkit.backends.registry.backend import Backend, Folding, Method, Options
from quantkit.backends.registry.gptqmodel import GPTQMODEL
from quantkit.backends.registry.llmcompressor import LLMCOMPRESSOR
from quantkit.backends.registry.modelopt import MODELOPT
from quantkit.backends.registry.msmodelslim import MSMODELSLIM
from quantkit.backends.registry.rtn import RTN
from quantkit.backends.registry.shipped import PREFIX, shipped_recipe
from quantkit.errors import InputError
from quantkit.recipe.load import as_recipe, explain_recipe, read_recipe
from quantkit.recipe.model import Recipe

__all__ = [
    "MODELOPT", "Backend", "Folding", "Method", "Options", "backend_named", "backends", "checked",
    "load_recipe",
]  # fmt: skip

_BUILT_IN = (MODELOPT, LLMCOMPRESSOR, GPTQMODEL, AUTOROUND, MSMODELSLIM, RTN)


@cache
def backends() -> dict[str, Backend]:
    """Every known backend by name, the built-in ones first."""
    found = {backend.name: backend for backend in _BUILT_IN}
    for entry in entry_points(group="quantkit.backends"):
        makers = f"ask the makers of {entry.dist.name if entry.dist else entry.name}"
        try:
            backend = entry.load()
        except Exception as error:
            raise InputError(
                f"The plugin {entry.name} ({entry.value}) cannot be imported: "
                f"{type(error).__name__}: {error}.",
                hint=f"{makers}, or uninstall it",
                code="backend.bad_plugin",
            ) from error
        if not isinstance(backend, Backend):
            raise InputError(
                f"The plugin {entry.name} ({entry.value}) is a {type(backend).__name__}, "
                "not a quantkit.backends.Backend.",
                hint=makers,
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


def load_recipe(name_or_path: str, sets: tuple[str, ...] = ()) -> Recipe:
    """The recipe of a method name or a YAML file, `--set` applied, its options checked.

    `modelopt:PATH` is one that ModelOpt ships. Raises InputError that names the file, the key path,
    the value and what is allowed.
    """
    if name_or_path.startswith(PREFIX):
        return checked(*as_recipe(shipped_recipe(name_or_path), sets, name_or_path))
    return checked(*read_recipe(name_or_path, sets))


def checked(recipe: Recipe, origin: str) -> Recipe:
    """The recipe with the options that its backend knows; InputError names `origin`."""
    backend = backend_named(recipe.backend)
    try:
        options = backend.options.model_validate(recipe.options)
    except ValidationError as error:
        raise explain_recipe(error, origin, backend.options, "options") from error
    return recipe.model_copy(update={"options": options.model_dump(exclude_none=True)})
