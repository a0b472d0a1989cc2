"""Real outputs of the quantization libraries on the 3-layer model, with their own dequantization.

Run as a child process, `artifacts.py LIBRARY SOURCE OUT`: the libraries patch Transformers and are
slow to import, so each is started once and makes all of its checkpoints: OUT/NAME is what the
library saves, OUT/NAME.reference.safetensors the weights it dequantizes to itself (float32, by
module name). ModelOpt has no function that reads its exported int4, so for int4_awq the file holds
the weights as they were just before rounding.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]

VOCABULARY = 4096
PACKAGES = {
    "autoround": "auto-round",
    "gptqmodel": "gptqmodel",
    "llmcompressor": "llmcompressor",
    "modelopt": "nvidia-modelopt",
}
REFERENCED = ("model.layers.1.", "model.layers.0.mlp.down_proj")
"""Modules whose dequantized weights are kept."""


def artifacts(library: str, small_model: Path) -> Path:
    """The directory of a library's checkpoints, made once and kept under QUANTKIT_CACHE.

    The key is this file, the library's version and the model; a lock lets several test processes
    wait for the one that makes them. Raises with the child's log when the library fails.
    """
    package = PACKAGES[library]
    key = hashlib.sha256(Path(__file__).read_bytes())
    key.update(f"{package}=={version(package)}".encode())
    key.update((small_model / "model.safetensors").read_bytes())
    root = Path(os.environ["QUANTKIT_CACHE"]).absolute() / "artifacts"
    out = root / f"{library}-{key.hexdigest()[:16]}"
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{library}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.is_dir():
            _make(library, small_model, out)
    return out


def _make(library: str, small_model: Path, out: Path) -> None:
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    source = partial / "source"
    source.mkdir(parents=True)
    _cut_vocabulary(small_model, source)
    environment = {
        **os.environ,
        "TOKENIZERS_PARALLELISM": "false",
        "GPTQMODEL_CPU_WORKERS": "2",
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    child = subprocess.run(
        [sys.executable, __file__, library, str(source), str(partial)],
        env=environment,
        cwd=partial,
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        shutil.rmtree(partial)
        raise RuntimeError(f"{library} failed:\n{child.stdout[-4000:]}\n{child.stderr[-8000:]}")
    partial.rename(out)


def _cut_vocabulary(source: Path, target: Path) -> None:
    """Copy a model with the first `VOCABULARY` rows of its tied embedding: files of 20 MB."""
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "vocab_size": VOCABULARY}))
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:VOCABULARY].clone()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def token_ids(samples: int = 4, length: int = 64) -> torch.Tensor:
    """Seeded token ids: enough to set activation ranges."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (samples, length), generator=generator)


def load(source: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)


def save_reference(out: Path, weights: Weights) -> None:
    contiguous = {
        name: value.detach().float().contiguous()
        for name, value in weights.items()
        if name.startswith(REFERENCED)
    }
    save_file(contiguous, out.with_name(f"{out.name}.reference.safetensors"))


