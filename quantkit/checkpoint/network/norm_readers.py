"""Which linear layers read what a norm gives, by the names of Llama, GPT and OPT kin."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

_ATTENTION_NORMS = {"input_layernorm", "self_attn_layer_norm", "ln_1", "attention_norm"}
_MLP_NORMS = {
    "post_attention_layernorm", "pre_feedforward_layernorm", "ln_2", "ffn_norm",
    "final_layer_norm", "pre_mlp_layernorm", "pre_ff_layernorm",
}  # fmt: skip
_FEEDFORWARD_NORMS = {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
_ATTENTION_INPUTS = {
    "q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa", "c_attn", "wq",
    "wk", "wv", "query_key_value", "W_pack", "in_proj", "in_proj_qkv", "in_proj_z", "in_proj_b",
    "in_proj_a", "in_proj_qkvz", "in_proj_ba", "wqkv",
}  # fmt: skip
_MLP_INPUTS = {
    "gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "w1", "w3", "gate", "router",
    "shared_expert_gate", "dense_h_to_4h",
}  # fmt: skip
_OWN_INPUTS = {"q_a_layernorm": {"q_b_proj"}, "kv_a_layernorm": {"kv_b_proj"}}
_OUTPUTS = {"o_proj", "out_proj", "dense", "wo", "c_proj", "down_proj", "w2", "fc2"}


def norm_readers(norm: str, modules: Iterable[str]) -> tuple[str, ...]:
    """Those of the modules that read the norm of a decoder layer; none where nobody knows."""
    layer, _, leaf = norm.rpartition(".")
    inside = [m for m in modules if m.startswith(f"{layer}.")]
    beside = {m.rpartition(".")[2] for m in inside if m.rpartition(".")[0] == layer} - {leaf}
    if leaf in _OWN_INPUTS:
        leaves = _OWN_INPUTS[leaf]
    elif leaf == "post_attention_layernorm" and not beside.isdisjoint(_FEEDFORWARD_NORMS):
        return ()  # Gemma 2 and 3, OLMo 2: applied after attention, read by no linear layer
    elif leaf in _ATTENTION_NORMS:
        parallel = not any("norm" in name or name.startswith("ln") for name in beside)
        leaves = _ATTENTION_INPUTS | _MLP_INPUTS if parallel else _ATTENTION_INPUTS
    elif leaf in _MLP_NORMS:
        leaves = _MLP_INPUTS
    else:
        return ()
    return tuple(m for m in inside if m.rpartition(".")[2] in leaves)


def smoothable(modules: Mapping[str, int], planned: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Norms whose scales may move into what reads them → those layers: all of them are `planned`,
    and no other layer of theirs may read the norm too.

    `modules` are names in the model, and the inputs that a linear module has (0: it is none).
    """
    layers = {name.rpartition(".")[0] for name in planned}
    blocks = {block for layer in layers for block in (layer, layer.rpartition(".")[0])}
    found = {}
    for norm in modules:
        block, _, leaf = norm.rpartition(".")
        if block not in blocks or leaf not in _ATTENTION_NORMS | _MLP_NORMS:
            continue
        inside = [name for name in modules if name.startswith(f"{block}.")]
        readers = norm_readers(norm, inside)
        if readers and set(readers) <= set(planned) and not _unknown(readers, leaf, modules):
            found[norm] = readers
    return found


def _unknown(readers: tuple[str, ...], leaf: str, modules: Mapping[str, int]) -> bool:
    """Whether a neighbour of the readers may read the norm too, or a reader another one."""
    parents = {name.rpartition(".")[0] for name in readers}
    beside = {name: width for name, width in modules.items() if name.rpartition(".")[0] in parents}
    if leaf in _MLP_NORMS and any(n.rpartition(".")[2] in _ATTENTION_INPUTS for n in beside):
        return True
    width = modules[readers[0]]
    return any(
        inputs == width and name not in readers and name.rpartition(".")[2] not in _OUTPUTS
        for name, inputs in beside.items()
    )
