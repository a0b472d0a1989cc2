"""Which serving engine loads which checkpoint, as far as its layout and scheme decide (data).

Sources: vLLM 0.32 `quantization/{modelopt,compressed_tensors,auto_gptq,auto_awq,inc}`, SGLang
`quantization/modelopt_quant.py` and its documented platform table, Transformers 5.17, compared with
a real reload where that is possible on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

NAMES = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "transformers": "Transformers",
    "llama.cpp": "llama.cpp",
}
_ALL = ("vllm", "sglang", "transformers")

_LOADS: dict[str, dict[str, tuple[str, ...]]] = {
    "modelopt": {
        "FP8": ("vllm", "sglang"),
        "NVFP4": ("vllm", "sglang"),
        "FP8_PER_CHANNEL_PER_TOKEN": ("vllm",),
        "FP8_PB_WO": ("vllm",),
        "W4A16_NVFP4": ("vllm",),
        "MXFP8": ("vllm",),
    },
    "compressed-tensors": {
        "fp8": _ALL,
        "fp8_dynamic": _ALL,
        "fp8_block": _ALL,
        "w8a8": _ALL,
        "w8a8_dynamic": _ALL,
        "w8a16": _ALL,
        "w4a16": _ALL,
        "nvfp4": ("vllm", "sglang"),
        "nvfp4a16": ("vllm",),
        "mxfp4": ("vllm",),
        "mxfp4a16": ("vllm",),
        "mxfp8": ("vllm",),
    },
    "gptq": {
        "w8a16": _ALL,
        "w4a16": _ALL,
        "w3a16": ("transformers",),
        "w2a16": ("transformers",),
    },
    "awq": {"w4a16": _ALL},
    "auto-round": {
        "w8a16": _ALL,
        "w4a16": _ALL,
        "w3a16": ("transformers",),
        "w2a16": ("transformers",),
    },
    "gguf": {"gguf_q4_k_m": ("llama.cpp", "sglang")},
    "ascend": {
        "w8a8": ("sglang",),
        "w8a8_dynamic": ("sglang",),
        "w4a4_dynamic": ("sglang",),
    },
}
"""Layout → scheme → engines; ModelOpt's formats go by its own algorithm names."""

SILENT_GARBAGE = {
    "modelopt": (
        "Transformers ignores quant_method modelopt: it loads this checkpoint without an error and "
        "generates garbage. Serve it with vLLM or SGLang."
    )
}
"""Layout → what to warn of where an engine loads it wrongly without an error."""


@dataclass(frozen=True)
class Support:
    """Engines that load a checkpoint; `export_only` when neither vLLM nor SGLang is one of them."""

    layout: str
    engines: tuple[str, ...]

    @property
    def export_only(self) -> bool:
        return not {"vllm", "sglang"} & set(self.engines)

    def describe(self) -> str:
        """The engines' names, after "export only" where no serving engine is among them."""
        named = ", ".join(NAMES[engine] for engine in self.engines)
        if not self.export_only:
            return f"{named} on Ascend NPUs" if self.layout == "ascend" else named
        other = "TensorRT-LLM" if self.layout == "modelopt" else named or "no engine known here"
        return f"export only: neither vLLM nor SGLang loads this format (it is for {other})"


def support(layout: str, algorithm: str, scheme: str) -> Support:
    """Who loads a checkpoint of this layout, made by this algorithm of its library, or scheme."""
    known = _LOADS.get(layout, {})
    return Support(layout, known.get(algorithm if layout == "modelopt" else scheme, ()))
