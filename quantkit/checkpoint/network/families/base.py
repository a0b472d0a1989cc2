"""What is known of a model family and cannot be read off its tensors or its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Experts:
    """How a family's checkpoints name and store its routed experts; Qwen3's by default.

    block, router: the module that holds the experts, and the routing layer in it. leaves: the three
    projections of one expert (gate, up, down). fused: whether all experts lie in two 3-D tensors,
    input_first: each as [in, out], interleaved: gate and up in alternating rows. biased: whether
    router and experts have biases. shared: the module of the shared expert where the config does
    not count it, shared_gate: whether that has a gate. stepped: whether every
    `decoder_sparse_step`-th layer has experts, rather than all from `first_k_dense_replace` on.
    """

    block: str = "mlp"
    router: str = "gate"
    leaves: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    fused: bool = False
    input_first: bool | None = None
    interleaved: bool = False
    biased: bool = False
    shared: str | None = None
    shared_gate: bool = False
    stepped: bool = False


@dataclass(frozen=True)
class Family:
    """What models of some `model_type`s have in common; Llama's by default.

    types: values of `model_type`, of the language model or of the config around it.
    derivable: whether names and shapes of all tensors follow from a config.json.
    uniform: whether every layer has the same seven linear layers, under Llama's names.
    sizes: what a config.json may leave to Transformers' class, less what follows from others.
    tied: whether the output head is the embedding where the config does not say.
    qkv_bias, qk_norm, sinks: biases of the three projections, norms of queries and keys a head, and
    attention sinks, whatever the config says. gated_queries: q_proj holds an output gate too.
    fused_qkv, fused_gate_up: whether the checkpoint holds these as one tensor.
    norms: the norms of a layer. norm_offset: what a norm adds to its weight.
    transposed: whether linear layers are stored as [in, out] (Conv1D).
    own_linear: whether its linear layers are of a class of its own, which libraries leave alone.
    sliding: whether all layers attend to a window where the config states one.
    dotted_scales: whether FP8 scales are named `x.scale` where others have `x.weight_scale_inv`.
    towers: parts of the names of modules outside of the language model that other families lack.
    network: which network of the runtime computes it; None: Transformers' own module.
    gguf: how a GGUF file of this architecture holds the weights: as they are, or with the rows of
    queries and keys permuted; None: otherwise.
    """

    types: tuple[str, ...] = ()
    derivable: bool = False
    uniform: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False
    gated_queries: bool = False
    fused_qkv: bool = False
    fused_gate_up: bool = False
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_offset: float = 0.0
    transposed: bool = False
    own_linear: bool = False
    sliding: bool = False
    dotted_scales: bool = False
    towers: frozenset[str] = frozenset()
    experts: Experts = Experts()
    network: Literal["decoder"] | None = None
    gguf: Literal["plain", "permuted"] | None = None

    @property
    def known(self) -> bool:
        """Whether anyone wrote down what this family is like; else all of it is assumed."""
        return bool(self.types)
