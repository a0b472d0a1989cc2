"""Situations from public threads, by the row of their table: each with its sound twin."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.checkpoint.directory import open_checkpoint
from tests.formats.test_foreign import gpt_oss
from tests.support.cli import said
from tests.support.helpers import edit_json, edit_tensors
from tests.support.situations import (
    ATTENTION,
    CHAT,
    EXPERTS,
    HIDDEN,
    LAYERS,
    LLAMA,
    Make,
    adapter,
    beside,
    cached_scales,
    chat_model,
    decoder,
    factors,
    foreign,
    in_shards,
    index_of,
    llama,
    mixture,
    modelopt,
    moe,
    noise,
    quantized,
    renamed,
    rows,
    settled,
    silent,
    stating,
    talk,
    then,
    with_document,
    with_file,
    with_tensors,
    without,
    words,
    write,
)

pytestmark = pytest.mark.broad

FP8 = ("plan", "@", "--method", "rtn_fp8_dynamic")
MXFP8 = ("plan", "@", "--method", "rtn_mxfp8", "--engine", "vllm")
VERIFY = ("verify", "@")
VLLM = ("verify", "@", "--engine", "vllm")
SGLANG = ("verify", "@", "--engine", "sglang")
CACHE = ("plan", "@", "--method", "modelopt_fp8", "--engine", "vllm", "--set")
NVFP4_CACHE = (*CACHE, "kv_cache=nvfp4", "--gpu")
FP8_CACHE = (*CACHE, "kv_cache=fp8", "--gpu")
BUILD = ("calibration", "build", "@rows.jsonl", "--model", "@", "--set", "samples=4",
         "--set", "sequence_length=64")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What is asked of an input with a fault and of its sound twin; `@` is the directory.

    `says` is said of the first, with this exit code, and not of the second, which ends with
    `sound_code` and says `sound_says` (where it is asked otherwise: `sound_ask`).
    """

    odd: Make
    sound: Make
    ask: tuple[str, ...]
    code: int
    says: tuple[str, ...]
    sound_code: int = 0
    sound_says: tuple[str, ...] = ()
    sound_ask: tuple[str, ...] = ()


def nested(out: Path) -> None:
    """A multi-modal wrapper whose text_config holds the settings."""
    quantized("w4a16")(out)
    for name in ("model", "lm_head"):
        renamed(f"{name}.", f"language_model.{name}.")(out)

    def wrap(config: dict[str, Any]) -> None:
        config["quantization_config"]["ignore"] = ["re:.*lm_head"]
        inner = dict(config)
        config.clear()
        config.update(model_type="kimi_k25", text_config=inner, tie_word_embeddings=False,
                      architectures=["KimiK25ForConditionalGeneration"])  # fmt: skip

    edit_json(out / "config.json", wrap)


