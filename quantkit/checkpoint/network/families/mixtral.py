"""Mixtral: experts w1, w3 (gate and up) and w2 in a block of their own name."""

from quantkit.checkpoint.network.families.base import Experts, Family

FAMILIES = (
    Family(
        types=("mixtral",), derivable=True, sliding=True, network="decoder",
        experts=Experts(block="block_sparse_moe", leaves=("w1", "w3", "w2")),
    ),
)  # fmt: skip
