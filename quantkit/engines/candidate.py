"""What the rules of an engine look at: a checkpoint, or a plan for one, without its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantkit.modules import Kind
from quantkit.schemes import Scheme


@dataclass(frozen=True)
class Part:
    """One linear module of the checkpoint: `shape` is [out, in], or [experts, out, in].

    scheme: None for 16 bit. packing: the variant of the layout; for ModelOpt and Ascend the
    library's name of the algorithm.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    scheme: Scheme | None = None
    packing: str = ""
    experts: int = 0
    """Of a fused 3-D tensor: how many."""

    @property
    def rows(self) -> int:
        return self.shape[-2]

    @property
    def columns(self) -> int:
        return self.shape[-1]


@dataclass(frozen=True)
class Candidate:
    """`config` is config.json, `settings` the quantization settings as an engine reads them."""

    config: Mapping[str, Any]
    layout: str
    settings: Mapping[str, Any]
    parts: Mapping[str, Part]
    kv_cache: str = "none"
    unequal_globals: tuple[str, ...] = field(default=())
    """Parents of fused groups whose FP4 global scales differ (seen in tensors only)."""
