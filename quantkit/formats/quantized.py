"""The checkpoint under test, seen through its own configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from quantkit.checkpoint.directory import Checkpoint, TensorInfo
from quantkit.checkpoint.network.config import is_tied
from quantkit.checkpoint.network.modules import Module, classify
from quantkit.formats import inventory
from quantkit.formats.base import Declaration, Format, TensorSpec
from quantkit.formats.inventory import Parts

FLOAT_DTYPES = frozenset({"BF16", "F16", "F32", "F64"})


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A checkpoint with what its configuration declares and its tensors sorted by module."""

    checkpoint: Checkpoint
    layout: Format
    declaration: Declaration
    parts: Mapping[str, Parts]

    @cached_property
    def modules(self) -> dict[str, Module]:
        """Every module with a weight, at its unpacked shape."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, parts in self.parts.items():
            spec = self.declaration.layers.get(name)
            if spec is None:
                if "weight" in parts:
                    shapes[parts["weight"].name] = parts["weight"].shape
            elif spec.experts:
                rows, columns = spec.shape
                stored = (columns, rows) if spec.transposed else (rows, columns)
                shapes[name] = (spec.experts, *stored)
            else:
                shapes[f"{name}.weight"] = spec.shape
        return {m.name: m for m in classify(shapes, self.checkpoint.config)}

    @cached_property
    def expected(self) -> dict[str, dict[str, TensorSpec]]:
        """Declared layer → suffix → what it must or may hold."""
        return {
            name: self.layout.expected(spec) for name, spec in self.declaration.layers.items()
        }  # fmt: skip

    @cached_property
    def owned(self) -> dict[str, str]:
        """Tensors of declared layers that hold codes or their parameters → the module."""
        return {
            self.parts[name][suffix].name: name
            for name, roles in self.expected.items()
            for suffix, spec in roles.items()
            if spec.role != "bias" and suffix in self.parts.get(name, {})
        }

    def is_float(self, module: str) -> bool:
        """Whether a module's weight is stored in 16 bit (or wider), not as codes."""
        weight = self.parts.get(module, {}).get("weight")
        return weight is not None and weight.dtype in FLOAT_DTYPES

    def part(self, module: str, *roles: str) -> TensorInfo | None:
        """The first tensor of a declared layer that plays one of `roles`, or None."""
        for suffix, spec in self.expected.get(module, {}).items():
            if spec.role in roles and suffix in self.parts.get(module, {}):
                return self.parts[module][suffix]
        return None


def as_subject(source: Checkpoint, layout: Format) -> QuantizedCheckpoint:
    """A 16-bit checkpoint in the same form: nothing is declared quantized."""
    found = inventory.take(source, layout.quant_suffixes())
    return QuantizedCheckpoint(source, layout, Declaration("none", {}), found.modules)


def examine(checkpoint: Checkpoint, layout: Format) -> QuantizedCheckpoint:
    """Read the declaration. Raises InputError (`format.*`) when it cannot be understood.

    The written-out 16-bit head of a tied model is taken from the declared layers: engines load the
    embedding in its place, so that no ignore list needs to name it.
    """
    declaration = layout.declare(checkpoint)
    found = inventory.take(checkpoint, layout.quant_suffixes())
    subject = QuantizedCheckpoint(checkpoint, layout, declaration, found.modules)
    if is_tied(checkpoint.config):
        layers = {
            name: spec
            for name, spec in declaration.layers.items()
            if not (name in subject.modules and subject.modules[name].kind == "head")
            or not subject.is_float(name)
        }
        subject = replace(subject, declaration=replace(declaration, layers=layers))
    assert subject.expected.keys() == subject.declaration.layers.keys()
    return subject
