"""Ways a checkpoint is known to break: each a change to a real one, and the code that names it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint import read_header
from quantkit.verify.reading import read_tensor
from tests.helpers import edit_json, edit_tensors

Tensors = dict[str, torch.Tensor]
Json = dict[str, Any]
L0, L1 = "model.layers.0.", "model.layers.1."
DOWN, GATE, UP = f"{L1}mlp.down_proj", f"{L1}mlp.gate_proj", f"{L1}mlp.up_proj"
Q, K, V = (f"{L1}self_attn.{leaf}_proj" for leaf in "qkv")


@dataclass(frozen=True)
class Damage:
    """`apply` breaks a copy of the checkpoint `base`.

    `code` is what verify must find with the source at hand; `alone` without it (None: only a
    source, or the digests of quantkit.json, can tell).
    """

    name: str
    base: str
    apply: Callable[[Path], object]
    code: str
    alone: str | None = None


def patch(directory: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Rewrite one tensor's bytes where they are; dtype and shape stay."""
    info = read_header(directory / "model.safetensors")[name]
    old = read_tensor(info)
    new = change(old.clone()).to(old.dtype).contiguous()
    assert new.shape == old.shape
    with info.file.open("r+b") as handle:
        handle.seek(info.start)
        handle.write(new.reshape(-1).view(torch.uint8).numpy().tobytes())


def patching(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda directory: patch(directory, name, change)


def dropping(*names: str) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(names)]:
            del tensors[name]

    return lambda directory: edit_tensors(directory, change)


def replacing(name: str, make: Callable[[Tensors], torch.Tensor]) -> Callable[[Path], None]:
    return lambda directory: edit_tensors(directory, lambda t: t.update({name: make(t)}))


def swapping(one: str, other: str) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(f"{one}.")]:
            twin = other + name[len(one) :]
            tensors[name], tensors[twin] = tensors[twin], tensors[name]

    return lambda directory: edit_tensors(directory, change)


def configuring(
    change: Callable[[Json], object], name: str = "config.json"
) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / name, change)


def both_quant_files(change: Callable[[list[str]], object]) -> Callable[[Path], None]:
    """Change the ignore list where ModelOpt writes it: in both files alike."""

    def apply(directory: Path) -> None:
        edit_json(directory / "config.json", lambda c: change(c["quantization_config"]["ignore"]))
        edit_json(
            directory / "hf_quant_config.json",
            lambda c: change(c["quantization"]["exclude_modules"]),
        )

    return apply


def removing(*names: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return apply


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 4096)


def index_outside(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": "../model.safetensors"}})
    )


