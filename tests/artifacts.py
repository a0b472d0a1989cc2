"""Real outputs of the quantization libraries on the 3-layer model, with their own dequantization.

Run as a child process, `artifacts.py LIBRARY SOURCE OUT`: the libraries patch Transformers and are
slow to import, so each is started once and makes all of its checkpoints: OUT/NAME is what the
library saves, OUT/NAME.reference.safetensors the weights it dequantizes to itself (float32, by
module name). Where a library leaves no such function for a layout, the file holds what its
fake-quantized model computed with.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]


def make(library: str, source: Path, out: Path) -> Path:
    """Run this file for one library; the output directory. Raises with the child's log."""
    out.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "TOKENIZERS_PARALLELISM": "false",
        "GPTQMODEL_CPU_WORKERS": "2",
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    child = subprocess.run(
        [sys.executable, __file__, library, str(source), str(out)],
        env=environment,
        cwd=out,
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        raise RuntimeError(f"{library} failed:\n{child.stdout[-4000:]}\n{child.stderr[-8000:]}")
    return out


def token_ids(samples: int = 4, length: int = 64) -> torch.Tensor:
    """Seeded token ids: enough to set activation ranges."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 49000, (samples, length), generator=generator)


def load(source: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)


def save_reference(out: Path, weights: Weights) -> None:
    contiguous = {name: value.detach().float().contiguous() for name, value in weights.items()}
    save_file(contiguous, out.with_name(f"{out.name}.reference.safetensors"))


def llmcompressor(source: Path, out: Path) -> None:
    import json

    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs as Args
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
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
            compressor = BaseCompressor.get_value_from_registry(str(scheme.format.value))
            weights[module] = compressor.decompress(state, scheme)["weight"]
        save_reference(out / name, weights)
        print(name, json.dumps(sorted(tensors)[:3]), flush=True)


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
        loaded = GPTQModel.load(str(out / name), backend=BACKEND.GPTQ_TORCH, device="cpu")
        weights = {
            module_name: module.dequantize_weight().T
            for module_name, module in loaded.model.named_modules()
            if hasattr(module, "qweight")
        }
        save_reference(out / name, weights)
        print(name, len(weights), flush=True)


def autoround(source: Path, out: Path) -> None:
    import shutil

    from auto_round import AutoRound
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    common: dict[str, Any] = {"iters": 0, "nsamples": 4, "seqlen": 64, "disable_opt_rtn": True}
    recipes: dict[str, dict[str, Any]] = {
        "auto_gptq": {"format": "auto_round:auto_gptq", "bits": 4, "group_size": 64},
        "auto_awq": {"format": "auto_round:auto_awq", "bits": 4, "group_size": 64},
        "awq": {"format": "auto_awq", "bits": 4, "group_size": 64, "sym": False},
        "llm_compressor": {"format": "llm_compressor", "scheme": "MXFP4"},
        "mixed": {
            "format": "auto_round",
            "bits": 4,
            "group_size": 64,
            "layer_config": {"model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 32}},
        },
    }
    for name, recipe in recipes.items():
        recipe = dict(recipe)
        layout = recipe.pop("format")
        model = AutoRound(load(source), tokenizer, **common, **recipe)
        model.quantize_and_save(str(out / f"{name}.made"), format=layout)
        made = next((out / f"{name}.made").rglob("config.json")).parent
        shutil.move(made, out / name)
        print(name, flush=True)


MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "autoround": autoround,
    "gptqmodel": gptqmodel,
    "llmcompressor": llmcompressor,
}

if __name__ == "__main__":
    MAKERS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
