"""Small inputs of the kinds that people brought from real checkpoints, and their sound twins."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from quantkit.backends.streaming.job import Layout
from quantkit.checkpoint.schemes import SCHEMES
from tests.formats.test_foreign import KINDS, made
from tests.support.helpers import edit_json, edit_tensors
from tests.support.rtn import rtn

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]
Make = Callable[[Path], object]
"""Writes an input into a directory."""

HIDDEN, INNER, VOCABULARY, LAYERS, EXPERTS = 128, 256, 256, 2, 4
LLAMA: Config = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
    "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": VOCABULARY,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
    "max_position_embeddings": 2048,
}  # fmt: skip
QWEN3_MOE: Config = {
    **LLAMA, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
    "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN,
}  # fmt: skip
ATTENTION = {"q_proj": (128, 128), "k_proj": (64, 128), "v_proj": (64, 128), "o_proj": (128, 128)}
MLP = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}


def noise(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape) * 0.02).bfloat16()


def decoder(prefix: str = "model.") -> Tensors:
    """A decoder of two layers in Llama's names, with its head."""
    found = {f"{prefix}embed_tokens.weight": noise(VOCABULARY, HIDDEN)}
    for index in range(LAYERS):
        at = f"{prefix}layers.{index}."
        parts = {f"self_attn.{leaf}": shape for leaf, shape in ATTENTION.items()}
        parts |= {f"mlp.{leaf}": shape for leaf, shape in MLP.items()}
        found |= {f"{at}{leaf}.weight": noise(*shape) for leaf, shape in parts.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
    found[f"{prefix}norm.weight"] = torch.ones(HIDDEN).bfloat16()
    return {**found, "lm_head.weight": noise(VOCABULARY, HIDDEN)}


def mixture(block: str, parts: dict[str, tuple[int, ...]]) -> Tensors:
    """The decoder with `block` of each layer, holding `parts`, in place of its MLP."""
    found = {name: tensor for name, tensor in decoder().items() if ".mlp." not in name}
    at = [f"model.layers.{index}.{block}" for index in range(LAYERS)]
    return found | {f"{a}{leaf}": noise(*shape) for a in at for leaf, shape in parts.items()}


def write(out: Path, tensors: Tensors, config: Config, file: str = "model.safetensors") -> Path:
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / file, metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out


def llama(out: Path) -> Path:
    torch.manual_seed(0)
    return write(out, decoder(), LLAMA)


def moe(out: Path) -> Path:
    torch.manual_seed(0)
    parts = {f"experts.{e}.{leaf}.weight": (HIDDEN, HIDDEN) for e in range(EXPERTS) for leaf in MLP}
    tensors = mixture("mlp.", {"gate.weight": (EXPERTS, HIDDEN), **parts})
    for index in range(LAYERS):
        for norm in ("q_norm", "k_norm"):
            tensors[f"model.layers.{index}.self_attn.{norm}.weight"] = torch.ones(32).bfloat16()
    return write(out, tensors, QWEN3_MOE)


def then(make: Make, *changes: Make) -> Make:
    """What `make` writes, with `changes`."""

    def both(out: Path) -> None:
        for one in (make, *changes):
            one(out)

    return both


def stating(**values: Any) -> Make:
    return lambda out: edit_json(out / "config.json", lambda config: config.update(values))


def settled(**values: Any) -> Make:
    """A change of `quantization_config`."""
    return lambda out: edit_json(
        out / "config.json", lambda config: config["quantization_config"].update(values)
    )


def silent(*keys: str) -> Make:
    return lambda out: edit_json(
        out / "config.json", lambda config: [config.pop(key, None) for key in keys]
    )


def with_file(name: str, text: str | bytes) -> Make:
    def change(out: Path) -> None:
        file = out / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


def with_document(name: str, **values: Any) -> Make:
    return with_file(name, json.dumps(values))


def beside(name: str, tensors: Callable[[], Tensors]) -> Make:
    """Another file of weights in the directory."""
    return lambda out: save_file(tensors(), out / name, metadata={"format": "pt"})


def without(*parts: str) -> Make:
    """Without the tensors whose names end so."""

    def drop(tensors: Tensors) -> None:
        lost = [name for name in tensors if name.endswith(parts)]
        assert lost, parts
        for name in lost:
            del tensors[name]

    return lambda out: edit_tensors(out, drop)


def with_tensors(make: Callable[[], Tensors]) -> Make:
    return lambda out: edit_tensors(out, lambda tensors: tensors.update(make()))


def renamed(old: str, new: str) -> Make:
    """With `new` for `old` in the names of all tensors."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return lambda out: edit_tensors(out, change)


def in_shards(count: int, stem: str = "model") -> Make:
    """The one file of weights cut into shards, with an index."""

    def change(out: Path) -> None:
        tensors = load_file(out / "model.safetensors")
        (out / "model.safetensors").unlink()
        names = list(tensors)
        files: dict[str, str] = {}
        for number in range(count):
            file = f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"
            part = {name: tensors[name] for name in names[number::count]}
            save_file(part, out / file, metadata={"format": "pt"})
            files |= dict.fromkeys(part, file)
        index = json.dumps({"metadata": {}, "weight_map": files})
        (out / f"{stem}.safetensors.index.json").write_text(index)

    return change


def index_of(count: int) -> Make:
    """An index that names other shards than lie there."""

    def change(out: Path) -> None:
        names = [n for f in sorted(out.glob("*.safetensors")) for n in load_file(f)]
        files = {n: f"model-{1 + i % count:05d}-of-{count:05d}.safetensors"
                 for i, n in enumerate(names)}  # fmt: skip
        index = json.dumps({"weight_map": files})
        (out / "model.safetensors.index.json").write_text(index)

    return change


def factors(at: str = "base_model.model.model.layers.0.self_attn.q_proj.") -> Tensors:
    """Of a LoRA adapter."""
    return {f"{at}lora_A.weight": noise(4, HIDDEN), f"{at}lora_B.weight": noise(HIDDEN, 4)}


def adapter(out: Path, file: str = "adapter_model.safetensors") -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_file(factors(), out / file, metadata={"format": "pt"})
    stated = {"peft_type": "LORA", "base_model_name_or_path": "someone/base-7b"}
    (out / "adapter_config.json").write_text(json.dumps(stated))


def quantized(
    scheme: str,
    source: Make = llama,
    keep: Iterable[str] = (),
    *,
    symmetric: bool = True,
    layout: Layout = "compressed-tensors",
) -> Make:
    """The model that `source` writes, in compressed-tensors' layout or another."""

    def change(out: Path) -> None:
        base = out.with_name(f"{out.name}-source")
        source(base)
        chosen = SCHEMES[scheme].with_weight(symmetric=symmetric)
        rtn(base, out, chosen, keep=tuple(keep), layout=layout)

    return change


def modelopt(source: Make = llama, *, exclude: Iterable[str] = ("lm_head",)) -> Make:
    """ModelOpt's FP8: a scale a tensor, one of its input, settings in two files."""

    def change(out: Path) -> None:
        source(out)
        kept = tuple(entry.rstrip("*") for entry in exclude)

        def convert(tensors: Tensors) -> None:
            linear = [n for n in tensors if tensors[n].dim() == 2 and not n.startswith(kept)]
            for number, name in enumerate(n for n in linear if "embed" not in n):
                at = name.removesuffix("weight")
                scale = tensors[name].float().abs().max() / 448
                tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
                tensors[f"{at}weight_scale"] = scale
                tensors[f"{at}input_scale"] = torch.tensor(0.01 + number % 5 / 1e4)

        edit_tensors(out, convert)
        ignore = list(exclude)
        stated = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ignore}
        stating(quantization_config=stated)(out)
        settings = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ignore}
        producer = {"name": "modelopt", "version": "0.47.0"}
        with_document("hf_quant_config.json", producer=producer, quantization=settings)(out)

    return change


