"""A quantized checkpoint's tensors sorted by module, and its configuration's name patterns."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import translate
from typing import TYPE_CHECKING, Any, Literal

from quantkit.checkpoint.network.config import is_tied, missing_head
from quantkit.checkpoint.network.expert_layout import held_input_first
from quantkit.checkpoint.network.fused_experts import FUSED_EXPERTS
from quantkit.checkpoint.network.modules import Module, classify, linear_modules
from quantkit.checkpoint.network.patterns import compiled
from quantkit.engines.aliases import aliases_of
from quantkit.formats.base import LayerSpec, TensorSpec, is_kv_cache_tensor

if TYPE_CHECKING:
    import torch

    from quantkit.checkpoint.directory import Checkpoint, TensorInfo

WEIGHT_SUFFIXES = ("weight", "weight_packed", "qweight")

Parts = Mapping[str, "TensorInfo"]
"""The tensors of one module, by suffix."""


@dataclass(frozen=True)
class Inventory:
    """`modules`: name → suffix → header; `holders`: every module that holds a tensor."""

    modules: Mapping[str, Parts]
    holders: frozenset[str]

    def fused(self, module: str) -> bool:
        """Whether the module is a fused 3-D expert tensor."""
        inside = f"{module}."
        return any(not part.name.startswith(inside) for part in self.modules[module].values())


def take(checkpoint: Checkpoint, suffixes: frozenset[str]) -> Inventory:
    """Sort the tensors of a checkpoint by module.

    A tensor is `module.suffix`; a fused expert tensor is its module's name, and its companions
    `module_suffix` (ModelOpt). KV-cache scales belong to no module.
    """
    modules: dict[str, dict[str, TensorInfo]] = {}
    holders = set()
    for name, info in checkpoint.tensors.items():
        module, suffix = _split(name, len(info.shape), suffixes)
        if suffix and not is_kv_cache_tensor(name):
            modules.setdefault(module, {})[suffix] = info
        holders.add(module)
    return Inventory(modules, frozenset(holders))


def linears(
    inventory: Inventory,
    config: Mapping[str, Any],
    unpacked: Callable[[str, Parts], tuple[int, ...] | None],
) -> list[Module]:
    """The modules that a configuration may declare, with their unpacked shapes.

    `unpacked` gives a module's weight shape as a 16-bit checkpoint would hold it. Embeddings are
    included: some layouts name them.
    """
    shapes = {}
    for module, parts in inventory.modules.items():
        shape = unpacked(module, parts)
        if shape is not None:
            shapes[module if inventory.fused(module) else f"{module}.weight"] = shape
    modules = linear_modules(classify(shapes, config))
    return [m for m in modules if len(m.shape) == 2 or m.kind == "experts"]


def is_linear(module: Module) -> bool:
    """Whether a target "Linear" means the module: all but embeddings, tables and fused experts."""
    leaf = module.name.rpartition(".")[2]
    return len(module.shape) == 2 and module.kind != "embedding" and "embed" not in leaf


def widen_input(
    name: str, shape: tuple[int, ...], factor: int, checkpoint: Checkpoint
) -> tuple[int, ...]:
    """The shape with its input dimension `factor` times as long (codes packed along it)."""
    wide = (*shape[:-1], shape[-1] * factor)
    if len(shape) != 3 or not held_input_first(name, shape, checkpoint, factor):
        return wide
    return (shape[0], shape[1] * factor, shape[2])


def layer_spec(
    module: Module, checkpoint: Checkpoint, scheme: Callable[[tuple[int, int]], LayerSpec]
) -> LayerSpec:
    """`scheme`'s spec for a module; fused experts get their count and orientation."""
    if len(module.shape) == 2:
        return scheme((module.shape[0], module.shape[1]))
    experts, rows, columns = module.shape
    transposed = held_input_first(module.tensor, module.shape, checkpoint)
    spec = scheme((columns, rows) if transposed else (rows, columns))
    return LayerSpec(spec.scheme, spec.packing, spec.shape, experts, transposed)


