"""DeepSeek 2 and 3: latent attention by its sizes, experts after the first dense layers."""

from quantkit.checkpoint.network.families.base import Family

FAMILIES = (Family(types=("deepseek_v2", "deepseek_v3"), derivable=True),)
