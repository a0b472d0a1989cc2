"""What a search is asked for: `--set` of `--method auto`, its own keys apart from the recipe's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from math import inf
from typing import Any

import yaml

from quantkit.errors import InputError
from quantkit.recipe.documents import meant, parse_yaml
from quantkit.recipe.units import parse_bytes
from quantkit.validation.search.scorer import OWN, SCORERS

SCHEMES = ("w4a16", "w4a16:32", "nvfp4a16", "fp8_dynamic", "w8a16")
"""What is chosen from unless told otherwise, as far as the engine loads it."""


@dataclass(frozen=True)
class Budget:
    """Exactly one of the first three is set.

    target_bits: the most stored bits a weight, scales included, over all layers that may be
    quantized, those left in 16 bit among them. max_bytes: of the checkpoint's weights. max_kl: the
    most mean KL divergence, in nats a token, measured on the whole model. schemes, samples: what is
    chosen from, and windows of text. scorer: whose sensitivities (`options.scorer`).
    """

    target_bits: float | None = None
    max_bytes: int | None = None
    max_kl: float | None = None
    schemes: tuple[str, ...] = SCHEMES
    samples: int = 16
    scorer: str = OWN

    @property
    def described(self) -> str:
        """The target as it is set."""
        name, value = next((n, v) for n in _TARGETS if (v := getattr(self, n)) is not None)
        return f"{name}={value}"


_TARGETS = ("target_bits", "max_bytes", "max_kl")
_SCORER = "options.scorer"
_KEYS = tuple(entry.name for entry in fields(Budget) if entry.name != "scorer")
_HINT = "for example --set target_bits=5.4, --set max_bytes=5GB or --set max_kl=0.02"


def split_changes(changes: Sequence[str]) -> tuple[Budget, list[str]]:
    """The budget, and the changes that are the recipe's. Raises InputError."""
    found: dict[str, Any] = {}
    rest = []
    for change in changes:
        key, sign, text = change.partition("=")
        if key in _KEYS and sign:
            found[key] = _value(key, text)
        elif key == _SCORER and sign:
            found["scorer"] = _scorer(text)
        else:
            rest.append(change)
    targets = [key for key in _TARGETS if key in found]
    if len(targets) != 1:
        told = f"has {' and '.join(targets)}" if targets else "has no target"
        raise InputError(
            f"--method auto {told}; it takes exactly one of {', '.join(_TARGETS)}.",
            hint=_HINT,
            code="search.target",
        )
    if "max_kl" in found and found.get("scorer", OWN) != OWN:
        raise InputError(
            f"{_SCORER}={found['scorer']} gives no KL, so max_kl cannot be searched with it.",
            hint=f"target_bits or max_bytes, or {_SCORER}={OWN}",
            code="search.scorer",
        )
    return Budget(**found), rest


def _scorer(text: str) -> str:
    if text not in SCORERS:
        raise InputError(
            f"--set {_SCORER}={text}: there is no such scorer.{meant(text, SCORERS)}",
            hint=f"one of {', '.join(SCORERS)}",
            code="search.scorer",
        )
    return text


def _value(key: str, text: str) -> Any:
    try:
        value = parse_yaml(text)
    except (yaml.YAMLError, ValueError):
        value = text
    if key in ("target_bits", "max_kl") and isinstance(value, str):  # YAML reads 1e-3 as a text
        with suppress(ValueError):
            value = float(value)
    if key == "schemes":
        value = value.split(",") if isinstance(value, str) else value
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            return tuple(one.strip() for one in value)
    elif key == "max_bytes" and isinstance(value, str):
        return parse_bytes("max_bytes", value)
    elif not isinstance(value, bool) and isinstance(value, int | float) and 0 < value < inf:
        whole = key in ("max_bytes", "samples")
        if not whole or value == int(value):
            return int(value) if whole else float(value)
    raise InputError(f"--set {key}={text} is no value of it.", hint=_HINT, code="search.target")
