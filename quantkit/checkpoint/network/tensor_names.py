"""The tensor names of a 16-bit checkpoint of a family, from its config alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quantkit.checkpoint.network.config import is_tied, text_size
from quantkit.checkpoint.network.families import family
from quantkit.checkpoint.network.fp8_blocks import states_blocks, weight_block
from quantkit.checkpoint.network.language import text_config
from quantkit.checkpoint.network.sizes import Sizes
from quantkit.errors import InputError

_BLOCK_FP8 = ("_proj.weight", "_with_mqa.weight", ".w1.weight", ".w2.weight", ".w3.weight")


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether the names of this family's tensors can be derived."""
    return family(config).derivable


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
    kin = family(config)
    yield from (f"{norm}.weight" for norm in kin.norms)
    yield from (f"self_attn.{name}" for name in _attention(config, size))
    if _has_experts(config, size, layer):
        yield from (f"{kin.experts.block}.{name}" for name in _experts(config, size))
    else:
        both = ("gate_up_proj",) if kin.fused_gate_up else ("gate_proj", "up_proj")
        yield from (f"mlp.{leaf}.weight" for leaf in (*both, "down_proj"))


def _attention(config: Mapping[str, Any], size: Sizes) -> Iterator[str]:
    kin, text = family(config), text_config(config)
    if size.latent_rank:
        query = ["q_a_proj", "q_a_layernorm", "q_b_proj"] if size.query_rank else ["q_proj"]
        leaves = [*query, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
    elif kin.fused_qkv:
        leaves = ["qkv_proj", "o_proj"]
    else:
        leaves = ["q_proj", "k_proj", "v_proj", "o_proj"]
    yield from (f"{leaf}.weight" for leaf in leaves)
    if kin.qkv_bias or (text.get("attention_bias") and not size.latent_rank):
        yield from (f"{leaf}.bias" for leaf in leaves if leaf != "o_proj")
    if kin.qk_norm or text.get("use_qk_norm"):
        yield from ("q_norm.weight", "k_norm.weight")
    if kin.sinks:
        yield "sinks"


def _experts(config: Mapping[str, Any], size: Sizes) -> Iterator[str]:
    experts = family(config).experts
    gate, up, down = experts.leaves
    yield f"{experts.router}.weight"
    if experts.fused:
        yield from ("experts.gate_up_proj", "experts.down_proj")
        if experts.biased:
            yield f"{experts.router}.bias"
            yield from ("experts.gate_up_proj_bias", "experts.down_proj_bias")
    else:
        for expert in range(size.experts):
            yield from (f"experts.{expert}.{leaf}.weight" for leaf in (gate, up, down))
    shared = experts.shared
    if text_config(config).get("n_shared_experts"):
        shared = "shared_experts"
    if shared:
        yield from (f"{shared}.{leaf}.weight" for leaf in ("gate_proj", "up_proj", "down_proj"))
    if experts.shared_gate:
        yield f"{shared}_gate.weight"


def _has_experts(config: Mapping[str, Any], size: Sizes, layer: int) -> bool:
    text = text_config(config)
    if not size.experts or layer in (text.get("mlp_only_layers") or ()):
        return False
    if family(config).experts.stepped:
        step = text.get("decoder_sparse_step") or text.get("moe_layer_freq") or 1
        return bool((layer + 1) % int(step) == 0)
    return layer >= int(text.get("first_k_dense_replace") or 0)