def llmcompressor(source: Path, out: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.mx_utils import decompress_mx_scale
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs as Args
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoTokenizer

    data = Dataset.from_dict({"input_ids": token_ids().tolist()})
    int4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}
    fp8 = {"num_bits": 8, "type": "float"}

    def preset(name: str, *targets: str) -> QuantizationScheme:
        return preset_name_to_scheme(name, list(targets or ("Linear",)))

    def group(targets: str, **weights: Any) -> QuantizationScheme:
        return QuantizationScheme(targets=[targets], weights=Args(**weights))

    recipes: dict[str, dict[str, Any]] = {
        "fp8_dynamic": {"g": preset("FP8_DYNAMIC")},
        "w8a8": {"g": preset("W8A8")},
        "w4a16": {"g": group("Linear", **int4)},
        "w4a16_asym": {"g": group("Linear", **int4, symmetric=False)},
        "nvfp4": {"g": preset("NVFP4")},
        "mxfp4": {"g": preset("MXFP4")},
        "mixed": {
            "q": preset("MXFP8", "re:.*q_proj"),
            "k": group("re:.*k_proj", num_bits=8, strategy="channel", symmetric=False),
            "v": group("re:.*v_proj", **{**int4, "num_bits": 3}),
            "o": group("re:.*o_proj", **fp8, strategy="block", block_structure=[64, 64]),
            "up": preset("NVFP4A16", "re:.*(gate|up)_proj"),
            "down": preset("FP8", "re:.*down_proj"),
        },
    }
    for name, groups in recipes.items():
        model = load(source)
        extra = {"kv_cache_scheme": Args(**fp8)} if name == "mixed" else {}
        ignore = ["lm_head", "re:.*layers[.]2[.]mlp.*"]
        needs_data = any(
            s.input_activations and s.input_activations.dynamic is not True for s in groups.values()
        )
        recipe = QuantizationModifier(config_groups=groups, ignore=ignore, **extra)
        calibration = {"dataset": data, "num_calibration_samples": 4} if needs_data else {}
        tokenizer = AutoTokenizer.from_pretrained(source)
        oneshot(model=model, recipe=recipe, processor=tokenizer, **calibration)
        schemes = {
            n: m.quantization_scheme
            for n, m in model.named_modules()
            if getattr(getattr(m, "quantization_scheme", None), "weights", None)
        }
        model.save_pretrained(out / name, save_compressed=True)
        tensors = load_file(out / name / "model.safetensors")
        weights = {}
        for module, scheme in schemes.items():
            state = {
                k.removeprefix(f"{module}."): t for k, t in tensors.items() if k.startswith(module)
            }
            if state["weight_scale"].dtype is torch.bfloat16:
                state["weight_scale"] = state["weight_scale"].float()
            if "weight_packed" in state and state["weight_packed"].dtype is torch.uint8:
                rows, half = state["weight_packed"].shape
                codes = unpack_fp4_from_uint8(
                    state["weight_packed"], rows, 2 * half, dtype=torch.float32
                )
                scale = state["weight_scale"]
                mx = scale.dtype is torch.uint8
                scale = decompress_mx_scale(scale).float() if mx else scale.float()
                weights[module] = dequantize(
                    codes, scale, args=scheme.weights, global_scale=state.get("weight_global_scale")
                )
                continue
            compressor = BaseCompressor.get_value_from_registry(str(scheme.format.value))
            weights[module] = compressor.decompress(state, scheme)["weight"]
        save_reference(out / name, weights)


def gptqmodel(source: Path, out: Path) -> None:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    data = [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in token_ids(8)]
    recipes: dict[str, dict[str, Any]] = {
        "w4": {"bits": 4, "group_size": 64},
        "w4_act_order": {"bits": 4, "group_size": 32, "desc_act": True, "sym": False},
        "w8_v2": {"bits": 8, "group_size": -1, "act_group_aware": False, "format": "gptq_v2"},
        "dynamic": {
            "bits": 4,
            "group_size": 64,
            "dynamic": {
                r"-:.*layers[.]2[.]": {},
                r"+:.*k_proj": {"bits": 8, "group_size": 32},
                r".*mlp[.]up_proj": {"bits": 2, "group_size": 32},
                r".*mlp[.]down_proj": {"bits": 3, "group_size": 32},
            },
        },
    }
    for name, recipe in recipes.items():
        config = QuantizeConfig(**recipe, offload_to_disk=False)
        model = GPTQModel.load(str(source), config)
        model.quantize(data, batch_size=4)
        model.save(str(out / name))
        loaded = GPTQModel.load(
            str(out / name), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16
        )
        weights = {
            module_name: module.dequantize_weight().T
            for module_name, module in loaded.model.named_modules()
            if hasattr(module, "qweight")
        }
        save_reference(out / name, weights)