def gguf(out: Path) -> None:
    out.mkdir()
    (out / "tiny.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64))


def pickled(out: Path) -> None:
    llama(out)
    (out / "model.safetensors").rename(out / "pytorch_model.bin")


def dotted(out: Path) -> None:
    foreign("blocks")(out)
    renamed(".weight_scale_inv", ".scale")(out)


def interleaved(out: Path) -> None:
    parts: dict[str, tuple[int, ...]] = {
        "router.weight": (EXPERTS, HIDDEN), "experts.gate_up_proj": (EXPERTS, HIDDEN, 256),
        "experts.gate_up_proj_bias": (EXPERTS, 256), "experts.down_proj_bias": (EXPERTS, 128),
        "experts.down_proj": (EXPERTS, HIDDEN, HIDDEN),
    }  # fmt: skip
    config = {**LLAMA, "model_type": "gpt_oss", "num_local_experts": EXPERTS}
    write(out, mixture("mlp.", parts), {**config, "architectures": ["GptOssForCausalLM"]})


def dbrx(out: Path) -> None:
    parts: dict[str, tuple[int, ...]] = {
        "router.layer.weight": (EXPERTS, HIDDEN),
        **{f"experts.mlp.{leaf}": (EXPERTS * 256, HIDDEN) for leaf in ("w1", "v1", "w2")},
    }
    config = {**LLAMA, "model_type": "dbrx", "ffn_config": {"moe_num_experts": EXPERTS}}
    write(out, mixture("ffn.", parts), config)


def beside_layers(name: str) -> Make:
    """The dense model with one more small layer in each block."""
    return then(llama, with_tensors(lambda: {
        f"model.layers.{i}.{name}.weight": noise(8, HIDDEN) for i in range(LAYERS)}))  # fmt: skip


def other_names(entries: list[str]) -> Make:
    """FP8 of all but a merged layer, which the ignore list names as `entries`."""
    at = "model.layers.0.linear_attn.in_proj_qkvz"
    both = [at, at.replace("layers.0", "layers.1")]
    source = then(llama, with_tensors(lambda: {f"{a}.weight": noise(256, HIDDEN) for a in both}))
    return then(quantized("fp8_dynamic", source, keep=both), settled(ignore=["lm_head", *entries]))


MTP = {f"mtp.layers.0.self_attn.{leaf}.weight": shape for leaf, shape in ATTENTION.items()}


def draft(*ignore: str) -> Make:
    tensors = {name: noise(*shape) for name, shape in MTP.items()}
    return then(quantized("w4a16"), with_tensors(lambda: tensors),
                settled(ignore=["lm_head", *ignore]))  # fmt: skip


def phi3(out: Path) -> None:
    """Projections that the file holds merged."""
    llama(out)

    def merge(tensors: dict[str, torch.Tensor]) -> None:
        for at in (f"model.layers.{index}." for index in range(LAYERS)):
            for block, leaves in (("self_attn.", ("q", "k", "v")), ("mlp.", ("gate", "up"))):
                found = [tensors.pop(f"{at}{block}{leaf}_proj.weight") for leaf in leaves]
                name = "qkv" if block == "self_attn." else "gate_up"
                tensors[f"{at}{block}{name}_proj.weight"] = torch.cat(found)

    edit_tensors(out, merge)
    stating(model_type="phi3", architectures=["Phi3ForCausalLM"])(out)


def packed_head(*targets: str) -> Make:
    """Int4 with the head packed as well, as gate_proj of its shape is."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]
        at = "model.layers.0.mlp.gate_proj."
        own = [name for name in tensors if name.startswith(at)]
        tensors.update({name.replace(at, "lm_head."): tensors[name].clone() for name in own})

    def declare(config: dict[str, Any]) -> None:
        config["quantization_config"]["ignore"] = []
        config["quantization_config"]["config_groups"]["group_0"]["targets"] = list(targets)

    return then(quantized("w4a16"), lambda out: edit_tensors(out, change),
                lambda out: edit_json(out / "config.json", declare))  # fmt: skip


def tower(exclude: tuple[str, ...]) -> Make:
    """A vision tower, in 16 bit where `exclude` names it."""
    at = "model.visual.blocks.0.mlp."
    fcs = {f"{at}linear_fc1.weight": (256, 128), f"{at}linear_fc2.weight": (128, 256)}
    source = then(llama, with_tensors(lambda: {n: noise(*s) for n, s in fcs.items()}))
    return modelopt(source, exclude=("lm_head", *exclude))


def own_code(out: Path) -> None:
    llama(out)
    code = {"AutoConfig": "configuration_novel.NovelConfig"}
    stating(model_type="novelnet", auto_map=code)(out)
    (out / "configuration_novel.py").write_text("class NovelConfig: ...\n")


def cache_folder(count: int) -> Make:
    def change(out: Path) -> None:
        for number in range(count):
            llama(out / "snapshots" / f"{number}a")

    return change


def ignoring_experts(names: str) -> Make:
    """FP8 attention; experts in 16 bit, named all or those of one leaf."""
    blocks = [f"model.layers.{i}.mlp.experts.{e}." for i in range(LAYERS) for e in range(EXPERTS)]
    experts = [block + leaf for block in blocks for leaf in ("gate_proj", "up_proj", "down_proj")]
    gates = [f"model.layers.{i}.mlp.gate" for i in range(LAYERS)]
    named = [name for name in experts if name.endswith(names)]
    return then(quantized("fp8_dynamic", moe, keep=experts),
                settled(ignore=["lm_head", *gates, *named]))  # fmt: skip


def sparse(out: Path) -> None:
    """Codes and format as 2:4 sparse ones have been written."""

    def declare(config: dict[str, Any]) -> None:
        settings = config["quantization_config"]
        settings["format"] = "marlin-24"
        settings["config_groups"]["group_0"].pop("format", None)

    edit_json(out / "config.json", declare)


def other_method(out: Path) -> None:
    """FP8 blocks by config.json, NVFP4 by the file beside it."""
    modelopt()(out)
    stated = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    stating(quantization_config=stated)(out)


STALE = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FOREIGN = ("left aside",)
BOTH = ("14 layers",)
MERGE = ("an adapter", "someone/base-7b", "merge first")
GATES = ("lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate")
AWQ = quantized("w4a16", symmetric=False, layout="awq")
HEADLESS = then(quantized("fp8_dynamic"), without("lm_head.weight"))
UNINDEXED = then(llama, in_shards(2), lambda out: (
    out / "model.safetensors.index.json").unlink())  # fmt: skip
SECOND = then(llama, in_shards(2))
SCALE = "model.layers.1.mlp.down_proj.weight_scale"

ROWS: dict[str, Row] = {
    "01 nested settings": Row(
        nested, lambda out: write(out, decoder(), LLAMA), FP8, 0, ("quantized itself",)),
    "01 nested settings lost": Row(
        then(nested, lambda out: edit_json(out / "config.json", lambda c: c["text_config"].pop(
            "quantization_config"))), nested, VERIFY, 4, ("1 error",), 0, ("no errors",)),
    "02 stale settings": Row(
        then(llama, stating(quantization_config=STALE)), llama, FP8, 1, ("stale",)),
    "03 only a version": Row(
        then(llama, stating(quantization_config={"version": "0.9.1"})), llama, FP8, 1, ("stale",)),
    "03 stale, nested": Row(
        then(llama, stating(text_config={"quantization_config": STALE})), llama, FP8, 1,
        ("stale",)),
    "03 stale file beside": Row(
        then(llama, with_document("quantize_config.json", bits=4, group_size=128)), llama, FP8, 1,
        ("stale", "quantize_config.json")),
    "04 second shards": Row(
        then(SECOND, beside("model-00001-of-00003.safetensors", decoder)), SECOND, FP8, 0,
        FOREIGN, 0, BOTH),
    "05 Mistral's copy": Row(
        then(llama, beside("consolidated.safetensors", lambda: decoder("copy."))), llama, FP8, 0,
        FOREIGN, 0, BOTH),
    "05 a part of it": Row(
        then(llama, beside("consolidated.00.safetensors", lambda: decoder("copy."))), llama, FP8,
        0, FOREIGN, 0, BOTH),
    "05 averaged weights": Row(
        then(llama, beside("model_ema.safetensors", decoder)), llama, FP8, 0, FOREIGN, 0, BOTH),
    "06 two shards of it": Row(
        then(llama, in_shards(2, "consolidated"), llama, in_shards(2)), SECOND, FP8, 0, FOREIGN,
        0, BOTH),
    "07 an adapter": Row(adapter, llama, FP8, 1, MERGE),
    "07 MLX's name": Row(lambda o: adapter(o, "adapters.safetensors"), llama, FP8, 1, MERGE),
    "08 with config.json": Row(
        then(adapter, with_document("config.json", **LLAMA)), llama, FP8, 1, MERGE),
    "09 beside its base": Row(then(llama, adapter), llama, FP8, 0, FOREIGN, 0, BOTH),
    "09 by MLX's name": Row(
        then(llama, lambda out: adapter(out, "adapters.safetensors")), llama, FP8, 0, FOREIGN),
    "09 factors inside": Row(
        then(llama, with_tensors(lambda: factors("model.layers.0.self_attn.q_proj."))), llama,
        FP8, 1, ("an adapter that is not merged",)),
    "09 a layer saved whole": Row(
        then(llama, with_tensors(lambda: {
            "base_model.model.lm_head.modules_to_save.weight": noise(256, HIDDEN)})),
        llama, FP8, 1, ("an adapter that is not merged",)),
    "09 by another trainer": Row(
        then(llama, with_tensors(lambda: {
            "model.layers.0.mlp.up_proj.lora_down.weight": noise(4, HIDDEN)})),
        llama, FP8, 1, ("an adapter that is not merged",)),
    "04 two sets without an index": Row(
        then(UNINDEXED, beside("model-00001-of-00001.safetensors", decoder)), UNINDEXED, FP8, 1,
        ("checkpoint.two_sets", "of-00001", "of-00002"), 0, BOTH),
    "04 an optimizer beside shards": Row(
        then(UNINDEXED, beside("optimizer.safetensors", lambda: {"o.x.weight": noise(128, 128)})),
        UNINDEXED, FP8, 0, FOREIGN, 0, BOTH),
    "11 Keras's": Row(
        then(llama, lambda out: (out / "model.safetensors").rename(out / "tf_model.h5")), llama,
        FP8, 1, ("tf_model.h5", "no *.safetensors")),
    "10 two GGUF": Row(
        then(gguf, with_file("other.gguf", b"GGUF")), llama, FP8, 1, ("gguf.several",)),
    "10 GGUF": Row(gguf, llama, FP8, 1, ("GGUF", "tiny.gguf")),
    "11 pickled": Row(pickled, llama, FP8, 1, ("pytorch_model.bin", "can run code")),
    "12 names of another family": Row(
        dotted, foreign("blocks"), VERIFY, 0, ("format.scale_names", ".scale"), 0,
        ("no errors",)),
    "12 dotted scales": Row(
        then(dotted, without("down_proj.scale")), dotted, VERIFY, 4,
        ("declared.missing_tensor",), 0, ("no errors",)),
    "13 scalar scales": Row(
        then(foreign("scalars"), without("1.mlp.down_proj.weight_scale_inv")), foreign("scalars"),
        VERIFY, 4, ("declared.missing_tensor",), 0, ("no errors",)),
    "13 in vLLM's Mistral": Row(
        then(foreign("scalars"), stating(model_type="mistral")),
        then(foreign("scalars"), renamed("weight_scale_inv", "weight_scale"),
             renamed("activation_scale", "input_scale")),
        VLLM, 4, ("engine.scale_names", "weight_scale_inv"), 0, ("vLLM loads it",)),
    "13 of a source": Row(foreign("scalars"), llama, FP8, 1, ("FineGrainedFP8Config",)),
    "14 interleaved experts": Row(
        then(interleaved, stating(model_type="unheard_of")), interleaved, FP8, 1,
        ("interleaved", "stream.expert_layout"), 0, ("12 layers",)),
    "12 as a source": Row(
        then(dotted, without("down_proj.scale")), dotted, ("plan", "@", "--method", "rtn_w8a16"),
        1, ("its weight is F8_E4M3",), 0, ("21 layers",)),
    "15 GPT-OSS": Row(
        gpt_oss, moe, FP8, 0, ("quantized itself", "mxfp4")),
    "15 finished": Row(
        then(gpt_oss, without("gate_up_proj_scales")), gpt_oss, VERIFY, 4,
        ("declared.missing_tensor",), 0, ("no errors",)),
    "16 experts that stay": Row(
        dbrx, moe, FP8, 0, ("all experts stay in 16 bit", "bytes stay in 16 bit")),
    "17 router.proj": Row(
        beside_layers("router.proj"), beside_layers("adapter.proj"), FP8, 0, ("2: router",), 0,
        ("16 layers",)),
    "17 router.classifier": Row(
        beside_layers("mlp.router.classifier"), beside_layers("mlp.classifier"), FP8, 0,
        ("2: router",)),
    "17 gate.wg": Row(
        beside_layers("mlp.gate.wg"), beside_layers("mlp.wgs"), FP8, 0, ("2: router",)),
    "17 gating_network": Row(
        beside_layers("mlp.gating_network"), beside_layers("mlp.gate_up_network"), FP8, 0,
        ("2: router",)),
    "17 moe_gate": Row(
        beside_layers("moe_gate"), beside_layers("moe_late"), FP8, 0, ("2: router",)),
    "18 names of the cache": Row(
        then(modelopt(), cached_scales(("kv_cache.k_scale", "kv_cache.v_scale"))),
        then(modelopt(), cached_scales(("k_scale", "v_scale"))), SGLANG, 0, ("does not take up",)),
    "18 scales that are dropped": Row(
        then(modelopt(moe, exclude=GATES), cached_scales()),
        then(modelopt(), cached_scales()), SGLANG, 0, ("serves the cache at scale 1",)),
    "18 names nobody knows": Row(
        then(modelopt(), cached_scales(("k_proj.output_scale", "v_proj.output_scale"))),
        then(modelopt(), cached_scales()), VLLM, 0, ("does not take up",)),
    "20 split names": Row(
        other_names([f"model.layers.{i}.linear_attn.in_proj_{x}" for i in (0, 1)
                     for x in ("qkv", "z")]),
        other_names([f"model.layers.{i}.linear_attn.in_proj_qkvz" for i in (0, 1)]), VERIFY, 4,
        ("in_proj_qkvz", "ignore.unmatched")),
    "21 a draft layer": Row(
        draft(), draft("re:mtp.*"), VLLM, 4, ("declared.not_quantized",), 0, ("vLLM loads it",)),
    "23 an expert without a scale": Row(
        then(modelopt(moe, exclude=GATES), without("1.mlp.experts.2.up_proj.input_scale")),
        modelopt(moe, exclude=GATES), VERIFY, 4, ("declared.missing_tensor", "experts.2.up_proj")),
    "25 only the file beside": Row(
        then(modelopt(), silent("quantization_config")), llama, FP8, 1, ("quantized already",)),
    "25 finished": Row(
        then(modelopt(), silent("quantization_config"), without("down_proj.weight_scale")),
        then(modelopt(), silent("quantization_config")), VERIFY, 4, ("declared.missing_tensor",)),
    "26 a quantized tower": Row(
        tower(()), tower(("model.visual*",)), VERIFY, 0, ("structure.tower_quantized",)),
    "27 a packed head": Row(
        packed_head("Linear"), packed_head("Linear", "lm_head"), VLLM, 4,
        ("engine.ignore_overreach", "add 'lm_head' to the targets"), 0, ("vLLM loads it",)),
    "29 own code": Row(own_code, llama, FP8, 1, ("--trust-remote-code",)),
    "29 trusted": Row(own_code, llama, (*FP8, "--trust-remote-code"), 0, ("novelnet",)),
    "30 a silent head": Row(
        then(llama, silent("tie_word_embeddings"), without("lm_head.weight")),
        then(llama, stating(tie_word_embeddings=True), without("lm_head.weight")),
        FP8, 0, ("tie_word_embeddings", "random head")),
    "30 finished": Row(
        then(HEADLESS, silent("tie_word_embeddings")),
        then(HEADLESS, stating(tie_word_embeddings=True)),
        VERIFY, 0, ("complete.silent_head",), 0, ("no errors",)),
    "30 a family that ties": Row(
        then(llama, silent("tie_word_embeddings"), without("lm_head.weight")),
        then(llama, silent("tie_word_embeddings"), without("lm_head.weight"),
             stating(model_type="smollm3", architectures=["SmolLM3ForCausalLM"])),
        FP8, 0, ("random head",)),
    "31 a cache folder": Row(cache_folder(2), cache_folder(1), FP8, 1, ("snapshots",), 0, BOTH),
    "32 merged on disk": Row(
        then(quantized("nvfp4a16", phi3), without("1.mlp.gate_up_proj.weight_global_scale")),
        quantized("nvfp4a16", phi3), VLLM, 4, ("declared.missing_tensor",), 0, ("vLLM loads it",)),
    "33 Quark": Row(
        then(foreign("quark fp8"), without("1.mlp.down_proj.weight_scale")), foreign("quark fp8"),
        VLLM, 4, ("declared.missing_tensor",), 0, ("vLLM loads it",)),
    "33 Quark's INT8": Row(
        then(foreign("quark int8"), without("1.mlp.down_proj.weight_scale")),
        foreign("quark int8"), VLLM, 4, ("declared.missing_tensor",), 0, ("vLLM loads it",)),
    "34 a newer tokenizer": Row(
        then(llama, with_document("tokenizer_config.json", tokenizer_class="TokenizersBackend")),
        then(llama, with_document("tokenizer_config.json", tokenizer_class="LlamaTokenizer")),
        FP8, 0, ("TokenizersBackend", "Transformers 4")),
    "35 an index of others": Row(
        then(SECOND, index_of(10)), SECOND, FP8, 1, ("10 shards", "hold every tensor", "rm ")),
    "36 sparse": Row(
        then(quantized("w4a16"), sparse), quantized("w4a16"), VERIFY, 4,
        ("marlin-24", "not supported")),
    "36 a mask of zeros": Row(
        then(quantized("fp8_dynamic"), settled(sparsity_config={
            "format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"]})),
        then(quantized("fp8_dynamic"), settled(sparsity_config={})), VERIFY, 4,
        ("sparse-24-bitmask",)),
    "38 two methods": Row(
        other_method, modelopt(), VLLM, 4, ("format.contradiction", "'fp8'", "modelopt FP8"), 0,
        ("vLLM loads it",)),
    "38 two, of others": Row(
        then(quantized("w4a16"), with_document("quantize_config.json", bits=4, group_size=128)),
        quantized("w4a16"), VERIFY, 4, ("format.contradiction", "quantize_config.json")),
    "38 two algorithms": Row(
        then(modelopt(), lambda out: edit_json(
            out / "hf_quant_config.json", lambda c: c["quantization"].update(quant_algo="NVFP4"))),
        modelopt(), VERIFY, 4, ("format.contradiction", "'NVFP4'")),
    "38 two lists": Row(
        then(modelopt(), lambda out: edit_json(
            out / "hf_quant_config.json", lambda c: c["quantization"].update(exclude_modules=[]))),
        modelopt(), VERIFY, 4, ("format.contradiction", "excluded modules")),
    "39 a mixture, calibrated": Row(
        moe, moe, ("plan", "@", "--method", "autoround_nvfp4"), 1,
        ("4 experts a layer", "rtn_fp8_dynamic"), 0, ("32 layers",),
        ("plan", "@", "--method", "modelopt_fp8")),
    "40 a cache without kernels": Row(
        llama, llama, (*NVFP4_CACHE, "h100"), 1, ("NVFP4 KV cache on H100",), 0,
        ("vLLM loads it",), (*NVFP4_CACHE, "b200")),
    "40 on a gaming GPU": Row(
        llama, llama, (*NVFP4_CACHE, "rtx5090"), 1, ("NVFP4 KV cache on GeForce RTX 5090",), 0,
        ("vLLM loads it",), (*FP8_CACHE, "rtx5090")),
    "49 a part of the experts": Row(
        ignoring_experts("gate_proj"), ignoring_experts("_proj"), VLLM, 4, ("engine.ignore",), 0,
        ("vLLM loads it",)),
    "50 FP8 blocks": Row(
        then(foreign("blocks"), without("1.mlp.down_proj.weight_scale_inv")), foreign("blocks"),
        VERIFY, 4, ("declared.missing_tensor",), 0, ("no errors",)),
    "50 as a source": Row(
        foreign("blocks"), llama, ("plan", "@", "--method", "modelopt_nvfp4"), 0,
        ("quantized itself",)),
    "x1 MXFP8 with experts in MXFP4": Row(
        moe, moe, (*MXFP8, "--set", "overrides=[{match: '*.mlp.experts.0.*', scheme: mxfp4a16}]"),
        1, ("holds all experts of", "give all experts of a block the same scheme"), 0,
        ("vLLM loads it",),
        (*MXFP8, "--set", "overrides=[{match: '*.mlp.experts.*', scheme: mxfp4a16}]")),
    "x2 AWQ on Ascend": Row(
        AWQ, AWQ,
        (*VLLM, "--gpu", "ascend-a2"), 4, ("engine.gpu",), 0, ("SGLang loads it",),
        (*SGLANG, "--gpu", "ascend-a2")),
    "x4 the output is there": Row(
        then(llama, with_file("out/a", "x")), llama,
        ("quantize", *FP8[1:], "--dry-run", "--out", "@out"), 1, ("output.exists",)),
    "x4 the output is the input": Row(
        llama, llama, ("quantize", *FP8[1:], "--dry-run", "--out", "@"), 1,
        ("output.is_input",), 0, (), ("quantize", *FP8[1:], "--dry-run", "--out", "@/../out")),
    "x3 a typo in targets": Row(
        llama, then(llama, with_tensors(lambda: {"model.layers.0.q_porj.weight": noise(8, 128)})),
        (*FP8, "--set", "targets+=*.q_porj"), 1, ("q_porj matches none",)),
}  # fmt: skip


def identified(number: int) -> str:
    return str(uuid.UUID(int=number * 2654435761 << 40))


def sharegpt(number: int) -> dict[str, Any]:
    turns = [{"from": "human", "value": words(number)}, {"from": "gpt", "value": words(number + 1)}]
    return {"id": identified(number), "conversations": turns}


def calling(number: int, name: str = "content") -> list[dict[str, Any]]:
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {}}}]
    said_nothing = {"role": "assistant", name: None, "tool_calls": calls}
    return [talk(number)[0], said_nothing, {"role": "tool", "content": "{}"}, talk(number)[1]]


def parts(number: int, kind: str = "text") -> list[dict[str, Any]]:
    return [{"role": m["role"], "content": [{"type": kind, kind: m["content"]}]}
            for m in talk(number)]  # fmt: skip


def reasoned(number: int, **more: Any) -> dict[str, Any]:
    answer = {"role": "assistant", "content": f"Because {words(number)}", **more}
    return {"messages": [{"role": "user", "content": "Why?"}, answer]}


def latin(out: Path) -> None:
    chat_model(out)
    line = json.dumps({"text": f"café {words(1, 80)}"}, ensure_ascii=False)
    (out / "rows.jsonl").write_bytes(f"{line}\n".encode("latin-1"))


PLAIN = rows(lambda n: {"messages": talk(n)})
TEXT = rows(lambda n: {"text": words(n, 60)})
UNREAD = ("calibration.unread_shape",)
RAISING = CHAT.replace("<|turn|>", "{{ raise_exception('no ' + m.role) if m.role == 'system' }}"
                       "<|turn|>", 1)  # fmt: skip
CALIBRATION: dict[str, Row] = {
    "42 parts": Row(
        rows(lambda n: {"messages": parts(n, "image")}), rows(lambda n: {"messages": parts(n)}),
        BUILD, 1, UNREAD, 0, ("<|turn|>user",)),
    "42 tool calls": Row(
        rows(lambda n: {"messages": [{"role": "assistant", "content": None}]}),
        rows(lambda n: {"messages": calling(n)}), BUILD, 1, UNREAD, 0, ("<|turn|>user",)),
    "42 rendered": Row(
        rows(lambda n: {"text": f"<s><|turn|>user {words(n, 60)}<|end|>"}), TEXT, BUILD, 0,
        ("through a chat template already",)),
    "42 two fields": Row(
        rows(lambda n: {"title": words(n), "body": words(n)}),
        rows(lambda n: {"instruction": words(n), "input": "", "output": words(n + 1)}), BUILD, 1,
        ("several fields",), 0, ("<|turn|>user",)),
    "42 a prompt alone": Row(
        rows(lambda n: {"prompt": words(n), "title": words(n)}),
        rows(lambda n: {"prompt": words(n), "completion": words(n + 1)}), BUILD, 1,
        ("several fields",), 0, ("<|turn|>user",)),
    "42 one repeated text": Row(
        rows(lambda n: {"text": words(n if n % 5 == 0 else 1, 20)}),
        rows(lambda n: {"text": words(n, 20)}), BUILD, 0, ("one repeated text",)),
    "42 Latin-1": Row(latin, TEXT, BUILD, 1, ("line 1", "utf-8")),
    "42 too few": Row(rows(lambda n: {"text": words(n, 5)}, 3), TEXT, BUILD, 1, ("set samples",)),
    "42g no such file": Row(
        chat_model, PLAIN, ("quantize", "@", "--method", "modelopt_fp8", "--dry-run",
                            "--calibration", "@rows.jsonl", "--set", "calibration.samples=4",
                            "--set", "calibration.sequence_length=64", "--out", "@out"), 1,
        ("does not exist",)),
    "43 a template that raises": Row(
        rows(lambda n: {"messages": [{"role": "system", "content": "x"}, *talk(n)]}, 9, RAISING),
        rows(lambda n: {"messages": [{"role": "system", "content": "x"}, *talk(n)]}, 9), BUILD, 1,
        ("refused by the chat template: no system",), 0, ("<|turn|>system",)),
    "44 only identifiers": Row(
        rows(lambda n: {"id": identified(n), "turns": 3}), rows(sharegpt), BUILD, 1,
        ("calibration.identifiers",), 0, ("<|turn|>user",)),
    "44 numbered names": Row(
        rows(lambda n: {"id": f"row-{n:06d}", "turns": 3}),
        rows(lambda n: {"id": f"row-{n:06d}", "messages": talk(n)}), BUILD, 1,
        ("calibration.identifiers",), 0, ("<|turn|>user",)),
    "44 an unread shape": Row(
        rows(lambda n: {"id": identified(n), "turns": [{"speaker": "a", "said": words(n)}]}),
        rows(sharegpt), BUILD, 1, UNREAD),
    "45 reasoning": Row(
        rows(reasoned), rows(lambda n: reasoned(n, reasoning_content=words(n))),
        BUILD, 0, ("assistant Because",), 0, ("assistant <think>",)),
    "OpenOrca": Row(
        rows(lambda n: {"id": f"niv.{n}", "question": words(n), "response": words(n + 1)}),
        rows(lambda n: {"id": f"niv.{n}", "system_prompt": "Be brief.", "question": words(n),
                        "response": words(n + 1)}),
        BUILD, 0, ("<s><|turn|>user",), 0, ("<|turn|>system Be brief.",)),
}  # fmt: skip

ALL = {**ROWS, **CALIBRATION}


def asked(row: Row, make: Make, tmp_path: Path, ask: tuple[str, ...] = ()) -> tuple[int, str]:
    folder = tmp_path / "its name"
    make(folder)
    return said(*(str(folder / word[1:]) if word[0] == "@" else word for word in ask or row.ask))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ALL)
def test_a_situation_is_told(name: str, tmp_path: Path) -> None:
    row = ALL[name]
    code, text = asked(row, row.odd, tmp_path)
    assert code == row.code, text
    for part in row.says:
        assert part in text


@pytest.mark.parametrize("name", ALL)
def test_its_sound_twin_is_not(name: str, tmp_path: Path) -> None:
    row = ALL[name]
    code, text = asked(row, row.sound, tmp_path, row.sound_ask)
    assert code == row.sound_code, text
    for part in row.says:
        assert part not in text
    for part in row.sound_says:
        assert part in text


def test_what_is_kept_has_the_dtype_of_the_source(tmp_path: Path) -> None:
    """Rows 37 and 47: float16 and float32 stay what they are, and a tokenizer comes along."""
    for dtype, stored in ((torch.float16, "F16"), (torch.float32, "F32")):
        folder, out = tmp_path / stored, tmp_path / f"{stored} out"
        torch.manual_seed(0)
        tensors = {name: tensor.to(dtype) for name, tensor in decoder().items()}
        write(folder, tensors, {**LLAMA, "torch_dtype": str(dtype).partition(".")[2]})
        with_file("tekken.json", "{}")(folder)
        code, text = said("quantize", folder, "--method", "rtn_fp8_dynamic", "--out", out)
        assert code == 0, text
        checkpoint = open_checkpoint(out)
        kept = [
            n for n in checkpoint.tensors if "norm" in n or n.endswith(("head.weight", "tokens"))
        ]
        assert {checkpoint.tensors[name].dtype for name in kept} == {stored}
        assert (out / "tekken.json").read_text() == "{}"
        assert said("verify", out, "--source", folder)[0] == 0
