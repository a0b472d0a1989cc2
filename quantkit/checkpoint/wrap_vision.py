"""A vision-language model that answers text as a given Llama does: Idefics3 around its weights.

SmolVLM is SmolLM2 behind a vision tower. Here the tower and the connector are small and random, so
pictures change the answer and mean nothing; the text weights are copied, and text without pictures
gets the same logits. The words for pictures take the places of special tokens of the source that
texts do not hold, so the vocabulary stays as it is.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.demo import demo_model
from quantkit.checkpoint.directory import Checkpoint, is_sidecar, open_checkpoint, read_json
from quantkit.checkpoint.paths import cache_dir, keep_first
from quantkit.checkpoint.shards import write_shards
from quantkit.checkpoint.tensors import read_tensor
from quantkit.errors import InputError

if TYPE_CHECKING:
    import torch

    Named = Iterator[tuple[str, torch.Tensor]]

SEED = 0
SHARD_BYTES = 500_000_000
SCALE = 2
"""Patches a side that the connector joins into one token."""
VISION: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 64, "patch_size": 16, "num_channels": 3, "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh", "model_type": "idefics3_vision",
}  # fmt: skip
IMAGE = "<image>"
WORDS = ("<fake_token_around_image>", IMAGE, "<end_of_utterance>", "<global-img>")
"""Tokens that the processor of the family asks its tokenizer for."""
TOKENS = (VISION["image_size"] // VISION["patch_size"] // SCALE) ** 2
"""Tokens that a picture becomes."""

_PARTS = (
    "{%- macro text_of(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for part in content -%}{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)
"""Start of a chat template whose messages hold a text, or a list of pictures and texts."""


def demo_with_vision() -> Path:
    """The demo model behind a vision tower; made when not cached.

    Raises BackendError as `demo_model` does.
    """
    source = demo_model()
    target = cache_dir() / "demo" / f"{source.name}-vision"
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        staged = Path(work) / "model"
        wrap_vision(source, staged)
        keep_first(staged, target)
    return target


def wrap_vision(source: Path, target: Path) -> Path:
    """Write a dense Llama with a vision tower to the new directory `target`, with the files of its
    processor; the same weights every time.

    Raises InputError for a source that is no Llama with a fast tokenizer, or whose tokenizer has
    no special tokens to spare.
    """
    dense = open_checkpoint(source)
    if dense.config.get("model_type") != "llama" or not (source / "tokenizer.json").is_file():
        raise InputError(
            f"{source} is a {dense.config.get('model_type')}; only a Llama with a tokenizer.json "
            "can be given a vision tower.",
            hint="give the directory of a 16-bit Llama",
            code="wrap_vision.not_llama",
        )
    words = _spare_tokens(source)
    target.mkdir(parents=True)
    for path in source.iterdir():
        if is_sidecar(path.name) or path.name == "README.md":
            shutil.copyfile(path, target / path.name)
    documents = {
        "config.json": _config(dense, words[IMAGE][0]),
        "tokenizer.json": _renamed(read_json(source / "tokenizer.json"), words),
        "processor_config.json": {"image_seq_len": TOKENS, "processor_class": "Idefics3Processor"},
        "preprocessor_config.json": _pictures(),
    }
    for name, document in documents.items():
        _write(target / name, document)
    template = target / "chat_template.jinja"
    if template.is_file():
        said = template.read_text(encoding="utf-8")
        said = said.replace("message['content']", "text_of(message['content'])")
        template.write_text(_PARTS + said, encoding="utf-8")
    write_shards(target, _tensors(dense), SHARD_BYTES)
    return target


def _write(file: Path, document: dict[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(dense: Checkpoint, image_token: int) -> dict[str, Any]:
    text = {key: value for key, value in dense.config.items() if key != "architectures"}
    shared = ("dtype", "eos_token_id", "bos_token_id", "pad_token_id", "tie_word_embeddings")
    return {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        **{key: text[key] for key in shared if key in text},
        "image_token_id": image_token,
        "scale_factor": SCALE,
        "text_config": text,
        "vision_config": VISION,
    }


def _pictures() -> dict[str, Any]:
    """Every picture as one square, padded."""
    edge = {"longest_edge": VISION["image_size"]}
    return {
        "do_convert_rgb": True, "do_image_splitting": False, "do_normalize": True, "do_pad": True,
        "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "image_processor_type": "Idefics3ImageProcessor", "max_image_size": edge,
        "processor_class": "Idefics3Processor", "resample": 1, "rescale_factor": 1 / 255,
        "size": edge,
    }  # fmt: skip


def _spare_tokens(source: Path) -> dict[str, tuple[int, str]]:
    """Word for pictures → id and text of the special token of the source whose place it takes."""
    settings = source / "tokenizer_config.json"
    used = set(map(str, read_json(settings).values())) if settings.is_file() else set()
    template = source / "chat_template.jinja"
    said = template.read_text(encoding="utf-8") if template.is_file() else ""
    added = read_json(source / "tokenizer.json").get("added_tokens") or []
    spare = [
        (int(token["id"]), str(token["content"]))
        for token in added
        if token.get("special") and token["content"] not in used and token["content"] not in said
    ]
    if len(spare) < len(WORDS):
        raise InputError(
            f"The tokenizer of {source} has {len(spare)} special tokens to spare; a processor of "
            f"pictures needs {len(WORDS)}.",
            hint="give a model whose tokenizer has more",
            code="wrap_vision.no_tokens",
        )
    return dict(zip(WORDS, spare[-len(WORDS) :], strict=True))


def _renamed(tokenizer: dict[str, Any], words: dict[str, tuple[int, str]]) -> dict[str, Any]:
    """A tokenizer.json in which the spare tokens have the words' texts."""
    new = {old: word for word, (_, old) in words.items()}
    for token in tokenizer["added_tokens"]:
        token["content"] = new.get(token["content"], token["content"])
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {new.get(text, text): at for text, at in vocabulary.items()}
    return tokenizer


