"""What every backend refuses by what its `Backend` says; its own reasons are its `unsupported`."""

from __future__ import annotations

from quantkit.backends.registry.backend import Backend
from quantkit.checkpoint.schemes import Scheme
from quantkit.recipe.model import Recipe


def refusals(backend: Backend, recipe: Recipe, scheme: Scheme, device: str) -> list[str]:
    """Every reason why the backend cannot do what the recipe asks, before anything is loaded."""
    if scheme.name not in backend.methods:
        known = ", ".join(sorted(backend.methods))
        return [f"{backend.name} does not write the scheme {scheme.name} (it writes {known})"]
    reasons = []
    if recipe.kv_cache not in backend.kv_caches:
        known = ", ".join(backend.kv_caches)
        reasons.append(
            f"{backend.name} cannot quantize the KV cache as {recipe.kv_cache} ({known})"
        )
    if recipe.overrides and not backend.overrides:
        reasons.append(f"{backend.name} recipes have one scheme; overrides are not supported")
    own = backend.unsupported(recipe) if backend.unsupported else None
    if own:
        return [*reasons, own]
    method = backend.method(recipe)
    if method.accelerator and device == "cpu":
        reasons.append(
            f"{backend.distribution} runs {method.algorithm} on an accelerator only, and the "
            "device is cpu"
        )
    return reasons
