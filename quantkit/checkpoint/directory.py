"""A Hugging Face checkpoint directory, read only: config, index, headers, lazy tensors, digests.

Headers are parsed with the standard library (`headers`), so that a plan needs neither torch nor
safetensors; tensors are read with safetensors on request, one at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.config import read_model_config
from quantkit.checkpoint.headers import DTYPE_BITS, TensorInfo, broken, read_header, read_json
from quantkit.checkpoint.network.fp8_blocks import BLOCK_SIZE, two_sizes
from quantkit.checkpoint.network.modules import Module, classify
from quantkit.checkpoint.weight_files import (
    INDEX_SUFFIX,
    index_of,
    missing_shard,
    reading_notes,
    refuse_adapter,
    snapshots,
    unindexed,
)
from quantkit.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = [
    "DTYPE_BITS", "INDEX_SUFFIX", "VOLATILE_CONFIG_KEYS", "Checkpoint", "TensorInfo", "index_of",
    "is_sidecar", "open_checkpoint", "read_header", "read_json", "read_model_config",
    "read_weight_map",
]  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """What a directory holds. Build one with `open_checkpoint`; nothing here writes."""

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    documents: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Parsed JSON documents beside the config that describe quantization, by file name."""
    derived: str | None = None
    """What names and shapes were derived from where shards are absent; such a checkpoint can be
    planned for, not read."""
    notes: tuple[str, ...] = ()
    """What a user should know of how the directory was read."""

    @property
    def files(self) -> list[Path]:
        """The shards, in the order of their names."""
        return sorted({info.file for info in self.tensors.values()})

    @property
    def weight_bytes(self) -> int:
        return sum(info.bytes for info in self.tensors.values())

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """`quantization_config` (or Transformers' nested / older spellings) of config.json."""
        text = self.config.get("text_config")
        nested = text.get("quantization_config") if isinstance(text, dict) else None
        found = (
            self.config.get("quantization_config")
            or self.config.get("compression_config")
            or nested
        )
        return found if isinstance(found, dict) else None

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, by name."""
        return {name: info.shape for name, info in self.tensors.items()}

    @cached_property
    def modules(self) -> list[Module]:
        """Every module with a weight, as names and shapes tell; of a 16-bit checkpoint."""
        return classify(self.shapes, self.config)

    @cached_property
    def _handles(self) -> dict[Path, Any]:
        return {}

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor's values on the CPU, in the dtype of the file."""
        from safetensors import safe_open

        file = self.tensors[name].file
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt")
        tensor: torch.Tensor = self._handles[file].get_tensor(self.tensors[name].stored or name)
        return tensor

    def digest(self, name: str) -> str:
        """SHA-256 over dtype, shape and bytes of one tensor."""
        from quantkit.checkpoint.tensors import digest

        return digest(self.tensors[name])

    def digests(self) -> dict[str, str]:
        """Every tensor's digest, by name."""
        return {name: self.digest(name) for name in sorted(self.tensors)}

    def fingerprint(self, digests: Mapping[str, str] | None = None) -> str:
        """SHA-256 over the config (volatile keys aside) and every tensor's digest."""
        stable = {k: v for k, v in self.config.items() if k not in VOLATILE_CONFIG_KEYS}
        total = hashlib.sha256(json.dumps(stable, sort_keys=True).encode())
        for name, digest in sorted((self.digests() if digests is None else digests).items()):
            total.update(f"{name}={digest};".encode())
        return total.hexdigest()

    def sidecars(self) -> Iterator[Path]:
        """Files beside config, weights and index that a user of the model needs."""
        for path in sorted(self.path.iterdir()):
            if path.is_file() and is_sidecar(path.name):
                yield path


VOLATILE_CONFIG_KEYS = frozenset({"_name_or_path", "_model_name_or_path", "transformers_version"})

_SIDECAR_NAMES = frozenset(
    {
        "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
        "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
        "spiece.model", "sentencepiece.bpe.model", "tekken.json", "chat_template.json",
        "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
        "video_preprocessor_config.json", "image_processor_config.json", "tiktoken.model",
    }
)  # fmt: skip


def is_sidecar(name: str) -> bool:
    """Whether a file of this name travels with a model (tokenizer, template, processor)."""
    return name in _SIDECAR_NAMES or name.endswith((".tiktoken", ".jinja"))


