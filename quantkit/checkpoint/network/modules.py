"""What a tensor of a checkpoint is, from its name, shape and the config alone (standard library).

No model class is loaded: the parts of a network that must stay in 16 bit (embeddings, output head,
routers, norms, vision and audio towers, multi-token-prediction layers) are found by structure.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quantkit.checkpoint.network.config import expert_count, text_size
from quantkit.checkpoint.network.families import tower_names
from quantkit.checkpoint.network.fused_experts import FUSED_EXPERTS, FUSED_LEAVES, expert_block
from quantkit.checkpoint.network.multimodal import LanguageModel, language_model
from quantkit.checkpoint.network.patterns import matches

Kind = Literal[
    "linear", "experts", "head", "embedding", "router", "tower", "mtp", "norm", "other"
]  # fmt: skip

FUSED_GROUPS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
"""Siblings that serving engines merge into one linear layer."""

_HEADS = {"lm_head", "output", "embed_out", "output_layer", "score", "head"}
_ROUTERS = {"shared_expert_gate", "gate_up_router", "wg", "moe_gate", "expert_gate"}
_ROUTING = {"routing", "gating"}
"""Words of a compound name (`gating_network`), outside of attention."""
_SMALL_GATES = {"in_proj_a", "in_proj_b", "in_proj_ba"}
CONTROLS = {"x_proj", "dt_proj"}
"""What steers a state-space layer (Jamba, Mamba): small, and as fragile as a router."""
_TOWERS = {
    "visual", "vision_tower", "vision_model", "vision_encoder", "vision_embed_tokens", "vit",
    "multi_modal_projector", "mm_projector", "embed_vision", "image_newline", "resampler",
    "audio_tower", "audio_model", "audio_encoder", "embed_audio", "aligner", "connector",
    "token2wav", "code2wav",
}  # fmt: skip
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Module:
    """One weight-carrying module of a 16-bit checkpoint.

    `shape` is [out, in], or [experts, rows, columns] for a fused expert tensor; `tensor` is the
    weight's own name in the file.
    """

    name: str
    kind: Kind
    tensor: str
    shape: tuple[int, ...]


_MLP_PARENTS = {"mlp", "ffn", "feed_forward", "block_sparse_moe", "experts", "shared_expert"}

PRESETS: dict[str, Callable[[Module], bool]] = {
    "@linear": lambda m: m.kind in ("linear", "experts"),
    "@mlp": lambda m: not _MLP_PARENTS.isdisjoint(m.name.split(".")),
    "@experts": lambda m: m.kind == "experts" or (".experts." in m.name and m.kind == "linear"),
    "@attention": lambda m: "attn" in m.name or "attention" in m.name,
    "@head": lambda m: m.kind == "head",
    "@embeddings": lambda m: m.kind == "embedding",
    "@routers": lambda m: m.kind == "router",
    "@towers": lambda m: m.kind == "tower",
    "@mtp": lambda m: m.kind == "mtp",
}
"""Names for parts of a network that a recipe's `targets` and `ignore` may use."""


