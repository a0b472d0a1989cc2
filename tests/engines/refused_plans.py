"""Plans as public threads describe them: each asks an engine for what it cannot do, with its code.

`thread` is where the failure was reported, or the engine's source that raises it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """A plan for `config` (config.json alone) with `method`; `flags` are refused with `code`, and
    `twin` (the same but for one thing) is accepted."""

    name: str
    config: Json
    method: str
    flags: tuple[str, ...]
    code: str
    twin: Json = field(default_factory=dict)
    twin_flags: tuple[str, ...] | None = None
    twin_method: str = ""
    thread: str = ""


DENSE: Json = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 2, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip
_MOE: Json = {
    **DENSE, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 1536, "head_dim": 128,
}  # fmt: skip
_MLA: Json = {
    **DENSE, "model_type": "deepseek_v3", "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 8,
    "n_shared_experts": 1, "moe_intermediate_size": 2048, "first_k_dense_replace": 1,
}  # fmt: skip
VLLM, SGLANG = ("--engine", "vllm"), ("--engine", "sglang")
_GLM4: Json = {
    **DENSE, "model_type": "glm4", "head_dim": 128, "intermediate_size": 13696,
    "num_key_value_heads": 2, "attention_bias": True,
}  # fmt: skip
_PHI3: Json = {"model_type": "phi3", "head_dim": None, "num_key_value_heads": 32}
_GPTQ = ("--set", "options.layout=gptq")
_HALF = {"dtype": "float16", "torch_dtype": "float16"}  # SGLang: experts in GPTQ are for these
_KV_B = ("--set", "ignore+=re:.*kv_b_proj")
_A_PROJ = ("--set", "ignore+=re:.*q_a_proj", "--set", "ignore+=re:.*kv_a_proj_with_mqa")
_DESC_ACT = ("--set", "options.act_group_aware=false", "--set", "options.desc_act=true")
_AWQ = ("--set", "options.layout=awq", "--set", "group_size=32", "--set", "symmetric=false")

PLANS: tuple[Asked, ...] = (
    # shards (pains 6)
    Asked("group size and 8 ranks", {**DENSE, "intermediate_size": 11008}, "rtn_w4a16",
          (*VLLM, "--tp", "8"), "engine.tp_group", twin_flags=(*VLLM, "--tp", "2"),
          thread="vllm#11671"),
    Asked("group size and 4 ranks, Qwen2", {**DENSE, "model_type": "qwen2",
          "intermediate_size": 18944}, "rtn_w4a16", (*SGLANG, "--tp", "8"), "engine.tp_group",
          twin_flags=(*SGLANG, "--tp", "4"), thread="vllm#5675"),
    Asked("experts and 8 ranks", _MOE, "rtn_w4a16", (*VLLM, "--tp", "8"), "engine.tp_group",
          twin_flags=(*VLLM, "--tp", "8", "--set", "group_size=64"), thread="Qwen3-VL#831"),
    Asked("experts' blocks and 8 ranks", _MOE, "rtn_fp8_block", (*VLLM, "--tp", "8"),
          "engine.block_shape", twin_flags=(*VLLM, "--tp", "4"), thread="Qwen3-VL#831"),
    Asked("blocks of a merged layer", {**DENSE, "hidden_size": 576, "intermediate_size": 1536,
          "num_attention_heads": 9, "num_key_value_heads": 3}, "rtn_fp8_block", VLLM,
          "engine.block_shape", twin_method="rtn_fp8_dynamic", thread="vLLM fp8_utils.py"),
    Asked("blocks of a layer stored merged", {**DENSE, "model_type": "phi3", "hidden_size": 3072,
          "intermediate_size": 8256, "num_key_value_heads": 32}, "rtn_fp8_block", SGLANG,
          "engine.block_shape", twin={"intermediate_size": 8192}, thread="vLLM fp8_utils.py"),
    Asked("heads and ranks", {**DENSE, "hidden_size": 896, "num_attention_heads": 14,
          "num_key_value_heads": 2, "intermediate_size": 4864}, "rtn_fp8_dynamic",
          (*VLLM, "--tp", "4"), "engine.tp_heads", twin_flags=(*VLLM, "--tp", "2"),
          thread="vllm#5675"),
    Asked("key/value heads and ranks", {**DENSE, "num_key_value_heads": 10,
          "num_attention_heads": 40, "hidden_size": 5120}, "rtn_fp8_dynamic",
          (*SGLANG, "--tp", "4"), "engine.tp_heads", twin_flags=(*SGLANG, "--tp", "2"),
          thread="vllm#5675"),
    Asked("an MLP that cannot be cut", {**DENSE, "intermediate_size": 6148}, "rtn_fp8_dynamic",
          (*VLLM, "--tp", "8"), "engine.tp_split", twin={"intermediate_size": 6144},
          thread="vllm#5675"),
    Asked("packed words and ranks", {**DENSE, "model_type": "mistral", "hidden_size": 6400,
          "num_attention_heads": 64, "head_dim": 100}, "rtn_w4a16",
          (*VLLM, "--tp", "8", *_AWQ), "engine.multiple_of", twin_flags=(*VLLM, "--tp", "4", *_AWQ),
          thread="vllm#5675"),
    Asked("Marlin tiles", {**DENSE, "hidden_size": 576, "intermediate_size": 1536,
          "num_attention_heads": 9, "num_key_value_heads": 3}, "rtn_w4a16",
          (*SGLANG, "--set", "group_size=64"), "engine.tile",
          twin_flags=(*VLLM, "--set", "group_size=64"), thread="SGLang marlin_utils.py"),
    # kernels (pains 7)
    Asked("INT8 experts", _MOE, "rtn_w8a8_dynamic", SGLANG, "engine.moe_scheme", twin_flags=VLLM,
          thread="vllm#19853"),
    Asked("MXFP4 on dense layers", DENSE, "rtn_mxfp4a16", SGLANG, "engine.scheme",
          twin_flags=VLLM, thread="llm-compressor#1427"),
    Asked("3 bits", DENSE, "gptqmodel_w3a16", VLLM, "engine.scheme",
          twin_method="gptqmodel_w4a16", thread="vLLM auto_gptq.py"),
    Asked("2 bits of AutoRound", DENSE, "autoround_w2a16", SGLANG,
          "engine.scheme", twin_method="autoround_w4a16", thread="llm-compressor#1427"),
    Asked("ModelOpt's INT4 AWQ", DENSE, "modelopt_int4_awq", VLLM, "engine.scheme",
          twin_method="modelopt_fp8", thread="vLLM modelopt.py QUANT_ALGOS"),
    Asked("ModelOpt's INT8 SmoothQuant", DENSE, "modelopt_int8_sq", SGLANG, "engine.scheme",
          twin_method="modelopt_fp8", thread="SGLang modelopt_quant.py"),
    Asked("group size 256", DENSE, "rtn_w4a16", (*SGLANG, "--set", "group_size=256"),
          "engine.group_size", twin_flags=(*SGLANG, "--set", "group_size=128"),
          thread="SGLang MARLIN_SUPPORTED_GROUP_SIZES"),
    Asked("zero points in GPTQ's layout", DENSE, "rtn_w4a16",
          (*VLLM, "--set", "options.layout=gptq", "--set", "symmetric=false"),
          "engine.asymmetric", twin_flags=(*VLLM, "--set", "options.layout=gptq"),
          thread="vLLM auto_gptq.py TYPE_MAP"),
    Asked("FP8 of ModelOpt on an A100", DENSE, "modelopt_fp8", (*SGLANG, "--gpu", "a100"),
          "engine.gpu", twin_flags=(*SGLANG, "--gpu", "h100"), thread="SGLang platform table"),
    Asked("Marlin on AMD", DENSE, "rtn_w4a16", (*SGLANG, "--gpu", "mi300x"), "engine.gpu",
          twin_flags=(*SGLANG, "--gpu", "l40s"), thread="SGLang platform table"),
    Asked("FP8 on Ascend", DENSE, "rtn_fp8_dynamic", (*SGLANG, "--gpu", "ascend-a2"),
          "engine.gpu", twin_method="rtn_w8a8_dynamic", thread="SGLang platform table"),
    Asked("Ascend's layout in vLLM", DENSE, "msmodelslim_w8a8", VLLM, "engine.layout",
          twin_flags=(*SGLANG, "--gpu", "ascend-a3"), thread="SGLang platform table"),
    Asked("GPTQ on AMD", DENSE, "rtn_w4a16", (*SGLANG, *_GPTQ, "--gpu", "mi300x"), "engine.gpu",
          twin_flags=(*SGLANG, *_GPTQ, "--gpu", "h100"),
          thread="SGLang model_config.py rocm_supported_quantization"),
    Asked("AutoRound's GPTQ packing on AMD", DENSE, "autoround_w4a16",
          (*SGLANG, "--gpu", "mi300x"), "engine.gpu", twin_flags=(*SGLANG, "--gpu", "h100"),
          thread="SGLang auto_round.py apply_gptq_quant_layer"),
    # weights that a model's own code takes apart
    Asked("packed kv_b_proj", _MLA, "rtn_w4a16", SGLANG, "engine.packing",
          twin_flags=(*SGLANG, *_KV_B), thread="SGLang deepseek_weight_loader.py"),
    Asked("NVFP4 kv_b_proj", _MLA, "rtn_nvfp4a16", SGLANG, "engine.packing",
          twin_flags=(*SGLANG, *_KV_B), thread="SGLang deepseek_weight_loader.py"),
    Asked("kv_b_proj in GPTQ's packing", {**_MLA, **_HALF, "q_lora_rank": None}, "rtn_w4a16",
          (*SGLANG, *_GPTQ), "engine.packing", twin_flags=(*SGLANG, *_GPTQ, *_KV_B),
          thread="SGLang deepseek_weight_loader.py"),
    Asked("packed kv_b_proj in 8 bit", _MLA | {"model_type": "deepseek_v2"}, "rtn_w8a16", SGLANG,
          "engine.packing", twin_method="rtn_fp8_dynamic",
          thread="SGLang deepseek_weight_loader.py"),
    Asked("latent projections in GPTQ's packing", {**_MLA, **_HALF}, "rtn_w4a16",
          (*SGLANG, *_GPTQ, *_KV_B), "engine.packing",
          twin_flags=(*SGLANG, *_GPTQ, *_KV_B, *_A_PROJ),
          thread="SGLang deepseek_weight_loader.py cat_dim"),
    # columns out of order
    Asked("experts in GPTQ of a bfloat16 model", {**_MLA, "dtype": "bfloat16"}, "rtn_w4a16",
          (*SGLANG, *_GPTQ, *_KV_B, *_A_PROJ), "engine.dtype", twin=_HALF,
          thread="SGLang gptq/schemes/gptq_moe.py:239"),
    Asked("actorder group", DENSE, "llmcompressor_w4a16",
          (*VLLM, "--set", "options.actorder=group"), "engine.act_order",
          twin_flags=(*VLLM, "--set", "options.actorder=static"),
          thread="vLLM compressed_tensors.py: no longer supported"),
    Asked("desc_act of a plan", DENSE, "gptqmodel_w4a16",
          (*VLLM, *_DESC_ACT), "engine.act_order", twin_flags=(*SGLANG, *_DESC_ACT),
          thread="vLLM: desc_act is no longer supported"),
    # a layer stored merged
    Asked("GPTQ of a layer stored merged", _GLM4, "rtn_w4a16", (*VLLM, *_GPTQ),
          "engine.ignore_overreach", twin=_PHI3, thread="vLLM gptq_utils.py"),
    Asked("blocks of a layer stored merged, GLM-4", {**_GLM4, "intermediate_size": 8256},
          "rtn_fp8_block", VLLM, "engine.block_shape", twin={"intermediate_size": 8192},
          thread="vLLM fp8_utils.py"),
    # ModelOpt's blocks
    Asked("blocks of merged parts, ModelOpt", {**DENSE, "hidden_size": 2048, "head_dim": 64,
          "intermediate_size": 8192}, "modelopt_fp8_pb_wo", (*VLLM, "--tp", "8"),
          "engine.block_shape", twin_flags=(*VLLM, "--tp", "4"),
          thread="vLLM linear.py adjust_block_scale_shard"),
    Asked("blocks of q, k and v on one device, ModelOpt", {**DENSE, "hidden_size": 896,
          "num_attention_heads": 14, "num_key_value_heads": 1, "intermediate_size": 4864},
          "modelopt_fp8_pb_wo", VLLM, "engine.block_shape", twin={"num_key_value_heads": 2},
          thread="vLLM linear.py adjust_block_scale_shard"),
    Asked("GGUF in vLLM", DENSE, "autoround_gguf_q4_k_m", VLLM, "engine.layout",
          twin_flags=SGLANG, thread="SGLang platform table"),
)  # fmt: skip
