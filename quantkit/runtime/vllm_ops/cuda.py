"""vLLM's compiled CUDA operators (CUTLASS, Machete, Marlin), without importing vLLM.

They come from the managed environment `vllm-cuda`, from a vLLM beside this quantkit, or from the
library that a variable names. The library keeps to torch's stable ABI; its operators' arguments
change between versions, and are given by name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Set
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from quantkit.backends.environments.managed import ready
from quantkit.runtime.vllm_ops import library as vllm_library

LIBRARY = "_C_stable_libtorch.abi3.so"
FOR_EXPERTS = ("_moe_C_stable_libtorch.abi3.so", "_moe_C.abi3.so")
"""What the library beside it, for mixtures of experts, may be called."""

CREATE = "quantkit env create vllm-cuda"
SWITCH = "QUANTKIT_VLLM_CUDA_OPERATORS"
"""`off`, or the path of the library to take."""

_ARGUMENTS = {
    "cutlass_scaled_mm": {"out", "a", "b", "a_scales", "b_scales", "bias"},
    "gptq_marlin_repack": {"b_q_weight", "perm", "size_k", "size_n", "num_bits", "is_a_8bit"},
    "marlin_gemm": {
        "a", "c_or_none", "b_q_weight", "b_bias_or_none", "b_scales", "a_scales", "global_scale",
        "b_zeros_or_none", "g_idx_or_none", "perm_or_none", "workspace", "b_type_id", "size_m",
        "size_n", "size_k", "is_k_full", "use_atomic_add", "use_fp32_reduce", "is_zp_float",
    },
}  # fmt: skip
"""Operator → every argument that it has in vLLM 0.26 or 0.33."""

_ARGUMENTS_FOR_EXPERTS = {
    "moe_align_block_size": {
        "topk_ids", "num_experts", "block_size", "sorted_token_ids", "experts_ids",
        "num_tokens_post_pad", "maybe_expert_map", "scatter_idx",
    },
    "moe_wna16_marlin_gemm": {
        "a", "c_or_none", "b_q_weight", "b_bias_or_none", "b_scales", "a_scales", "global_scale",
        "b_zeros_or_none", "g_idx_or_none", "perm_or_none", "workspace", "sorted_token_ids",
        "expert_ids", "num_tokens_past_padded", "topk_weights", "moe_block_size", "top_k",
        "mul_topk_weights", "b_type_id", "size_m", "size_n", "size_k", "is_full_k", "is_k_full",
        "use_atomic_add", "use_fp32_reduce", "is_zp_float", "thread_k", "thread_n",
        "blocks_per_sm",
    },
}  # fmt: skip
"""The same of those for mixtures of experts."""

_ARGUMENTS_OF_MACHETE = {
    "machete_prepack_B": {"B", "a_type", "b_type", "group_scales_type"},
    "machete_mm": {
        "A", "B", "b_type", "out_type", "group_scales", "group_zeros", "group_size",
        "channel_scales", "token_scales", "schedule",
    },
}  # fmt: skip
"""The same of Machete's, which only builds for Hopper have."""


@cache
def missing() -> str | None:
    """Why vLLM's CUDA operators are not to be had, or None once they are loaded."""
    named = os.environ.get(SWITCH)
    if named == "off":
        return f"{SWITCH} is off"
    library = _library()
    if library is None:
        return f"needs vLLM's CUDA operators: {CREATE}"
    if not library.is_file():
        return f"there is no {library}"
    return vllm_library.load(library) or unlike()


@cache
def missing_for_experts() -> str | None:
    """The same of the operators for mixtures of experts, which are in a library of their own."""
    reason, library = missing(), _library()
    if reason is not None or library is None:
        return reason
    beside = next((path for path in map(library.with_name, FOR_EXPERTS) if path.is_file()), None)
    if beside is None:
        return f"there is no {FOR_EXPERTS[0]} beside {library}"
    return vllm_library.load_more(beside) or _unlike(torch.ops._moe_C, _ARGUMENTS_FOR_EXPERTS)


def missing_machete() -> str | None:
    """The same of Machete's operators."""
    return missing() or _unlike(torch.ops._C, _ARGUMENTS_OF_MACHETE)


def unlike() -> str | None:
    """Why the operators that are loaded are not those that we know, or None."""
    return _unlike(torch.ops._C, _ARGUMENTS)


def _unlike(room: Any, arguments: Mapping[str, Set[str]]) -> str | None:
    for name, known in arguments.items():
        operator = getattr(room, name, None)
        if operator is None:
            return f"this vLLM has no operator {name}"
        more = {argument.name for argument in operator.default._schema.arguments} - known
        if more:
            return f"this vLLM's {name} takes an unknown argument, {', '.join(sorted(more))}"
    return None


def call(name: str, **arguments: Any) -> Any:
    """An operator with those of the arguments that it has in this vLLM."""
    room = torch.ops._moe_C if name in _ARGUMENTS_FOR_EXPERTS else torch.ops._C
    operator = getattr(room, name).default
    return operator(*(arguments[argument.name] for argument in operator._schema.arguments))


def _library() -> Path | None:
    named = os.environ.get(SWITCH)
    return Path(named) if named else _installed()


def _installed() -> Path | None:
    python = ready("vllm-cuda")
    folders = list(python.parent.parent.glob("lib/python*/site-packages/vllm")) if python else []
    beside = find_spec("vllm")
    folders += [Path(folder) for folder in (beside and beside.submodule_search_locations) or []]
    return next((folder / LIBRARY for folder in folders if (folder / LIBRARY).is_file()), None)
