"""What `engines_gpu.py` asks of each engine: the checkpoints, and the flags it starts with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from quantkit.engines.online import online_named
from quantkit.validation.subjects.base import Opening

VERSIONS = {"vllm": "0.26.0", "sglang": "0.5.17"}
"""The engines that `engines_gpu.yaml` names."""

EAGER: dict[str, dict[str, Any]] = {
    "vllm": {
        "--enforce-eager": True,
        "--gpu-memory-utilization": 0.08,
        "--kv-cache-memory-bytes": 1 << 30,
    },
    "sglang": {  # the FlashAttention of sglang-kernel is left behind, its samplers want a compiler
        "--attention-backend": "triton",
        "--sampling-backend": "pytorch",
        "--grammar-backend": "none",
        "--disable-cuda-graph": True,
        "--mem-fraction-static": 0.3,
        "--max-total-tokens": 16384,
    },
}
"""What several engines on one card are started with."""

SMALL = ("calibration.samples=32", "calibration.sequence_length=256")
G64 = "group_size=64"
SCALES_KEPT = (("VLLM_USE_DEEP_GEMM_E8M0", "0"),)


@dataclass(frozen=True)
class Case:
    """A checkpoint: made of a model (demo, wide, mixture, wrapped; no method: itself) by a method.

    environment: variables of the engine. online: the method by which it quantizes while it loads.
    engines: those that are asked.
    """

    name: str
    model: str
    method: str = ""
    settings: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    online: str = ""
    engines: tuple[str, ...] = tuple(EAGER)

    def opening(self, device: str, engine: str) -> Opening:
        """On the device, rounded while it loads where the case is of that."""
        return Opening(device, online=online_named(self.online, engine) if self.online else None)

    @property
    def compiles(self) -> bool:
        """Whether SGLang compiles Marlin for it, which took minutes at first use: 4-bit weights,
        and 8-bit ones alone."""
        return any(part in self.method for part in ("w4a16", "w8a16", "fp4", "int4"))


_MIXTURES = ("rtn_fp8_dynamic", "rtn_fp8_block", "rtn_w8a8_dynamic", "rtn_w4a16", "rtn_w8a16",
             "rtn_nvfp4a16", "rtn_mxfp4a16")  # fmt: skip
_CALIBRATED_MIXTURES: dict[str, tuple[str, ...]] = {
    "modelopt_fp8": SMALL,
    "modelopt_nvfp4": SMALL,
    "modelopt_nvfp4_experts_only": SMALL,
    "llmcompressor_fp8_dynamic": (),
    "llmcompressor_w4a16": SMALL,
    "llmcompressor_nvfp4": SMALL,
    "gptqmodel_w4a16": SMALL,
    "autoround_w4a16": (*SMALL, "options.iters=10"),
}
_WRAPPED: dict[str, tuple[str, ...]] = {
    "rtn_fp8_dynamic": (),
    "rtn_w8a8_dynamic": (),
    "rtn_w4a16": (G64,),
    "rtn_nvfp4a16": (),
    "modelopt_fp8": SMALL,
    "modelopt_nvfp4": SMALL,
    "llmcompressor_w4a16": (*SMALL, G64),
    "gptqmodel_w4a16": (*SMALL, G64),
    "autoround_w4a16": (*SMALL, G64, "options.iters=10"),
}
CASES = (
    *(Case(f"{model} BF16", model) for model in ("demo", "wide", "mixture")),
    Case("wrapped BF16", "wrapped", engines=("vllm",)),  # SGLang has no Idefics3
    *(
        Case(f"wrapped {method}", "wrapped", method, settings, engines=("vllm",))
        for method, settings in _WRAPPED.items()
    ),
    *(
        Case(f"wide {method}", "wide", method)
        for method in ("rtn_fp8_dynamic", "rtn_fp8_block", "rtn_w8a8_dynamic", "rtn_w4a16",
                       "rtn_w8a16", "rtn_nvfp4a16", "rtn_mxfp4a16", "rtn_mxfp8")
    ),
    Case("wide rtn_fp8_block, scales kept", "wide", "rtn_fp8_block", (),
         SCALES_KEPT, engines=("vllm",)),
    Case("wide rtn_w4a16 as GPTQ", "wide", "rtn_w4a16", ("options.layout=gptq",)),
    Case("wide rtn_w4a16 as AWQ", "wide", "rtn_w4a16",
         ("options.layout=awq", "symmetric=false")),
    Case("wide modelopt_fp8", "wide", "modelopt_fp8", SMALL),
    Case("wide modelopt_fp8, FP8 KV", "wide", "modelopt_fp8", (*SMALL, "kv_cache=fp8")),
    Case("wide modelopt_nvfp4", "wide", "modelopt_nvfp4", SMALL),
    Case("wide llmcompressor_nvfp4", "wide", "llmcompressor_nvfp4", SMALL),
    Case("wide llmcompressor_mxfp4", "wide", "llmcompressor_mxfp4"),
    Case("wide llmcompressor_w4a16", "wide", "llmcompressor_w4a16", SMALL),
    Case("wide gptqmodel_w4a16", "wide", "gptqmodel_w4a16", SMALL),
    Case("wide gptqmodel_awq_w4a16", "wide", "gptqmodel_awq_w4a16", SMALL),
    Case("wide autoround_w4a16", "wide", "autoround_w4a16", (*SMALL, "options.iters=10")),
    Case("demo modelopt_int4_awq", "demo", "modelopt_int4_awq", (*SMALL, G64)),
    Case("demo rtn_fp8_block", "demo", "rtn_fp8_block"),
    Case("demo rtn_w4a16", "demo", "rtn_w4a16", (G64,)),
    *(Case(f"mixture {method}", "mixture", method) for method in _MIXTURES),
    *(
        Case(f"mixture {method}", "mixture", method, settings)
        for method, settings in _CALIBRATED_MIXTURES.items()
    ),
    Case("wide online fp8", "wide", online="fp8"),
    Case("wide online mxfp8", "wide", online="mxfp8"),
    Case("mixture online fp8", "mixture", online="fp8"),
    *(
        Case(f"wide online {name}", "wide", online=name, engines=("vllm",))
        for name in ("fp8_per_channel", "fp8_per_block")
    ),
    Case("mixture online int8", "mixture", online="int8_per_channel_weight_only",
         engines=("vllm",)),
)  # fmt: skip


def cases_of(engine: str) -> list[Case]:
    """What an engine is asked; of SGLang's first what needs no long compilation.

    It keeps the scales of FP8 blocks as they are, so the runtime beside it does too.
    """
    asked = [case for case in CASES if engine in case.engines]
    if engine != "sglang":
        return asked
    kept = [replace(case, environment=SCALES_KEPT) for case in asked]
    return sorted(kept, key=lambda case: case.compiles)
