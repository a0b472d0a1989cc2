"""Families of which little differs from Llama's."""

from quantkit.checkpoint.network.families.base import Family

FAMILIES = (
    Family(
        types=(
            "nemotron", "minimax_m3_vl_text", "minimax_m3_vl", "step3p5", "step3p7",
        ),
        norm_offset=1.0,
    ),
    Family(types=("olmo2",), gguf="plain"),
    Family(types=("falcon",), tied=True, own_linear=True),
    Family(
        types=(
            "biogpt", "bloom", "cohere", "cohere2", "cohere2_moe", "ctrl", "ernie4_5",
            "ernie4_5_moe", "falcon_mamba", "gpt_bigcode", "gpt_neo", "jetmoe", "lfm2",
            "lfm2_moe", "mamba", "minicpm3", "mpt", "opt", "smollm3", "starcoder2", "xglm",
            "youtu", "zamba", "zamba2", "zaya",
        ),
        tied=True,
    ),
)  # fmt: skip