def index_absent_shard(directory: Path) -> None:
    names = read_header(directory / "model.safetensors")
    weight_map = dict.fromkeys(names, "model.safetensors") | {"a.weight": "model-2.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def bad_header(directory: Path) -> None:
    with (directory / "model.safetensors").open("r+b") as handle:
        handle.write(struct.pack("<Q", 1 << 40))


def flip_last_bit(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(torch.int16)[7] ^= 1
    return tensor


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """Codes of one row replaced by other codes: a page that never reached the disk."""
    raw = tensor.view(torch.uint8)
    raw[5] = 0
    return tensor


def scrambled(tensor: torch.Tensor) -> torch.Tensor:
    raw = tensor.view(torch.uint8).flatten()
    part = raw[: raw.numel() // 8]
    part.copy_(part.roll(1))
    return raw.view(tensor.dtype).view(tensor.shape)


def set_first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        wide = tensor.float()
        wide.view(-1)[0] = value
        return wide.to(tensor.dtype)

    return change


def sixteen_bit(name: str) -> Callable[[Path], None]:
    """A declared layer left in 16 bit, its parameters gone."""

    def change(tensors: Tensors) -> None:
        shape = tensors[f"{name}.weight"].shape
        for extra in [n for n in tensors if n.startswith(f"{name}.")]:
            del tensors[extra]
        tensors[f"{name}.weight"] = torch.full(shape, 0.01, dtype=torch.bfloat16)

    return lambda directory: edit_tensors(directory, change)


def quantize_kept(module: str) -> Callable[[Path], None]:
    """FP8 codes and a scale for a module that the config keeps in 16 bit."""

    def change(tensors: Tensors) -> None:
        weight = tensors[f"{module}.weight"].float()
        scale = weight.abs().amax(1, keepdim=True) / 448
        tensors[f"{module}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{module}.weight_scale"] = scale.to(torch.bfloat16)

    return lambda directory: edit_tensors(directory, change)


def quantize_router(directory: Path) -> None:
    quantize_kept(f"{L0}mlp.gate")(directory)

    def declare(config: Json) -> None:
        ignore = config["quantization_config"]["ignore"]
        config["quantization_config"]["ignore"] = [e for e in ignore if e != f"{L0}mlp.gate"]

    edit_json(directory / "config.json", declare)


def expert_in_16_bit(directory: Path) -> None:
    expert = f"{L0}mlp.experts.1.down_proj"
    sixteen_bit(expert)(directory)
    edit_json(
        directory / "config.json", lambda c: c["quantization_config"]["ignore"].append(expert)
    )


def all_ones(suffixes: tuple[str, ...]) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(suffixes):
                tensors[name] = torch.ones_like(tensors[name])

    return lambda directory: edit_tensors(directory, change)


def unlike_global_scale(directory: Path) -> None:
    """k_proj alone gets another global scale, its block scales corrected: the weights are right."""

    def change(tensors: Tensors) -> None:
        tensors[f"{K}.weight_scale_2"] *= 2
        halved = tensors[f"{K}.weight_scale"].float() / 2
        tensors[f"{K}.weight_scale"] = halved.to(torch.float8_e4m3fn)

    edit_tensors(directory, change)


def other_scheme_in_group(directory: Path) -> None:
    """k_proj in 16 bit, properly declared: engines cannot merge it with q_proj and v_proj."""
    sixteen_bit(K)(directory)
    both_quant_files(lambda entries: entries.append(K))(directory)


def double_column(tensor: torch.Tensor) -> torch.Tensor:
    tensor[40] *= 2
    return tensor


def zero_column(tensor: torch.Tensor) -> torch.Tensor:
    tensor[40] = 0
    return tensor


def quant_algo(name: str) -> Callable[[Json], object]:
    return lambda config: config["quantization_config"].update(quant_algo=name)


def prefix_entries(entries: list[str]) -> None:
    entries[:] = [entry.replace("model.layers", "language_model.layers") for entry in entries]


def without(entry: str) -> Callable[[list[str]], object]:
    return lambda entries: entries.remove(entry)


DAMAGES: tuple[Damage, ...] = (
    # files
    Damage("truncated shard", "fp8", truncate, "checkpoint.truncated", "checkpoint.truncated"),
    Damage("header length", "fp8", bad_header, "checkpoint.truncated", "checkpoint.truncated"),
    Damage("index points outside", "fp8", index_outside, "checkpoint.index_escapes",
           "checkpoint.index_escapes"),
    Damage("index names an absent shard", "fp8", index_absent_shard, "checkpoint.missing_shard",
           "checkpoint.missing_shard"),
    Damage("no weights", "fp8", removing("model.safetensors"), "checkpoint.no_weights",
           "checkpoint.no_weights"),
    Damage("no config", "fp8", removing("config.json"), "checkpoint.no_config",
           "checkpoint.no_config"),
    # declared and present (pains 2)
    Damage("scale dropped", "fp8", dropping(f"{DOWN}.weight_scale"), "declared.missing_tensor",
           "declared.missing_tensor"),
    Damage("input scale dropped", "fp8", dropping(f"{Q}.input_scale"), "declared.missing_tensor",
           "declared.missing_tensor"),
    Damage("weight dropped, scales left", "fp8", dropping(f"{DOWN}.weight"),
           "complete.missing_module", "complete.missing_module"),
    Damage("declared layer in 16 bit", "fp8", sixteen_bit(DOWN), "declared.not_quantized",
           "declared.not_quantized"),
    Damage("transposed weight", "fp8",
           replacing(f"{DOWN}.weight", lambda t: t[f"{DOWN}.weight"].T), "complete.wrong_shape",
           "complete.wrong_shape"),
    Damage("transposed block scales", "fp4",
           replacing(f"{DOWN}.weight_scale", lambda t: t[f"{DOWN}.weight_scale"].T),
           "declared.wrong_shape", "declared.wrong_shape"),
    Damage("scale in another dtype", "fp4",
           replacing(f"{DOWN}.weight_scale", lambda t: t[f"{DOWN}.weight_scale"].float()),
           "declared.wrong_dtype", "declared.wrong_dtype"),
    Damage("scales for an excluded layer", "mlp", quantize_kept(V), "declared.unexpected_scales",
           "declared.unexpected_scales"),
    Damage("ignore entry added", "fp8", both_quant_files(lambda e: e.append(DOWN)),
           "declared.unexpected_scales", "declared.unexpected_scales"),
    Damage("ignore entry removed", "mlp", both_quant_files(without("model.layers.1.self_attn*")),
           "declared.not_quantized", "declared.not_quantized"),
    Damage("ignore entry of another prefix", "mlp",
           both_quant_files(prefix_entries),
           "ignore.unmatched", "ignore.unmatched"),
    Damage("other algorithm", "fp8", configuring(quant_algo("NVFP4")), "format.contradiction",
           "format.contradiction"),
    Damage("hf_quant_config contradicts", "fp8",
           configuring(lambda c: c["quantization"].update(exclude_modules=[]),
                       "hf_quant_config.json"), "format.contradiction", "format.contradiction"),
    Damage("unknown algorithm", "fp8", configuring(quant_algo("FP7")), "format.unknown_algorithm",
           "format.unknown_algorithm"),
    # values (pains 12)
    Damage("NaN scale", "fp8", patching(f"{DOWN}.weight_scale", set_first(float("nan"))),
           "scale.nonfinite", "scale.nonfinite"),
    Damage("infinite block scale", "fp4",
           patching(f"{DOWN}.weight_scale", set_first(float("nan"))), "scale.nonfinite",
           "scale.nonfinite"),
    Damage("zero scale", "fp8", patching(f"{DOWN}.weight_scale", set_first(0.0)), "scale.zero",
           "scale.zero"),
    Damage("zero block scale", "fp4", patching(f"{DOWN}.weight_scale", set_first(0.0)),
           "scale.zero", "scale.zero"),
    Damage("underflow of scale × global", "fp4",
           patching(f"{DOWN}.weight_scale_2", lambda t: t * 0 + 1e-42), "scale.zero",
           "scale.zero"),
    Damage("NaN exponent", "mxfp4",
           patching(f"{DOWN}.weight_scale", lambda t: t.view(torch.uint8).fill_(255)),
           "scale.nonfinite", "scale.nonfinite"),
    Damage("NaN codes", "fp8",
           patching(f"{DOWN}.weight", lambda t: t.view(torch.uint8).fill_(0x7F).view(t.dtype)),
           "codes.nonfinite", "codes.nonfinite"),
    Damage("negative input scale", "fp8", patching(f"{Q}.input_scale", lambda t: -t),
           "input_scale.not_positive", "input_scale.not_positive"),
    Damage("NaN in a kept tensor", "fp8",
           patching("model.embed_tokens.weight", lambda t: t.index_fill_(0, torch.tensor(3),
                                                                         float("nan"))),
           "tensor.nonfinite", "tensor.nonfinite"),
    Damage("g_idx out of range", "gptq", patching(f"{DOWN}.g_idx", lambda t: t + 1),
           "g_idx.out_of_range", "g_idx.out_of_range"),
    Damage("g_idx all zero", "gptq", patching(f"{DOWN}.g_idx", lambda t: t * 0), "g_idx.uneven",
           "g_idx.uneven"),
    # likeness to the source
    Damage("scale × 1.5", "fp8", patching(f"{DOWN}.weight_scale", lambda t: t * 1.5),
           "sqnr.below_floor"),
    Damage("one block scale × 2", "fp4", patching(f"{DOWN}.weight_scale", set_first(448.0)),
           "scale.wrong"),
    Damage("k and v swapped", "fp8", swapping(K, V), "sqnr.below_floor"),
    Damage("gate and up swapped", "fp4", swapping(GATE, UP), "sqnr.below_floor"),
    Damage("k and v swapped, AWQ layout", "awq", swapping(K, V), "sqnr.below_floor"),
    Damage("codes scrambled", "fp8", patching(f"{DOWN}.weight", scrambled), "sqnr.below_floor"),
    Damage("a row of codes lost", "fp8", patching(f"{DOWN}.weight", bits_of), "scale.wrong"),
    Damage("group order lost", "gptq", patching(f"{DOWN}.g_idx", lambda t: t.flip(0)),
           "scale.wrong"),
    Damage("one row's scale × 1.5", "w8a8",
           patching(f"{DOWN}.weight_scale", lambda t: set_first(1.5 * float(t.view(-1)[0]))(t)),
           "scale.wrong"),
    Damage("fold of v_proj not taken up by o_proj", "folded",
           patching(f"{V}.scales", lambda t: t * 1.5), "sqnr.below_floor"),
    Damage("fold of up_proj not taken up by down_proj", "folded",
           patching(f"{DOWN}.scales", lambda t: t * 0.6), "sqnr.below_floor"),
    Damage("input multiplier of one channel", "awq",
           patching(f"{DOWN}.pre_quant_scale", double_column), "scale.wrong"),
    Damage("rotated, scales × 1.5", "rotated",
           patching(f"{DOWN}.weight_scale", lambda t: t * 1.5), "sqnr.below_floor"),
    Damage("rotated, k and v swapped", "rotated", swapping(K, V), "sqnr.below_floor"),
    Damage("rotated, one embedding lost", "rotated",
           patching("model.embed_tokens.weight", lambda t: t.index_fill_(0, torch.tensor(9), 0)),
           "ledger.altered"),
    # kept tensors (pains 9)
    Damage("norm altered by one bit", "fp8",
           patching(f"{L1}input_layernorm.weight", flip_last_bit), "ledger.altered"),
    Damage("embedding altered", "fp8",
           patching("model.embed_tokens.weight", lambda t: t.roll(1, 0)), "ledger.altered"),
    Damage("folded norm, one channel doubled", "awq",
           patching(f"{L1}input_layernorm.weight", double_column), "fold.mismatch"),
    Damage("folded norm, one channel zero", "awq",
           patching(f"{L1}input_layernorm.weight", zero_column), "fold.mismatch"),
    Damage("folded norm lost", "awq",
           patching(f"{L1}input_layernorm.weight", lambda t: t * 0 + 1), "fold.mismatch"),
    # the ledger (pains 5)
    Damage("layer's norm dropped", "fp8", dropping(f"{L1}input_layernorm"), "ledger.missing",
           "complete.missing_module"),
    Damage("whole layer dropped", "fp8", dropping(L1), "complete.missing_layer",
           "complete.missing_layer"),
    Damage("final norm dropped", "fp8", dropping("model.norm"), "complete.no_final_norm",
           "complete.no_final_norm"),
    Damage("embedding dropped", "fp8", dropping("model.embed_tokens"), "complete.no_embedding",
           "complete.no_embedding"),
    Damage("MTP layer dropped", "moe", dropping("model.layers.2."), "ledger.missing",
           "complete.no_mtp"),
    Damage("unknown weight added", "fp8",
           replacing(f"{L1}adapter.weight", lambda _: torch.ones(8, 8)), "ledger.unknown",
           "complete.missing_module"),
    # ties
    Damage("tie flag flipped", "fp8", configuring(lambda c: c.update(tie_word_embeddings=False)),
           "config.tie_flipped", "complete.no_head"),
    Damage("tied head of other values", "fp8",
           replacing("lm_head.weight", lambda t: t["model.embed_tokens.weight"] * 2),
           "complete.tied_head_differs", "complete.tied_head_differs"),
    Damage("untied head declared tied", "moe",
           configuring(lambda c: c.update(tie_word_embeddings=True)), "config.tie_flipped",
           "complete.tied_head_differs"),
    # what goes together (pains 3, 4)
    Damage("router quantized", "moe", quantize_router, "structure.router_quantized",
           "structure.router_quantized"),
    Damage("router quantized, not declared", "moe", quantize_kept(f"{L0}mlp.gate"),
           "declared.unexpected_scales", "declared.unexpected_scales"),
    Damage("one expert in 16 bit", "moe", expert_in_16_bit, "structure.mixed_experts",
           "structure.mixed_experts"),
    Damage("unequal global scales", "fp4", unlike_global_scale,
           "structure.global_scales_differ", "structure.global_scales_differ"),
    Damage("mixed fused group", "fp8", other_scheme_in_group, "structure.mixed_group",
           "structure.mixed_group"),
    # calibration (pains 10, 13)
    Damage("input scales never calibrated", "fp8", all_ones((".input_scale",)),
           "input_scale.uncalibrated", "input_scale.uncalibrated"),
    Damage("KV scale of one layer dropped", "fp4",
           dropping(f"{L1}self_attn.k_proj.k_scale", f"{L1}self_attn.v_proj.v_scale"),
           "kv.missing_scale", "kv.missing_scale"),
    Damage("KV scales undeclared", "fp4",
           configuring(lambda c: c["quantization"].update(kv_cache_quant_algo=None),
                       "hf_quant_config.json"), "format.contradiction", "format.contradiction"),
    Damage("NaN KV scale", "fp4",
           patching(f"{L1}self_attn.k_proj.k_scale", set_first(float("nan"))), "kv.bad_scale",
           "kv.bad_scale"),
    # sidecars (pains 8)
    Damage("tokenizer removed", "fp8", removing("tokenizer.json"), "sidecar.missing"),
    Damage("tokenizer config removed", "fp8", removing("tokenizer_config.json"),
           "sidecar.missing"),
    Damage("chat template removed", "fp8", removing("chat_template.jinja"), "sidecar.missing"),
    Damage("generation config removed", "fp8", removing("generation_config.json"),
           "sidecar.missing"),
    Damage("chat template changed", "fp8",
           lambda d: (d / "chat_template.jinja").write_text("{{ messages }}"), "sidecar.changed"),
    Damage("tokenizer changed", "fp8",
           configuring(lambda c: c["model"]["vocab"].update({"zzz": 1}), "tokenizer.json"),
           "sidecar.changed"),
    Damage("end of text changed", "fp8",
           configuring(lambda c: c.update(eos_token_id=5), "generation_config.json"),
           "sidecar.changed"),
    Damage("model config changed", "fp8", configuring(lambda c: c.update(rms_norm_eps=0.1)),
           "config.changed"),
)  # fmt: skip