def _tensors(dense: Checkpoint) -> Named:
    import torch

    random = torch.Generator().manual_seed(SEED)
    for name, shape in _vision_shapes():
        yield f"model.vision_model.{name}", _drawn(name, shape, random)
    embedding = read_tensor(dense.tensors["model.embed_tokens.weight"]).float()
    width = VISION["hidden_size"] * SCALE**2
    projection = torch.randn(embedding.shape[1], width, generator=random) / math.sqrt(width)
    # Pictures come out as large as the embeddings of words.
    yield (
        "model.connector.modality_projection.proj.weight",
        (projection * embedding.std()).bfloat16(),
    )
    for name, info in dense.tensors.items():
        inside = name.removeprefix("model.")
        yield name if inside == name else f"model.text_model.{inside}", read_tensor(info)


def _vision_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the tower, in BF16."""
    hidden, inner, patch = (VISION[f"{of}_size"] for of in ("hidden", "intermediate", "patch"))
    side = VISION["image_size"] // patch
    yield "embeddings.patch_embedding.weight", (hidden, VISION["num_channels"], patch, patch)
    yield "embeddings.patch_embedding.bias", (hidden,)
    yield "embeddings.position_embedding.weight", (side * side, hidden)
    linears = {f"self_attn.{leaf}_proj": (hidden, hidden) for leaf in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (inner, hidden), "mlp.fc2": (hidden, inner)}
    for layer in range(VISION["num_hidden_layers"]):
        block = f"encoder.layers.{layer}"
        for norm in ("layer_norm1", "layer_norm2"):
            yield from ((f"{block}.{norm}.{part}", (hidden,)) for part in ("weight", "bias"))
        for leaf, shape in linears.items():
            yield f"{block}.{leaf}.weight", shape
            yield f"{block}.{leaf}.bias", shape[:1]
    yield from ((f"post_layernorm.{part}", (hidden,)) for part in ("weight", "bias"))


def _drawn(name: str, shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    import torch

    if "norm" in name and name.endswith(".weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    if name.endswith(".bias"):
        return torch.zeros(shape, dtype=torch.bfloat16)
    fan_in = math.prod(shape[1:])
    return (torch.randn(shape, generator=random) / math.sqrt(fan_in)).bfloat16()
