"""Which engines read which layout and scheme at all; for a model in particular, see `judge`."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.engines.loadable import BY_ALGORITHM
from quantkit.engines.rules import FormatRule, engines

NAMES = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "transformers": "Transformers",
    "llama.cpp": "llama.cpp",
}

_TRANSFORMERS: dict[str, tuple[str, ...]] = {
    "compressed-tensors": (
        "fp8", "fp8_dynamic", "fp8_block", "w8a8", "w8a8_dynamic", "w8a16", "w4a16",
    ),
    "gptq": ("w8a16", "w4a16", "w3a16", "w2a16"),
    "awq": ("w4a16",),
    "auto-round": ("w8a16", "w4a16", "w3a16", "w2a16"),
}  # fmt: skip
"""Layout → schemes that Transformers 5.17 loads and computes with, by a real reload."""

_LLAMA_CPP = {"gguf": ("gguf_q4_k_m",)}

SILENT_GARBAGE = {
    "modelopt": (
        "Transformers ignores quant_method modelopt: it loads this checkpoint without an error and "
        "generates garbage. Serve it with vLLM or SGLang."
    )
}
"""Layout → what to warn of where an engine loads it wrongly without an error."""


@dataclass(frozen=True)
class Support:
    """Engines that read a layout; `export_only` when neither vLLM nor SGLang is one of them.

    refusing: those of them whose rules refuse this model's layers all the same; unknown: those
    that have no rules for this model (see `judge`).
    """

    layout: str
    engines: tuple[str, ...]
    refusing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def loading(self) -> tuple[str, ...]:
        excepted = (*self.refusing, *self.unknown)
        return tuple(engine for engine in self.engines if engine not in excepted)

    @property
    def export_only(self) -> bool:
        return not {"vllm", "sglang"} & set(self.engines)

    def describe(self) -> str:
        """The engines' names, after "export only" where no serving engine is among them."""
        named = ", ".join(NAMES[engine] for engine in self.loading)
        if not self.export_only:
            doubt = " and ".join(NAMES[engine] for engine in self.unknown)
            if not named:
                return (
                    f"unknown for this model in {doubt}"
                    if doubt
                    else "no engine known here, for this model's shapes"
                )
            named += " on Ascend NPUs" if self.layout == "ascend" else ""
            return f"{named}; unknown for this model in {doubt}" if doubt else named
        other = "TensorRT-LLM" if self.layout == "modelopt" else named or "no engine known here"
        return f"export only: neither vLLM nor SGLang loads this format (it is for {other})"


def support(layout: str, algorithm: str, scheme: str) -> Support:
    """Who loads a checkpoint of this layout, made by this algorithm of its library, or scheme."""
    key = algorithm if layout in BY_ALGORITHM else scheme
    found = [name for name, engine in engines().items() if _reads(engine.formats.get(layout), key)]
    found += ["transformers"] if scheme in _TRANSFORMERS.get(layout, ()) else []
    found += ["llama.cpp"] if scheme in _LLAMA_CPP.get(layout, ()) else []
    return Support(layout, tuple(found))


def _reads(rule: FormatRule | None, key: str) -> bool:
    scheme = rule.schemes.get(key) if rule else None
    return scheme is not None and scheme.moe != "only"
