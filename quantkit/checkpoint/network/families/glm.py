"""GLM-4: gate and up are one tensor in the dense model, which has four norms a layer."""

from quantkit.checkpoint.network.families.base import Family

FAMILIES = (
    Family(
        types=("glm4",), derivable=True, fused_gate_up=True, sizes={"head_dim": 128},
        norms=(
            "input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm",
            "post_mlp_layernorm",
        ),
    ),
    Family(types=("glm4_moe",), derivable=True),
)  # fmt: skip