def open_checkpoint(path: Path) -> Checkpoint:
    """Read config and headers of a directory.

    Raises InputError (code `checkpoint.*`) for a directory that is missing, empty, has no config
    or no weights, and for shards that are absent, truncated, outside the directory, or disagree
    with the index.
    """
    if not path.exists():
        raise InputError(
            f"{path} does not exist.",
            hint="give a directory that holds config.json and *.safetensors",
            code="checkpoint.missing",
        )
    if not path.is_dir():
        raise InputError(
            f"{path} is a file, not a model directory.",
            hint=f"give its directory: {path.parent}",
            code="checkpoint.not_a_directory",
        )
    if not any(path.iterdir()):
        raise InputError(
            f"{path} is empty.",
            hint="copy config.json, the tokenizer and *.safetensors into it, or name another one",
            code="checkpoint.empty",
        )
    config_file = path / "config.json"
    if not config_file.is_file():
        refuse_adapter(path)
        cached = snapshots(path)
        if cached:
            raise InputError(
                f"{path} is a folder of the Hugging Face cache; the model is in a snapshot of it.",
                hint=f"give the snapshot: {shlex.quote(str(cached[0]))}",
                code="checkpoint.cache_folder",
            )
        raise InputError(
            f"{path} has no config.json.",
            hint="save the model with save_pretrained, or copy its config.json here",
            code="checkpoint.no_config",
        )
    config = read_model_config(config_file)
    documents = {
        name: read_json(path / name)
        for name in (
            "hf_quant_config.json",
            "quant_model_description.json",
            "quantize_config.json",
            "quant_config.json",
            "quantization_config.json",
        )
        if (path / name).is_file()
    }
    tensors = _read_headers(path)
    own_factors = any(key.endswith("_lora") for key in config)  # Phi-4 multimodal
    refuse_adapter(path, () if own_factors else tensors)
    aside = reading_notes(path, {info.file for info in tensors.values()})
    return Checkpoint(path, config, with_inverse_scales(tensors, config), documents, notes=aside)


def with_inverse_scales(
    tensors: dict[str, TensorInfo], config: Mapping[str, Any]
) -> dict[str, TensorInfo]:
    """The tensors, those of FP8 blocks whose scales are named `.scale` (DeepSeek-V4) under the name
    that they have elsewhere, `.weight_scale_inv`; only where the scale's shape is the blocks'."""
    settings = config.get("quantization_config") or {}
    block = two_sizes(settings.get(BLOCK_SIZE)) if isinstance(settings, Mapping) else None
    if block is None:
        return tensors
    found = {}
    for name, info in tensors.items():
        weight = tensors.get(f"{name.removesuffix('.scale')}.weight")
        if name.endswith(".scale") and weight is not None and weight.dtype == "F8_E4M3":
            grid = tuple(-(-n // b) for n, b in zip(weight.shape, block, strict=False))
            if grid == info.shape:
                name = f"{weight.name}_scale_inv"
                info = replace(info, name=name, stored=info.name)
        found[name] = info
    return found


def _read_headers(path: Path) -> dict[str, TensorInfo]:
    index_file = index_of(path)
    if index_file is not None:
        return _read_indexed(path, index_file)
    tensors: dict[str, TensorInfo] = {}
    for shard in unindexed(path):
        for name, info in read_header(shard).items():
            if name in tensors:
                raise broken(
                    shard,
                    f"holds tensor {name}, which {tensors[name].file.name} holds too",
                    "checkpoint.duplicate_tensor",
                )
            tensors[name] = info
    return tensors


def read_weight_map(path: Path, index_file: Path) -> dict[str, str]:
    """Tensor → shard of an index; every shard lies in `path`. InputError when it is not one."""
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise broken(index_file, "has no weight_map", "checkpoint.bad_index")
    found = {str(name): str(shard) for name, shard in weight_map.items()}
    for shard_name in sorted(set(found.values())):
        if Path(shard_name).name != shard_name or shard_name in ("", ".", ".."):
            raise broken(
                index_file,
                f"names a shard outside of {path}: {shard_name!r}",
                "checkpoint.index_escapes",
            )
    return found


def _read_indexed(path: Path, index_file: Path) -> dict[str, TensorInfo]:
    weight_map = read_weight_map(path, index_file)
    headers: dict[str, dict[str, TensorInfo]] = {}
    tensors: dict[str, TensorInfo] = {}
    for shard_name in sorted(set(weight_map.values())):
        shard = path / shard_name
        if not os.path.lexists(shard):
            raise missing_shard(path, index_file, weight_map)
        headers[shard_name] = read_header(shard)
    for name, shard_name in weight_map.items():
        info = headers[shard_name].get(name)
        if info is None:
            raise broken(
                index_file,
                f"places tensor {name} in {shard_name}, which does not hold it",
                "checkpoint.index_mismatch",
            )
        tensors[name] = info
    for shard_name, header in headers.items():
        stray = sorted(name for name in header if weight_map.get(name) != shard_name)
        if stray:
            raise broken(
                index_file,
                f"does not place {stray[0]} (and {len(stray) - 1} more) in {shard_name}, "
                "which holds it",
                "checkpoint.index_mismatch",
            )
    return tensors