def classify(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> list[Module]:
    """Every module with a weight, in the checkpoint's order, with its kind.

    `shapes` maps tensor names to the unpacked shapes of a 16-bit checkpoint.
    """
    parents_of_experts = {
        name.split(".experts.")[0] for name in shapes if ".experts." in name
    }  # fmt: skip
    context = _Context(
        vocabulary=text_size(config, "vocab_size"),
        experts=expert_count(config),
        layers=text_size(config, "num_hidden_layers"),
        expert_parents=parents_of_experts,
        towers=tower_names(config),
        language=language_model(shapes, config),
    )
    found = []
    for tensor, shape in shapes.items():
        name = _module_of(tensor, shape)
        if name is not None:
            found.append(Module(name, _kind(name, shape, context), tensor, shape))
    return found


def linear_modules(modules: Iterable[Module]) -> list[Module]:
    """The modules that a scheme could apply to: 2-D weights and fused experts, of any kind."""
    return [m for m in modules if len(m.shape) >= 2 and m.kind not in ("norm", "other")]


def named_by(module: Module, entries: Iterable[str]) -> str | None:
    """The first entry (preset or pattern) of a list that names the module, or None."""
    for entry in entries:
        preset = PRESETS.get(entry)
        if preset(module) if preset else matches(module.name, entry):
            return entry
    return None


def fused_groups(names: Collection[str]) -> list[tuple[str, ...]]:
    """Modules that engines merge into one, as tuples of full names (two or more members)."""
    present = set(names)
    groups = []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        for group in FUSED_GROUPS:
            if leaf == group[0]:
                siblings = (f"{parent}.{member}" if parent else member for member in group)
                members = tuple(s for s in siblings if s in present)
                if len(members) > 1:
                    groups.append(members)
    return groups


def in_tower(name: str, own: frozenset[str]) -> bool:
    """Whether a module or tensor belongs to a vision or audio tower; `own` are the names of its
    family's (`tower_names`)."""
    parts = name.split(".")
    return not (_TOWERS.isdisjoint(parts) and own.isdisjoint(parts))


def expert_groups(names: Collection[str]) -> list[tuple[str, ...]]:
    """The experts of each mixture, as tuples of full names: engines give them one scheme."""
    groups = defaultdict(list)
    for name in names:
        if block := expert_block(name):
            groups[block].append(name)
    return [tuple(members) for members in groups.values()]


def layer_index(name: str) -> int | None:
    """The decoder layer a module belongs to, None for those outside of the stack."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


def block_names(names: Iterable[str]) -> list[str]:
    """What the names of layers start with, before the number of their decoder block."""
    found = (_LAYER.search(name) for name in names)
    return sorted({one.string[: one.start(1)].rstrip(".") for one in found if one})


@dataclass(frozen=True)
class _Context:
    vocabulary: int
    experts: int
    layers: int
    expert_parents: set[str]
    towers: frozenset[str]
    language: LanguageModel | None


def _module_of(tensor: str, shape: tuple[int, ...]) -> str | None:
    if tensor.endswith(".weight"):
        return tensor[: -len(".weight")]
    leaf = tensor.rpartition(".")[2]
    if len(shape) == 3 and leaf in FUSED_EXPERTS:
        return tensor
    return None


def _kind(name: str, shape: tuple[int, ...], context: _Context) -> Kind:
    parts = name.split(".")
    leaf, parent = parts[-1], ".".join(parts[:-1])
    if in_tower(name, context.towers):
        return "tower"
    index = layer_index(name)
    beyond = index is not None and 0 < context.layers <= index
    if "mtp" in parts or "nextn" in parts or beyond:
        return "mtp" if len(shape) >= 2 else "norm"
    if _outside(name, shape, context):
        return "tower"
    if len(shape) == 3:
        return "experts" if ".experts" in name or leaf in FUSED_LEAVES else "other"
    if len(shape) == 1:
        return "norm" if "norm" in leaf or leaf.startswith("ln") else "other"
    if len(shape) != 2:
        return "other"
    if leaf in _HEADS and (index is None):
        return "head"
    if names_embedding(name):
        return "embedding"
    if index is None and context.vocabulary and shape[0] == context.vocabulary:
        return "embedding"
    beside_experts = parent in context.expert_parents and leaf != "experts"
    routes = beside_experts and shape[0] in (context.experts, 1)
    if routes or leaf in _SMALL_GATES | CONTROLS or leaf.endswith("_coefs") or _routes(parts):
        return "router"
    return "linear"


def _outside(name: str, shape: tuple[int, ...], context: _Context) -> bool:
    """Whether a module of a multi-modal model is neither in the blocks of its language model nor
    its head, nor an embedding or norm beside the blocks."""
    language, parts = context.language, name.split(".")
    if language is None or name.startswith(language.blocks):
        return False
    if parts[-1] in _HEADS and layer_index(name) is None:
        return context.vocabulary not in (0, shape[0])
    within = len(shape) == 1 or names_embedding(name)
    return not (within and language.beside(name))


def names_embedding(name: str) -> bool:
    """Whether a module's name says that its rows are looked up, in a tower too."""
    leaf = name.rpartition(".")[2]
    return "embed" in name.lower() or leaf in ("wte", "wpe", "tok_embeddings")


def _routes(parts: list[str]) -> bool:
    """Whether a component of a path routes: `gate`, `router` in any compound, as in `router.layer`
    and `gate.router_mlp`. The gate of an attention multiplies its output, and
    routes nothing."""
    inside = {"self_attn", "attn", "attention"}.isdisjoint(parts)
    return any(
        part in _ROUTERS
        or "router" in part.split("_")
        or (inside and (part == "gate" or not _ROUTING.isdisjoint(part.split("_"))))
        for part in parts
    )