def autoround(source: Path, out: Path) -> None:
    from auto_round import AutoRound
    from auto_round.export.export_to_awq.utils import dequantize_gemm
    from auto_round.utils.device_manager import get_ar_device
    from transformers import AutoModelForCausalLM, AutoTokenizer

    get_ar_device("cpu")._bf16_supported = True  # or the model is float32 on some CPUs
    tokenizer = AutoTokenizer.from_pretrained(source)
    common: dict[str, Any] = {"iters": 0, "nsamples": 4, "seqlen": 64, "disable_opt_rtn": True}
    int4: dict[str, Any] = {"bits": 4, "group_size": 64}
    overrides = {"model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 32}}
    recipes: dict[str, tuple[str, dict[str, Any]]] = {
        "auto_gptq": ("auto_round", {**int4, "layer_config": overrides}),
        "auto_awq": ("auto_round:auto_awq", int4),
        "gptqmodel": ("auto_round:gptqmodel", {**int4, "sym": False}),
        "mxfp4": ("auto_round", {"scheme": "MXFP4"}),
        "awq": ("auto_awq", {**int4, "sym": False}),
    }
    for name, (layout, recipe) in recipes.items():
        model = AutoRound(load(source), tokenizer, **common, **recipe)
        model.quantize_and_save(str(out / f"{name}.made"), format=layout)
        made = next((out / f"{name}.made").rglob("config.json")).parent
        shutil.move(made, out / name)
        shutil.rmtree(out / f"{name}.made", ignore_errors=True)
        weights: Weights = {}
        if name == "awq":
            tensors = load_file(out / name / "model.safetensors")
            for tensor in tensors:
                module_name = tensor.removesuffix(".qweight")
                if module_name != tensor:
                    parts = [tensors[f"{module_name}.{s}"] for s in ("qweight", "qzeros", "scales")]
                    parts[2] = parts[2].float()
                    weights[module_name] = dequantize_gemm(*parts, bits=4, group_size=64).T
            save_reference(out / name, weights)
            continue
        loaded = AutoModelForCausalLM.from_pretrained(out / name, dtype=torch.float32)
        with torch.no_grad():
            for module_name, module in loaded.named_modules():
                if hasattr(module, "qweight") or hasattr(module, "weight_packed"):
                    width = getattr(module, "in_features", None) or module.infeatures
                    weights[module_name] = module(torch.eye(width)).T
        save_reference(out / name, weights)


def modelopt(source: Path, out: Path) -> None:
    import copy

    import modelopt.torch.export.unified_export_hf as exporter
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export.quant_utils import from_quantized_weight
    from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP8QTensor, NVFP4QTensor

    rounded: list[torch.Tensor] = []
    export_weight = exporter.to_quantized_weight

    def remember(weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        rounded.append(weight.float())
        packed: torch.Tensor = export_weight(weight, *rest)
        return packed

    def decode(name: str, module: str, tensors: Weights) -> torch.Tensor:
        data, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
        shape = torch.Size((data.shape[0], data.shape[1] * (1 + (data.dtype == torch.uint8))))
        f32 = torch.float32
        plain: torch.Tensor
        if name == "fp8_pb_wo":
            blocks = {-1: 64, -2: 64}
            fp8 = FP8QTensor(shape, f32, data)
            plain = fp8.dequantize(f32, scale=scale.squeeze(), block_sizes=blocks)
        elif name == "fp8_pc_pt":
            plain = FP8QTensor(shape, f32, data).dequantize(f32, scale=scale[:, None])
        elif name == "mxfp8":
            plain = MXFP8QTensor(shape, f32, data).dequantize(f32, scale=scale)
        elif data.dtype == torch.uint8:
            plain = NVFP4QTensor(shape, f32, data).dequantize(
                f32,
                scale=scale,
                double_scale=tensors[f"{module}.weight_scale_2"],
                block_sizes={-1: 16},
            )
        else:
            kind = "int8_sq" if data.dtype == torch.int8 else "fp8"
            plain = from_quantized_weight(data, scale, kind, f32)
        return plain

    exporter.to_quantized_weight = remember
    fp8_kv = mtq.update_quant_cfg_with_kv_cache_quant(
        copy.deepcopy(mtq.FP8_DEFAULT_CFG), mtq.FP8_KV_CFG["quant_cfg"]
    )
    attention = [
        {**entry, "quantizer_name": f"*self_attn{entry['quantizer_name']}"}
        for entry in mtq.FP8_DEFAULT_CFG["quant_cfg"][1:3]
    ]
    mixed = copy.deepcopy(mtq.NVFP4_MLP_ONLY_CFG)
    mixed["quant_cfg"][1:1] = attention
    recipes = {
        "fp8_kv": fp8_kv,
        "fp8_pc_pt": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
        "fp8_pb_wo": mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG,
        "int8_sq": mtq.INT8_SMOOTHQUANT_CFG,
        "int4_awq": mtq.INT4_AWQ_CFG,
        "mxfp8": mtq.MXFP8_DEFAULT_CFG,
        "mixed": mixed,
    }
    for name, recipe in recipes.items():
        model = load(source)
        recipe = copy.deepcopy(recipe)
        for entry in recipe["quant_cfg"]:
            blocks = (entry.get("cfg") or {}).get("block_sizes") or {}
            for axis in (-1, -2):
                if blocks.get(axis) == 128:
                    blocks[axis] = 64
        try:
            mtq.quantize(model, recipe, lambda m: m(token_ids()))
        except AssertionError as error:
            print("the calibrated model does not run here:", error)
        rounded.clear()
        exporter.export_hf_checkpoint(model, export_dir=out / name)
        tensors = load_file(out / name / "model.safetensors")
        weights = {}
        for module in [n for n, m in model.named_modules() if hasattr(m, "weight_scale")]:
            plain = rounded.pop(0) if name == "int4_awq" else decode(name, module, tensors)
            smoothing = tensors.get(f"{module}.pre_quant_scale")
            weights[module] = plain if smoothing is None else plain * smoothing.float()
        assert name != "int4_awq" or not rounded
        save_reference(out / name, weights)


MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "autoround": autoround,
    "gptqmodel": gptqmodel,
    "llmcompressor": llmcompressor,
    "modelopt": modelopt,
}

if __name__ == "__main__":
    MAKERS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
