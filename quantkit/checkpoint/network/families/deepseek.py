"""DeepSeek 2 and 3: latent attention by its sizes, experts after the first dense layers; DeepSeek 4
has scales of other names."""

from quantkit.checkpoint.network.families.base import Family

FAMILIES = (
    Family(types=("deepseek_v2", "deepseek_v3"), derivable=True),
    Family(types=("deepseek_v4",), dotted_scales=True),
)
