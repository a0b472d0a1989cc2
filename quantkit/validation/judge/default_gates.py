"""The gates that every checkpoint is held to, by the bits of its narrowest weights and its size.

Two kinds: what a format may cost at all, which shrinks with the model, and what it may cost beside
rounding to nearest in the same format, which holds for a model of any size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.recipe.gates import Gate, parse_gate

ALWAYS = ("weight_sqnr_margin>=0", "verify_errors<=0")

PARAMETERS = 134_515_008
"""Of the model that `BY_BITS` was set on."""

BY_BITS: dict[int, tuple[str, ...]] = {
    8: ("canary_failures<=0", "ppl_ratio<=1.05", "kl_mean<=0.05", "canary_drift<=0.1",
        "mcq_drop<=0.03", "exercise_drop<=0.1"),
    4: ("canary_failures<=2", "ppl_ratio<=1.6", "kl_mean<=0.5", "canary_drift<=0.8",
        "mcq_drop<=0.2", "exercise_drop<=0.3"),
    3: ("canary_failures<=4", "ppl_ratio<=4", "kl_mean<=1.5", "canary_drift<=2"),
    2: ("canary_failures<=4", "ppl_ratio<=10", "kl_mean<=2.5", "canary_drift<=2.5"),
}  # fmt: skip
"""Bits of the narrowest weights → the gates of their accuracy; docs/validate.md says why."""

OF_RTN: dict[int, tuple[str, ...]] = {
    8: ("kl_of_rtn<=1.25", "ppl_of_rtn<=1.02"),
    4: ("kl_of_rtn<=1.15", "ppl_of_rtn<=1.05"),
    3: ("kl_of_rtn<=1.15", "ppl_of_rtn<=1.05"),
    2: ("kl_of_rtn<=1.15", "ppl_of_rtn<=1.05"),
}
"""The same beside the baseline rounded to nearest."""

OF_PICTURES: dict[int, tuple[str, ...]] = {
    8: ("image_kl_mean<=0.08", "image_kl_of_rtn<=1.25"),
    4: ("image_kl_mean<=0.6", "image_kl_of_rtn<=1.15"),
    3: ("image_kl_mean<=2", "image_kl_of_rtn<=1.15"),
    2: ("image_kl_mean<=3", "image_kl_of_rtn<=1.15"),
}
"""The same on the words that follow a picture, of a model with a vision tower; these few words, of
questions too, lose more than a text. Those of 8 and 4 bits lie over all that docs/towers.md has."""

OF_EMBEDDINGS: dict[int, tuple[str, ...]] = {
    16: ("image_embedding_error<=0.01",),
    8: ("image_embedding_error<=0.1",),
    4: ("image_embedding_error<=0.5",),
}
"""Bits of the narrowest weights among towers and embeddings → how far what they make of a picture
may be from the baseline's."""

OF_CACHE: dict[str, tuple[str, ...]] = {
    "fp8": ("kv_ppl_ratio<=1.01", "kv_kl<=0.02", "kv_scale_off<=1.5"),
    "nvfp4": ("kv_ppl_ratio<=1.2", "kv_kl<=0.2"),
}
"""Element of the key-value cache → what it may cost beside one in 16 bit."""

_LOSSLESS = {
    "ppl_ratio": 1.0,
    "kl_mean": 0.0,
    "canary_drift": 0.0,
    "image_kl_mean": 0.0,
    "kv_ppl_ratio": 1.0,
    "kv_kl": 0.0,
}
"""Metric → its value where nothing is lost; what its limit adds shrinks with the model."""

SAME_EXPERT = {8: 0.85, 4: 0.68, 3: 0.6, 2: 0.5}
"""The same of a mixture: how likely each expert of a token must at least be the baseline's."""


def default_gates(
    schemes: Iterable[str],
    experts_per_token: int = 0,
    parameters: int = PARAMETERS,
    kv_cache: str = "none",
    *,
    tower_schemes: Iterable[str] | None = None,
) -> list[Gate]:
    """The gates of a checkpoint with layers of these schemes, or ggml types: those of the narrowest
    weights, and the strictest where no name tells how many bits they have.

    `parameters` are those that compute a token; `kv_cache` is the declared one. `tower_schemes`
    are those of the towers' layers (none: in 16 bit); None without a vision tower. Of a mixture
    (`experts_per_token` > 0) all of a token's experts must be the baseline's, which more of them
    make less likely.
    """
    bits = min((_bits(name) for name in schemes), default=max(BY_BITS))
    cache = next((gates for name, gates in OF_CACHE.items() if kv_cache.startswith(name)), ())
    pictures: tuple[str, ...] = ()
    if tower_schemes is not None:
        narrowest = min((_bits(name) for name in tower_schemes), default=16)
        pictures = OF_PICTURES[bits] + OF_EMBEDDINGS.get(narrowest, ())
    texts = (*ALWAYS, *BY_BITS[bits], *OF_RTN[bits], *pictures, *cache)
    gates = [for_size(parse_gate(text, "default"), parameters) for text in texts]
    if experts_per_token:
        limit = round(SAME_EXPERT[bits] ** experts_per_token, 2)
        gates.append(parse_gate(f"routing_agreement>={limit:g}", "default"))
    return gates


def for_size(gate: Gate, parameters: int) -> Gate:
    """The gate of a model of so many parameters: what its limit allows to lose shrinks with their
    cube root, down from the demo model's; smaller models are held to those of that one."""
    lossless = _LOSSLESS.get(gate.metric)
    if lossless is None or parameters <= PARAMETERS:
        return gate
    share = (PARAMETERS / parameters) ** (1 / 3)
    lost = float(f"{(gate.limit - lossless) * share:.2g}")
    return replace(gate, limit=lossless + lost)


def _bits(name: str) -> int:
    """The key of `BY_BITS` for a scheme or a ggml type (Q6_K, IQ2_XXS): the next one under its
    bits, which are the first digit of a name without an entry in `SCHEMES`."""
    digit = next((int(c) for c in name if c.isdigit()), max(BY_BITS))
    bits = SCHEMES[name].weight.bits if name in SCHEMES else digit
    return max((known for known in BY_BITS if known <= bits), default=min(BY_BITS))
