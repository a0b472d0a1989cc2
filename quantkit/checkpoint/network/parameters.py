"""How many parameters compute a token: all of them, less the experts that it does not choose."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from quantkit.checkpoint.network.config import expert_count, experts_per_token


def active_parameters(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> int:
    """Of a network with these tensors in 16 bit; routed experts count by the share of them that a
    token is given."""
    routed = sum(prod(shape) for name, shape in shapes.items() if ".experts." in name)
    count = expert_count(config)
    idle = routed * (1 - experts_per_token(config) / count) if count else 0
    return round(sum(map(prod, shapes.values())) - idle)
