"""Llama and Mistral: the default, written down as known; Llama 4's experts."""

from quantkit.checkpoint.network.families.base import Experts, Family

FAMILIES = (
    Family(types=("llama",), derivable=True, uniform=True, network="decoder", gguf="permuted"),
    Family(types=("mistral",), derivable=True, uniform=True, sliding=True, network="decoder"),
    Family(types=("ministral",), derivable=True),
    Family(types=("mistral3",), gguf="plain"),
    Family(types=("llama4_text", "llama4"), experts=Experts(fused=True, input_first=True)),
)