def fused(expected: dict[str, TensorSpec], spec: LayerSpec) -> dict[str, TensorSpec]:
    """`expected` of one expert → of the fused tensor (a leading dimension, perhaps transposed)."""
    if not spec.experts:
        return expected

    def widen(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        stacked = (spec.experts, *(reversed(shape) if spec.transposed else shape))
        scalar = not shape or shape == (1,)
        return [stacked, shape, (spec.experts, 1, 1)] if scalar else [stacked]

    return {
        suffix: TensorSpec(
            tensor.role,
            tensor.dtypes,
            tuple(dict.fromkeys(new for shape in tensor.shapes for new in widen(shape))),
            tensor.required,
        )
        for suffix, tensor in expected.items()
    }


def expert(
    tensors: Mapping[str, torch.Tensor], spec: LayerSpec, index: int
) -> dict[str, torch.Tensor]:
    """The tensors of one expert of a fused layer, as `read` takes them."""
    assert spec.experts, "not a fused layer"
    result = {}
    for suffix, tensor in tensors.items():
        shared = not tensor.dim() or tensor.shape[0] != spec.experts
        one = tensor if shared else tensor[index]
        result[suffix] = one.T if spec.transposed and one.dim() == 2 else one
    return result


def tied_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the output head that the lists of a model may hold though no tensor has them: of a
    tied one, or of one that does not say."""
    heads = ("lm_head", "language_model.lm_head", "model.lm_head", "output")
    return heads if is_tied(config) or missing_head(config, False) else ()


@dataclass(frozen=True)
class Pattern:
    """A name pattern of a configuration: how `text` matches is what `kind` says."""

    entry: str
    kind: Literal["exact", "path", "prefix", "regex"]
    """`path`: a run of whole name parts anywhere in the name, as engines read ModelOpt's lists."""
    text: str


@dataclass
class Matcher:
    """Finds which entry of a (possibly long) list names a module, the list's order first."""

    patterns: list[Pattern]
    exact: dict[str, int] = field(default_factory=dict)
    path: dict[str, int] = field(default_factory=dict)
    prefix: dict[str, int] = field(default_factory=dict)
    regex: list[tuple[int, re.Pattern[str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for index, pattern in enumerate(self.patterns):
            if pattern.kind == "regex":
                self.regex.append((index, compiled(pattern.text, pattern.entry)))
            else:
                table = {"exact": self.exact, "path": self.path, "prefix": self.prefix}
                table[pattern.kind].setdefault(pattern.text, index)

    def indices(self, name: str) -> list[int]:
        """Positions of every entry that names `name`."""
        return sorted(
            self._looked_up(name) + [index for index, regex in self.regex if regex.match(name)]
        )

    def _looked_up(self, name: str) -> list[int]:
        found = [self.exact[name]] if name in self.exact else []
        if self.path:
            parts = name.split(".")
            ends = range(len(parts), 0, -1)
            runs = (".".join(parts[start:end]) for end in ends for start in range(end))
            found += [self.path[run] for run in runs if run in self.path]
        if self.prefix:
            starts = (name[:end] for end in range(len(name) + 1))
            found += [self.prefix[start] for start in starts if start in self.prefix]
        return found

    def entry(self, name: str) -> str | None:
        """The first entry that names `name`."""
        found = self.indices(name)
        return self.patterns[found[0]].entry if found else None

    def unmatched(self, inventory: Inventory, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Entries that name no module of the checkpoint nor its tied head, by no engine's name."""
        names = {*inventory.holders, *tied_names(config)}
        left = self._unused(names, {pattern.entry for pattern in self.patterns})
        left = self._unused(aliases_of(names, config), left) if left else left
        entries = (pattern.entry for pattern in self.patterns)
        return tuple(dict.fromkeys(entry for entry in entries if entry in left))

    def _unused(self, names: set[str], entries: set[str]) -> set[str]:
        used = {index for name in names for index in self._looked_up(name)}
        used |= {i for i, regex in self.regex if any(regex.match(name) for name in names)}
        return entries - {self.patterns[index].entry for index in used}


def glob_pattern(entry: str) -> Pattern:
    """A shell wildcard, anchored at both ends (a trailing star alone is fast), or a module path."""
    head = entry[:-1]
    if entry.endswith("*") and not any(c in head for c in "*?["):
        return Pattern(entry, "prefix", head)
    if any(c in entry for c in "*?["):
        return Pattern(entry, "regex", translate(entry))
    return Pattern(entry, "path", entry)


def not_converted(entry: str) -> Pattern:
    """An entry of Transformers' `modules_to_not_convert`: a module path, whose star is any text
    and which names all that is below it."""
    if "*" not in entry:
        return Pattern(entry, "path", entry)
    text = ".*".join(re.escape(part) for part in entry.split("*"))
    return Pattern(entry, "regex", f"{text}(\\.|$)")


def sort_modules(
    modules: Iterable[Module],
    ignore: Callable[[str], str | None],
    target: Callable[[Module], LayerSpec | None],
) -> tuple[dict[str, LayerSpec], dict[str, str], tuple[str, ...]]:
    """Split modules into declared, ignored (with the entry) and undeclared."""
    layers: dict[str, LayerSpec] = {}
    ignored: dict[str, str] = {}
    undeclared = []
    for module in modules:
        entry = ignore(module.name)
        spec = None if entry is not None else target(module)
        if entry is not None:
            ignored[module.name] = entry
        elif spec is not None:
            layers[module.name] = spec
        else:
            undeclared.append(module.name)
    return layers, ignored, tuple(undeclared)


def _split(name: str, dimensions: int, suffixes: frozenset[str]) -> tuple[str, str]:
    parent, _, leaf = name.rpartition(".")
    if leaf in suffixes or leaf in ("weight", "bias"):
        return parent, leaf
    for stem in FUSED_EXPERTS:
        if leaf == stem and dimensions == 3:
            return name, "weight"
        suffix = leaf.removeprefix(f"{stem}_")
        if suffix != leaf and suffix in suffixes | {"bias"}:
            return name[: -len(suffix) - 1], suffix
    return parent, ""
