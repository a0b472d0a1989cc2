"""Keys that config.json and generation_config.json have beyond the source's: which do harm."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from quantkit.verification.findings import Finding, error, warning

_TOKEN_IDS = frozenset({"pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id"})
"""Keys that libraries copy into config.json from the tokenizer."""

_ENGINE_KEYS = frozenset(
    {
        "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "rotary_pct",
        "sliding_window", "layer_types", "logit_scale", "logits_scaling", "final_logit_softcapping",
        "attn_logit_softcapping", "attention_multiplier", "residual_multiplier",
        "embedding_multiplier", "text_config", "vision_config", "head_dim", "qk_layernorm",
        "attention_bias", "mlp_bias", "auto_map",
    }
)  # fmt: skip
"""Keys that engines read of any model's config, whether its class has them or not."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "repetition_penalty": (1,), "encoder_repetition_penalty": (1,), "temperature": (1,),
    "top_k": (0, 50), "top_p": (1,), "min_p": (0,), "typical_p": (1,), "epsilon_cutoff": (0,),
    "eta_cutoff": (0,), "no_repeat_ngram_size": (0,), "num_beams": (1,), "length_penalty": (1,),
    "max_new_tokens": (), "min_new_tokens": (0,), "min_length": (0,), "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],), "bad_words_ids": ([],), "forced_bos_token_id": (),
    "forced_eos_token_id": (), "sequence_bias": ({},), "stop_strings": ([],),
    "guidance_scale": (1,), "exponential_decay_length_penalty": (), "penalty_alpha": (0,),
    "diversity_penalty": (0,), "bos_token_id": (), "eos_token_id": (),
}  # fmt: skip
"""Keys of generation_config.json that change what is generated → values that do nothing."""


def judge_config(
    added: Mapping[str, Any],
    differ: Collection[str] | None,
    class_keys: Collection[str],
) -> Iterator[Finding]:
    """Dotted keys of config.json that the source lacks.

    `differ` are the top-level keys in which the completed configs differ, None where the model
    class is not known or refuses the config; `class_keys` are the ones that the class has.
    """
    harmful: list[str] = []
    odd: list[str] = []
    for key, value in added.items():
        top = key.split(".")[0]
        known = top in class_keys
        nothing = value in (None, False, [], {}) and not known
        if nothing or top.startswith("_") or (differ is not None and top not in differ):
            continue
        judged = differ is not None and top not in _TOKEN_IDS
        (harmful if judged and (known or top in _ENGINE_KEYS) else odd).append(key)
    for keys, make in ((harmful, error), (odd, warning)):
        if keys:
            yield make(
                "config.added",
                f"config.json sets {', '.join(f'{k} to {added[k]!r:.60}' for k in keys)}; the "
                "source has no such keys, and these are not the defaults of its class",
                "remove these keys; engines build another model from them",
                "config.json",
            )


def judge_generation(key: str, value: Any, config: Mapping[str, Any]) -> Iterator[Finding]:
    """A key of generation_config.json that the source's lacks; `config` is the source's model."""
    neutral = _NEUTRAL.get(key)
    if neutral is None or value is None or value in neutral or value == config.get(key):
        return
    yield error(
        "sidecar.changed",
        f"generation_config.json: {key} is {value!r:.60}, in the source absent",
        "copy generation_config.json from the source",
        "generation_config.json",
    )
