"""What a tensor of a checkpoint is, from its name, shape and the config alone (standard library).

No model class is loaded: the parts of a network that must stay in 16 bit (embeddings, output head,
routers, norms, vision and audio towers, multi-token-prediction layers) are found by structure.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from quantkit.errors import InputError

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
_ROUTERS = {"router", "shared_expert_gate", "gate_up_router", "wg"}
_SMALL_GATES = {"in_proj_a", "in_proj_b", "in_proj_ba"}
_CONTROLS = {"x_proj", "dt_proj"}
"""What steers a state-space layer (Jamba, Mamba): small, and as fragile as a router."""
FUSED_EXPERTS = ("gate_up_proj", "down_proj", "gate_proj", "up_proj")
"""Leaves of fused 3-D expert tensors that are written as a layer an expert."""
_OTHER_EXPERTS = ("input_linear", "output_linear")
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
    "@attention": lambda m: "attn" in m.name or "attention" in m.name,
    "@head": lambda m: m.kind == "head",
    "@embeddings": lambda m: m.kind == "embedding",
    "@routers": lambda m: m.kind == "router",
    "@towers": lambda m: m.kind == "tower",
    "@mtp": lambda m: m.kind == "mtp",
}
"""Names for parts of a network that a recipe's `targets` and `ignore` may use."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config: itself, or nested in a multi-modal one."""
    for key in ("text_config", "llm_config", "language_config"):
        nested = config.get(key)
        if isinstance(nested, dict) and "hidden_size" in nested:
            return nested
    thinker = config.get("thinker_config")
    if isinstance(thinker, dict):
        return text_config(thinker)
    return config


_DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "gemma": {"head_dim": 256},
    "gemma2": {"head_dim": 256},
    "gemma3_text": {
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
    },
    "glm4": {"head_dim": 128},
    "gpt_oss": {"head_dim": 64},
    "qwen3": {"head_dim": 128},
    "qwen3_vl_text": {"head_dim": 128},
    "qwen3_vl_moe_text": {"head_dim": 128},
}  # fmt: skip
"""Sizes that a config.json may leave to Transformers' config class, by the language model's type;
not those that follow from others (head_dim from the hidden size)."""


def text_size(config: Mapping[str, Any], key: str) -> int:
    """A size of the language model: as config.json states it, else its family's default, else 0."""
    text = text_config(config)
    kind = str(text.get("model_type") or f"{config.get('model_type')}_text")
    return _integer(text[key]) if key in text else _DEFAULTS.get(kind, {}).get(key, 0)


def positions(config: Mapping[str, Any]) -> int | None:
    """The longest text that a network can be given, None where its config does not say."""
    inner = text_config(config)
    keys = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
    stated = [inner[key] for key in keys if isinstance(inner.get(key), int) and inner[key] > 0]
    return stated[0] if stated else None


def expert_count(config: Mapping[str, Any]) -> int:
    """Routed experts a layer, 0 for a dense model (Doge says so by `is_moe`)."""
    text = text_config(config)
    if text.get("is_moe") is False:
        return 0
    for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        value = text.get(key)
        if isinstance(value, int) and value > 0:
            return value
    return 0


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head shares the embedding's weight.

    The outermost statement counts; Transformers' default is True for configs that are silent in
    families that tie (Gemma), and False for the others.
    """
    for level in (config, text_config(config)):
        if isinstance(level.get("tie_word_embeddings"), bool):
            return bool(level["tie_word_embeddings"])
    return str(text_config(config).get("model_type", "")).startswith("gemma")


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


def matches(name: str, pattern: str) -> bool:
    """Whether an ignore or override entry names a module.

    `re:` entries are regular expressions matched from the start (compressed-tensors' rule); others
    are exact names, or globs when they hold a wildcard.
    """
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return name == pattern or (any(c in pattern for c in "*?[") and fnmatchcase(name, pattern))


def pattern_fault(entry: str) -> str | None:
    """Why a `re:` entry is no regular expression, None for one that is and for any other entry."""
    if not entry.startswith("re:"):
        return None
    return regex_fault(entry.removeprefix("re:"))


def regex_fault(text: str) -> str | None:
    """Why a text is no regular expression, None for one that is."""
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error) or "it nests too deeply"
    return None


def compiled(text: str, entry: str) -> re.Pattern[str]:
    """The regular expression that an entry of a checkpoint's configuration holds."""
    if fault := regex_fault(text):
        raise InputError(
            f"The quantization configuration holds the pattern {entry!r}, which is no regular "
            f"expression: {fault}.",
            hint="correct the pattern in quantization_config, as in its ignore or targets",
            code="format.pattern",
        )
    return re.compile(text)


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


def in_tower(name: str) -> bool:
    """Whether a module or tensor belongs to a vision or audio tower."""
    return not _TOWERS.isdisjoint(name.split("."))


def expert_groups(names: Collection[str]) -> list[tuple[str, ...]]:
    """The experts of each mixture, as tuples of full names: engines give them one scheme."""
    groups = defaultdict(list)
    for name in names:
        parent, found, _ = name.partition(".experts.")
        if found:
            groups[parent].append(name)
    return [tuple(members) for members in groups.values()]


def layer_index(name: str) -> int | None:
    """The decoder layer a module belongs to, None for those outside of the stack."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


@dataclass(frozen=True)
class _Context:
    vocabulary: int
    experts: int
    layers: int
    expert_parents: set[str]


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
    if in_tower(name):
        return "tower"
    index = layer_index(name)
    beyond = index is not None and 0 < context.layers <= index
    if "mtp" in parts or "nextn" in parts or beyond:
        return "mtp" if len(shape) >= 2 else "norm"
    if len(shape) == 3:
        expert_like = ".experts" in name or leaf in (*FUSED_EXPERTS, *_OTHER_EXPERTS)
        return "experts" if expert_like else "other"
    if len(shape) == 1:
        return "norm" if "norm" in leaf or leaf.startswith("ln") else "other"
    if len(shape) != 2:
        return "other"
    if leaf in _HEADS and (index is None):
        return "head"
    if "embed" in name.lower() or leaf in ("wte", "wpe", "tok_embeddings"):
        return "embedding"
    if index is None and context.vocabulary and shape[0] == context.vocabulary:
        return "embedding"
    beside_experts = parent in context.expert_parents and leaf != "experts"
    routes = beside_experts and shape[0] in (context.experts, 1)
    if routes or leaf in _SMALL_GATES | _CONTROLS or leaf.endswith("_coefs") or _routes(parts):
        return "router"
    return "linear"


def _routes(parts: list[str]) -> bool:
    """Whether a component of a path routes: `gate`, `router` in any compound (`modality_router`),
    as in `router.layer` and `gate.router_mlp`. The gate of an attention multiplies its output, and
    routes nothing."""
    inside = {"self_attn", "attn", "attention"}.isdisjoint(parts)
    return any(
        part in _ROUTERS or (part == "gate" and inside) or "router" in part.split("_")
        for part in parts
    )


def _integer(value: object) -> int:
    return value if isinstance(value, int) else 0
