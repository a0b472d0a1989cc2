"""Qwen 2 and 3: dense, mixtures of experts and with a vision tower; the gated attention of later
ones."""

from quantkit.checkpoint.network.families.base import Experts, Family

FAMILIES = (
    Family(
        types=("qwen2",), derivable=True, uniform=True, qkv_bias=True, network="decoder",
        gguf="plain",
    ),
    Family(
        types=("qwen2_moe",), derivable=True, qkv_bias=True, network="decoder",
        experts=Experts(shared="shared_expert", shared_gate=True, stepped=True),
    ),
    Family(
        types=("qwen2_vl_text", "qwen2_vl", "qwen2_5_vl_text", "qwen2_5_vl"), derivable=True,
        qkv_bias=True,
    ),
    Family(
        types=("qwen3",), derivable=True, uniform=True, qk_norm=True, sizes={"head_dim": 128},
        network="decoder", gguf="plain",
    ),
    Family(
        types=("qwen3_moe",), derivable=True, qk_norm=True, sliding=True, network="decoder",
        experts=Experts(stepped=True),
    ),
    Family(
        types=("qwen3_vl_text", "qwen3_vl"), derivable=True, qk_norm=True, sizes={"head_dim": 128},
    ),
    Family(
        types=("qwen3_vl_moe_text", "qwen3_vl_moe"), derivable=True, qk_norm=True,
        sizes={"head_dim": 128}, experts=Experts(fused=True, input_first=True, stepped=True),
    ),
    Family(
        types=(
            "qwen3_next", "qwen3_5_text", "qwen3_5", "qwen3_5_moe_text", "qwen3_5_moe",
        ),
        gated_queries=True, norm_offset=1.0,
    ),
    Family(types=("qwen4_exp_text", "qwen4_exp"), norm_offset=1.0),
)  # fmt: skip
