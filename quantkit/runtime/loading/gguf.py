"""A GGUF file as a source of weights: dequantized one at a time, activations stay in 16 bit.

The network's config is rebuilt from the file's metadata. The tokenizer is not: ids are those of the
model that the file was made from, so its tokenizer files are what encodes text for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.gguf import GgufFile, open_gguf
from quantkit.checkpoint.network.families import FAMILIES
from quantkit.errors import InputError, command
from quantkit.runtime.loading.source import CheckpointReader, check_finite, wrong_shape
from quantkit.verification.gguf import Pair, source_values

_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "head_dim": "attention.key_length",
}
"""Key of a Transformers config → the file's, without its architecture."""


@dataclass(kw_only=True)
class GgufSource(CheckpointReader):
    """`stored`: Transformers' name of every tensor of the network that the file holds → its own."""

    held: GgufFile
    stored: Mapping[str, str]

    @property
    def names(self) -> Collection[str]:
        return self.stored.keys()

    @property
    def layout(self) -> str | None:
        return "gguf"

    @property
    def expanded(self) -> dict[str, str]:
        return {
            name.removesuffix(".weight"): self.held.tensors[stored].type
            for name, stored in self.stored.items()
            if self.held.tensors[stored].quantized
        }

    def plain(self, name: str, shape: tuple[int, ...] | None, dtype: torch.dtype) -> torch.Tensor:
        self.require(name)
        stored = self.held.tensors[self.stored[name]]
        if shape is not None and stored.shape != shape:
            raise wrong_shape(name, stored.shape, shape)
        self.used.add(name)
        values = source_values(self.held, Pair(name, stored))
        check_finite(name, values)
        return values.to(dtype)

    def unused(self) -> list[str]:
        known = set(self.stored.values())
        strangers = sorted(name for name in self.held.tensors if name not in known)
        return strangers + sorted(self.stored.keys() - self.used)


def open_gguf_source(path: Path) -> GgufSource:
    """Understand the one GGUF file of a directory.

    Raises InputError: `runtime.architecture` for a network that is not known here, `gguf.*` for a
    file that is broken or lacks metadata.
    """
    held = open_gguf(path)
    computed = [t for f in FAMILIES if f.gguf and f.network == "decoder" for t in f.types]
    if held.architecture not in computed:
        raise InputError(
            f"{held.file} holds a {held.architecture or 'nameless'} network; of GGUF the runtime "
            f"computes {', '.join(computed)}.",
            hint="evaluate it in llama.cpp, or quantize to another layout",
            code="runtime.architecture",
        )
    if "rope_freqs.weight" in held.tensors or _meta(held, "rope.scaling.type") not in (
        None,
        "none",
    ):
        raise InputError(
            f"{held.file} scales its rotary frequencies, which is not read from GGUF here.",
            hint="evaluate it in llama.cpp, or quantize to another layout",
            code="runtime.architecture",
        )
    names = _names(held)
    checkpoint = Checkpoint(path, _config(held, names), {}, {})
    return GgufSource(checkpoint=checkpoint, subject=None, held=held, stored=names)


def _meta(held: GgufFile, key: str) -> Any:
    return held.metadata.get(f"{held.architecture}.{key}")


def _names(held: GgufFile) -> dict[str, str]:
    """Transformers' names of the file's tensors."""
    import gguf

    kinds = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if "token_embd.weight" not in held.tensors:
        raise _lacking(held, "the tensor token_embd.weight")
    count = int(_required(held, "block_count"))
    known = gguf.get_tensor_name_map(kinds[held.architecture], count)
    candidates = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    leaves = [f"self_attn.{leaf}" for leaf in ("q_norm", "k_norm")]
    leaves += [f"self_attn.{leaf}_proj" for leaf in "qkvo"]
    leaves += [f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")]
    leaves += ["input_layernorm", "post_attention_layernorm"]
    for index in range(count):
        for leaf in leaves:
            candidates += [f"model.layers.{index}.{leaf}.{part}" for part in ("weight", "bias")]
    found = {}
    for name in candidates:
        stored = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored in held.tensors:
            found[name] = stored
    return found


def _config(held: GgufFile, names: Mapping[str, str]) -> dict[str, Any]:
    """config.json as Transformers would have it."""
    optional = ("head_dim", "num_key_value_heads")
    config: dict[str, Any] = {
        key: _meta(held, theirs) if key in optional else _required(held, theirs)
        for key, theirs in _KEYS.items()
    }
    config = {key: value for key, value in config.items() if value is not None}
    ids = {
        key: held.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        for key, theirs in {
            "bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"
        }.items()
    }  # fmt: skip
    return {
        "model_type": held.architecture,
        **config,
        **ids,
        "vocab_size": held.tensors["token_embd.weight"].shape[0],
        "hidden_act": "silu",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(_meta(held, "rope.freq_base") or 10000.0),
        },
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in names,
        "tie_word_embeddings": "lm_head.weight" not in names,
        "dtype": "bfloat16",
    }


def _required(held: GgufFile, key: str) -> Any:
    value = _meta(held, key)
    if value is None:
        raise _lacking(held, f"the key {held.architecture}.{key}")
    return value


def _lacking(held: GgufFile, what: str) -> InputError:
    return InputError(
        f"{held.file} lacks {what}.", hint=command("verify", held.path), code="gguf.incomplete"
    )
