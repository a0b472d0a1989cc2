"""Which serving engine loads which checkpoint, as far as its layout and scheme decide (data).

Sources: vLLM `quantization/modelopt.py` (QUANT_ALGOS), SGLang `quantization/modelopt_quant.py`
(FP8 and FP4 configurations), compared with a real reload where that is possible.
"""

from __future__ import annotations

from dataclasses import dataclass

_MODELOPT_ALGOS: dict[str, tuple[str, ...]] = {
    "FP8": ("vllm", "sglang"),
    "NVFP4": ("vllm", "sglang"),
    "FP8_PER_CHANNEL_PER_TOKEN": ("vllm",),
    "FP8_PB_WO": ("vllm",),
    "W4A16_NVFP4": ("vllm",),
    "MXFP8": ("vllm",),
}
EXPORT_ONLY = "export only: neither vLLM nor SGLang loads this format (it is for TensorRT-LLM)"
SILENT_GARBAGE = {
    "modelopt": (
        "Transformers ignores quant_method modelopt: it loads this checkpoint without an error and "
        "generates garbage. Serve it with vLLM or SGLang."
    )
}
"""Layout → what to warn of where an engine loads it wrongly without an error."""


@dataclass(frozen=True)
class Support:
    """Engines that load a layout with one of the library's algorithms."""

    engines: tuple[str, ...]

    @property
    def export_only(self) -> bool:
        return not self.engines

    def describe(self) -> str:
        """The engines' names, or what "export only" means."""
        names = {"vllm": "vLLM", "sglang": "SGLang", "transformers": "Transformers"}
        return ", ".join(names[e] for e in self.engines) if self.engines else EXPORT_ONLY


def support(layout: str, algorithm: str) -> Support:
    """Who loads a checkpoint of this layout and algorithm (the library's own scheme name)."""
    if layout == "modelopt":
        return Support(_MODELOPT_ALGOS.get(algorithm, ()))
    return Support(("vllm", "sglang", "transformers"))
