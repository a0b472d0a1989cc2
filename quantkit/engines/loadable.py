"""What the rules of an engine look at: a checkpoint, or a plan for one, without its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.checkpoint.network.modules import Kind
from quantkit.checkpoint.schemes import Scheme
from quantkit.engines.rules import model_types

BY_ALGORITHM = ("modelopt", "ascend")
"""Layouts whose rules go by the library's own name of the algorithm."""


@dataclass(frozen=True)
class LayerPart:
    """One linear module of the checkpoint: `shape` is [out, in], or [experts, out, in].

    scheme: None for 16 bit. packing: the variant of the layout; for ModelOpt and Ascend the
    library's name of the algorithm.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    scheme: Scheme | None = None
    packing: str = ""

    @property
    def rows(self) -> int:
        return self.shape[-2]

    @property
    def columns(self) -> int:
        return self.shape[-1]

    def rule_name(self, layout: str) -> str:
        """What its kind of quantization is called in an engine's rules for the layout."""
        assert self.scheme is not None
        return self.packing if layout in BY_ALGORITHM else self.scheme.name


@dataclass(frozen=True)
class Loadable:
    """`config` is config.json, `settings` the quantization settings as an engine reads them."""

    config: Mapping[str, Any]
    layout: str
    settings: Mapping[str, Any]
    parts: Mapping[str, LayerPart]
    kv_cache: str = "none"
    kv_scales: tuple[str, ...] = ()
    """Names of the KV cache's scales in the checkpoint."""

    @property
    def model_types(self) -> list[str]:
        """The model's type, then those of the models nested in it."""
        return model_types(self.config)
