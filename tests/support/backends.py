"""Every method of the other libraries with the settings that make it quick on the small model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from quantkit.checkpoint.directory import open_checkpoint
from quantkit.engines import judge
from quantkit.formats.loadable import candidate
from quantkit.formats.quantized import examine
from quantkit.formats.registry import detect
from tests.support.cli import QUICK, Run, quantkit

G64 = ("--set", "group_size=64")
RTN = ("--set", "options.iters=0", "--set", "options.disable_opt_rtn=true")
TUNED = ("--set", "options.iters=1")

LIBRARIES: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "llmcompressor": {
        "llmcompressor_fp8_dynamic": ("llmcompressor_fp8_dynamic", ()),
        "llmcompressor_fp8": ("llmcompressor_fp8", ("--set", "kv_cache=fp8")),
        "llmcompressor_fp8_block": ("llmcompressor_fp8_block", ()),
        "llmcompressor_w8a8": ("llmcompressor_w8a8", ()),
        "llmcompressor_w4a16": (
            "llmcompressor_w4a16",
            (*G64, "--set", "overrides=[{match: '*.down_proj', scheme: w8a16}]"),
        ),
        "llmcompressor_w4a16_autoround": ("llmcompressor_w4a16_autoround", (*G64, *TUNED)),
        "llmcompressor_nvfp4": ("llmcompressor_nvfp4", ()),
        "llmcompressor_nvfp4a16": ("llmcompressor_nvfp4a16", ("--set", "targets=['@mlp']")),
        "llmcompressor_mxfp4": ("llmcompressor_mxfp4", ()),
    },
    "gptqmodel": {
        "gptqmodel_w4a16": ("gptqmodel_w4a16", ("--set", "on_misfit=fit")),
        "gptqmodel_w8a16": ("gptqmodel_w8a16", ()),
        "gptqmodel_w3a16": ("gptqmodel_w3a16", ("--set", "on_misfit=keep16")),
        "gptqmodel_w2a16": (
            "gptqmodel_w2a16",
            ("--set", "group_size=32", "--set", "options.act_group_aware=false",
             "--set", "options.desc_act=true"),
        ),
    },
    "autoround": {
        "autoround_w4a16": ("autoround_w4a16", (*G64, *TUNED)),
        "autoround_w3a16": ("autoround_w3a16", (*G64, *RTN)),
        "autoround_w2a16": ("autoround_w2a16", TUNED),
        "autoround_w8a16": ("autoround_w8a16", RTN),
        "autoround_gptq": ("autoround_w4a16", (*G64, *RTN, "--set", "options.format=auto_gptq")),
        "autoround_awq": (
            "autoround_w4a16",
            (*G64, *RTN, "--set", "options.format=auto_awq", "--set", "symmetric=false"),
        ),
        "autoround_llm_compressor": (
            "autoround_w4a16",
            (*G64, *RTN, "--set", "options.format=llm_compressor"),
        ),
        "autoround_nvfp4": ("autoround_nvfp4", RTN),
        "autoround_mxfp4": ("autoround_mxfp4", RTN),
        "autoround_w8a16_untuned": ("autoround_w8a16", ("--set", "options.iters=0")),
        "autoround_mxfp4_untuned": ("autoround_mxfp4", ("--set", "options.iters=0")),
        "autoround_gguf_q4_k_m": ("autoround_gguf_q4_k_m", RTN),
    },
    "modelopt": {
        "modelopt_fp8_pc_pt": ("modelopt_fp8_pc_pt", ()),
        "modelopt_fp8_pb_wo": ("modelopt_fp8_pb_wo", ()),
        "modelopt_w4a16_nvfp4": ("modelopt_w4a16_nvfp4", ()),
        "modelopt_mxfp8": ("modelopt_mxfp8", ()),
        "modelopt_w4a8_awq": ("modelopt_w4a8_awq", G64),
    },
    "msmodelslim": {
        "msmodelslim_w8a16": ("msmodelslim_w8a16", ()),
        "msmodelslim_w8a8": ("msmodelslim_w8a8", ()),
        "msmodelslim_w8a8_dynamic": ("msmodelslim_w8a8_dynamic", ()),
        "msmodelslim_w4a8_dynamic": ("msmodelslim_w4a8_dynamic", ()),
        "msmodelslim_w4a4_dynamic": (
            "msmodelslim_w4a4_dynamic",
            (*TUNED, "--set", "calibration.samples=3"),
        ),
        "msmodelslim_practice": (
            "msmodelslim_w8a8_dynamic",
            ("--set", "options.practice=default/default-w8a8"),
        ),
        "msmodelslim_practice_without_data": (
            "msmodelslim_w8a16",
            ("--set", "options.practice=default/default-w8a16"),
        ),
    },
}  # fmt: skip
"""Library → output → its method and settings."""


def make(library: str, model: Path, root: Path) -> dict[str, Run]:
    """Run all methods of a library through the command line, two at a time, into `root / name`."""

    def one(name: str) -> Run:
        method, more = LIBRARIES[library][name]
        return quantkit(
            "quantize", model, "--method", method, "--out", root / name, "--device", "cpu",
            *QUICK, *more,
        )  # fmt: skip

    names = list(LIBRARIES[library])
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


VLLM_LOADS = (
    "llmcompressor_fp8_dynamic", "llmcompressor_w8a8", "llmcompressor_w4a16", "gptqmodel_w4a16",
    "autoround_w4a16", "autoround_gptq", "autoround_llm_compressor",
)  # fmt: skip
"""Outputs that vLLM really loads."""

_ABOUT_NAMES = ("engine.ignore_", "engine.mixed_", "engine.target_", "engine.quantized_router")


def engine_alarms(path: Path, *engines: str, names_only: bool = True) -> list[str]:
    """What the replay of the engines has against a checkpoint that is known to be sound.

    `names_only` leaves out what is true of the demo model's shapes and of export-only formats.
    """
    checkpoint = open_checkpoint(path)
    subject = examine(checkpoint, detect(checkpoint))
    found = judge(candidate(subject), engines, (1,))
    reasons = (reason for verdict in found for reason in verdict.reasons)
    return [
        f"{r.code}: {r.text}" for r in reasons if not names_only or r.code.startswith(_ABOUT_NAMES)
    ]
