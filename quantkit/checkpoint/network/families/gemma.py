"""Gemma to Gemma 3: four norms a layer that multiply by 1 + weight, and a head that is tied.

Gemma 3n and 4 multiply by the weight itself.
"""

from quantkit.checkpoint.network.families.base import Family

_FOUR_NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)  # fmt: skip

FAMILIES = (
    Family(
        types=("gemma",), derivable=True, uniform=True, tied=True, norm_offset=1.0,
        sizes={"head_dim": 256},
    ),
    Family(
        types=("gemma2",), derivable=True, uniform=True, tied=True, norm_offset=1.0,
        sizes={"head_dim": 256}, norms=_FOUR_NORMS,
    ),
    Family(
        types=("gemma3_text", "gemma3"), derivable=True, uniform=True, tied=True, norm_offset=1.0,
        qk_norm=True, norms=_FOUR_NORMS,
        sizes={
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
            "vocab_size": 262208,
        },
    ),
    Family(types=("gemma3n_text", "gemma3n", "gemma4_text", "gemma4"), tied=True),
    Family(types=("gemma4_unified_text", "gemma4_unified"), tied=True),
    Family(
        types=("recurrent_gemma", "vaultgemma", "t5gemma", "t5gemma2_text", "t5gemma2"),
        tied=True, norm_offset=1.0,
    ),
)  # fmt: skip
