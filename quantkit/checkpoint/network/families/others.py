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
)  # fmt: skip
