"""Phi-3: q/k/v are one tensor, and gate and up are one."""

from quantkit.checkpoint.network.families.base import Family

FAMILIES = (
    Family(
        types=("phi3",), derivable=True, fused_qkv=True, fused_gate_up=True, gguf="plain",
    ),
)  # fmt: skip
