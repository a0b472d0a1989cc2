"""GPT-OSS: attention sinks, and fused experts with biases whose gate and up rows alternate."""

from quantkit.checkpoint.network.families.base import Experts, Family

FAMILIES = (
    Family(
        types=("gpt_oss",), derivable=True, sinks=True, sizes={"head_dim": 64},
        experts=Experts(
            router="router", fused=True, input_first=True, interleaved=True, biased=True
        ),
    ),
    Family(
        types=("openai_privacy_filter",), sinks=True,
        experts=Experts(router="router", fused=True, input_first=True, biased=True),
    ),
)  # fmt: skip
