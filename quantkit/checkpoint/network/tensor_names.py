"""The tensor names of a 16-bit checkpoint of a family, from its config alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quantkit.checkpoint.network.config import is_tied, text_config, text_size
from quantkit.checkpoint.network.fp8_blocks import states_blocks, weight_block
from quantkit.checkpoint.network.sizes import Sizes
from quantkit.errors import InputError

_BIASED = ("qwen2", "qwen2_moe", "qwen2_vl_text", "qwen2_5_vl_text")
_NORMED = ("qwen3", "qwen3_moe", "gemma3_text", "qwen3_vl_text", "qwen3_vl_moe_text")
_FUSED_ATTENTION = ("phi3",)
_FUSED_MLP = ("phi3", "glm4")
_FUSED_EXPERTS = ("gpt_oss", "qwen3_vl_moe_text")
_FLAT = ("qwen2_vl", "qwen2_5_vl")
"""Families whose older config.json states the language model's sizes beside the tower's."""
_BLOCK_FP8 = ("_proj.weight", "_with_mqa.weight", ".w1.weight", ".w2.weight", ".w3.weight")
_KNOWN = (
    "llama", "mistral", "ministral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2",
    "gemma3_text", "phi3", "mixtral", "deepseek_v2", "deepseek_v3", "glm4", "glm4_moe", "gpt_oss",
    "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text",
)  # fmt: skip


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether the names of this family's tensors can be derived."""
    return _type(config) in _KNOWN


def derived_names(config: Mapping[str, Any], size: Sizes) -> list[str]:
    """Every tensor of the language model in the order of its layers, less `left_out`."""
    prefix = "model.language_model." if text_config(config) is not config else "model."
    names = [f"{prefix}embed_tokens.weight"]
    for layer in range(size.layers):
        names += [f"{prefix}layers.{layer}.{name}" for name in _layer(config, size, layer)]
    names.append(f"{prefix}norm.weight")
    names += [f"{name}_scale_inv" for name in names if _in_fp8_blocks(config, name)]
    return names if is_tied(config) else [*names, "lm_head.weight"]


def left_out(config: Mapping[str, Any]) -> list[str]:
    """What of a model is not derived from its config: its towers and draft (MTP) layers."""
    holders = [config, config.get("thinker_config") or {}]
    kinds = ("vision", "audio")
    found = [f"{k} tower" for k in kinds if any(h.get(f"{k}_config") for h in holders)]
    return [*found, "MTP layers"] if text_size(config, "num_nextn_predict_layers") else found


def stored_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `quantization_config` of a source in FP8 blocks, {} of any other.

    Raises InputError where it, or what names and shapes follow from, has another form.
    """
    settings = config.get("quantization_config") or {}
    if not isinstance(settings, Mapping):
        raise _malformed("quantization_config", settings, "an object")
    weight_block(config)
    excluded = settings.get("modules_to_not_convert") or ()
    if not isinstance(excluded, Sequence) or not all(isinstance(e, str) for e in excluded):
        raise _malformed("quantization_config.modules_to_not_convert", excluded, "a list of names")
    return settings


def _malformed(key: str, value: object, wanted: str) -> InputError:
    return InputError(
        f"config.json states {key}={value!r}, not {wanted}.",
        hint="take the model's own config.json, as it was published",
        code="plan.bad_config",
    )


def _in_fp8_blocks(config: Mapping[str, Any], name: str) -> bool:
    settings = stored_settings(config)
    excluded = settings.get("modules_to_not_convert") or ()
    stored = states_blocks(config) and name.endswith(_BLOCK_FP8)
    return stored and not any(entry in name for entry in excluded)


def _layer(config: Mapping[str, Any], size: Sizes, layer: int) -> Iterator[str]:
    kind = _type(config)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if kind in ("gemma2", "gemma3_text"):
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    if kind == "glm4":
        norms += ["post_self_attn_layernorm", "post_mlp_layernorm"]
    yield from (f"{norm}.weight" for norm in norms)
    yield from (f"self_attn.{name}" for name in _attention(config, size))
    block = "block_sparse_moe" if kind == "mixtral" else "mlp"
    if _has_experts(config, size, layer):
        yield from (f"{block}.{name}" for name in _experts(config, size))
    else:
        fused = kind in _FUSED_MLP
        leaves = ("gate_up_proj", "down_proj") if fused else ("gate_proj", "up_proj", "down_proj")
        yield from (f"mlp.{leaf}.weight" for leaf in leaves)


def _attention(config: Mapping[str, Any], size: Sizes) -> Iterator[str]:
    kind = _type(config)
    if size.latent_rank:
        query = ["q_a_proj", "q_a_layernorm", "q_b_proj"] if size.query_rank else ["q_proj"]
        leaves = [*query, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
    elif kind in _FUSED_ATTENTION:
        leaves = ["qkv_proj", "o_proj"]
    else:
        leaves = ["q_proj", "k_proj", "v_proj", "o_proj"]
    yield from (f"{leaf}.weight" for leaf in leaves)
    if kind in _BIASED or (text_config(config).get("attention_bias") and not size.latent_rank):
        yield from (f"{leaf}.bias" for leaf in leaves if leaf != "o_proj")
    normed = kind in _NORMED or bool(text_config(config).get("use_qk_norm"))
    if normed:
        yield from ("q_norm.weight", "k_norm.weight")
    if kind == "gpt_oss":
        yield "sinks"


def _experts(config: Mapping[str, Any], size: Sizes) -> Iterator[str]:
    kind = _type(config)
    yield "router.weight" if kind == "gpt_oss" else "gate.weight"
    if kind in _FUSED_EXPERTS:
        yield from ("experts.gate_up_proj", "experts.down_proj")
        if kind == "gpt_oss":
            yield from ("router.bias", "experts.gate_up_proj_bias", "experts.down_proj_bias")
    else:
        three = ("w1", "w2", "w3") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        for expert in range(size.experts):
            yield from (f"experts.{expert}.{leaf}.weight" for leaf in three)
    text = text_config(config)
    shared = {"qwen2_moe": "shared_expert"}.get(kind)
    if text.get("n_shared_experts"):
        shared = "shared_experts"
    if shared:
        yield from (f"{shared}.{x}.weight" for x in ("gate_proj", "up_proj", "down_proj"))
    if kind == "qwen2_moe":
        yield "shared_expert_gate.weight"


def _has_experts(config: Mapping[str, Any], size: Sizes, layer: int) -> bool:
    text = text_config(config)
    if not size.experts or layer in (text.get("mlp_only_layers") or ()):
        return False
    step = text.get("decoder_sparse_step") or text.get("moe_layer_freq") or 1
    if _type(config) in ("qwen2_moe", "qwen3_moe", "qwen3_vl_moe_text"):
        return bool((layer + 1) % int(step) == 0)
    return layer >= int(text.get("first_k_dense_replace") or 0)


def _type(config: Mapping[str, Any]) -> str:
    text = text_config(config)
    kind = str(text.get("model_type", ""))
    if kind in _FLAT:
        return f"{kind}_text"
    nested = text is not config
    return f"{kind}_text" if nested and not kind.endswith("_text") and "_vl" in kind else kind