def foreign(kind: str) -> Make:
    """A checkpoint of one of the kinds of `tests.formats.test_foreign`."""
    assert kind in KINDS
    return lambda out: made(out, kind)


def cached_scales(names: Iterable[str] = ("k_proj.k_scale", "v_proj.v_scale")) -> Make:
    """Calibrated scales of an FP8 cache, and their declaration."""
    scales = {
        f"model.layers.{index}.self_attn.{name}": torch.tensor(0.03 + index / 100)
        for index in range(LAYERS)
        for name in names
    }
    scheme = {"type": "float", "num_bits": 8, "dynamic": False}

    def declare(config: Config) -> None:
        config["quantization"]["kv_cache_quant_algo"] = "FP8"

    return then(
        with_tensors(lambda: scales),
        settled(kv_cache_scheme=scheme),
        lambda out: edit_json(out / "hf_quant_config.json", declare),
    )


# Calibration ------------------------------------------------------------------------------------

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}"
)
_WORDS = [
    "river",
    "stone",
    "amber",
    "quiet",
    "window",
    "lantern",
    "harbour",
    "meadow",
    "copper",
    "violet",
    "thunder",
]


def words(seed: int, count: int = 30) -> str:
    return " ".join(_WORDS[(seed * 7 + i * (i + seed)) % len(_WORDS)] for i in range(count))


def chat_model(out: Path, template: str = CHAT) -> None:
    """The model with a byte-level tokenizer that puts <s> before a text, and a template."""
    llama(out)
    special = ["<s>", "</s>", "<|turn|>", "<|end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - len(special)]
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(out / "tokenizer.json"))
    with_document("tokenizer_config.json", bos_token="<s>", eos_token="</s>")(out)
    (out / "chat_template.jinja").write_text(template)


def rows(make: Callable[[int], dict[str, Any]], count: int = 40, template: str = CHAT) -> Make:
    """A model and the calibration file `rows.jsonl` beside it."""

    def change(out: Path) -> None:
        chat_model(out, template)
        lines = (json.dumps(make(number), ensure_ascii=False) + "\n" for number in range(count))
        (out / "rows.jsonl").write_text("".join(lines), encoding="utf-8")

    return change


def talk(seed: int, **more: Any) -> list[dict[str, Any]]:
    user = {"role": "user", "content": words(seed)}
    return [user, {"role": "assistant", "content": words(seed + 1), **more}]
