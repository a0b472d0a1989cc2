"""The integrity of a GGUF container: metadata, names, shapes, types, and values with a source.

The rules on config.json, ignore lists and sidecars do not apply: types may be mixed, the embedding
may be quantized, and the rows of q and k of Llama's architecture are permuted (llama.cpp's
`LlamaModel.permute`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.directory import Checkpoint, open_checkpoint
from quantkit.checkpoint.gguf import GgufFile, GgufTensor, open_gguf
from quantkit.checkpoint.network.config import is_tied
from quantkit.checkpoint.network.families import family_of
from quantkit.checkpoint.network.language import text_config
from quantkit.checkpoint.progress import Progress
from quantkit.errors import InputError
from quantkit.verification.files.digests import check_seal, read_seal
from quantkit.verification.findings import (
    Finding,
    LayerFidelity,
    PlannedLayers,
    VerifyReport,
    decibels,
    error,
    from_exception,
    info,
)

if TYPE_CHECKING:
    import torch

AGAIN = "quantize again; the file is not what its source asks for"
_REQUIRED = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
_FROM_CONFIG = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
"""Key of the file without its architecture → key of the source's config."""
_FLOORS = {"8": 16.0, "6": 16.0, "5": 12.0, "4": 9.0, "3": 6.5, "2": 0.0}
"""First digit of a type's name → SQNR in dB under which a tensor counts as broken."""
_RELATIVE = 1e-5


@dataclass(frozen=True)
class Pair:
    """A tensor of the source and what became of it."""

    name: str
    stored: GgufTensor


def verify_gguf(
    path: Path,
    source: Path | None,
    plan: PlannedLayers | None,
    progress: Progress | None,
) -> VerifyReport:
    """`verify` for a directory that holds one GGUF file; see there."""
    start = time.monotonic()
    report = VerifyReport(path, "gguf", source)
    try:
        held = open_gguf(path)
    except InputError as problem:
        report.findings.append(from_exception(problem))
        return report
    report.tensors_checked = len(held.tensors)
    report.modules_quantized = sum(tensor.quantized for tensor in held.tensors.values())
    report.findings += _alone(held)
    seal, malformed = read_seal(held)
    report.findings += malformed
    if seal is not None:
        report.findings += check_seal(held, seal)
    if source is None or not family_of(held.architecture).gguf:
        report.findings += _check_values(held)
    if source is not None and not report.errors:
        base = open_checkpoint(source)
        report.findings += _metadata(held, base)
        plan = plan or (seal.plan if seal else None)
        _compare(report, held, base, plan, progress)
    report.seconds = time.monotonic() - start
    return report


def _alone(held: GgufFile) -> Iterator[Finding]:
    """What every file must hold, whatever it was made from."""
    arch, data = held.architecture, held.metadata
    wanted = [f"{arch}.{key}" for key in _REQUIRED]
    wanted += ["general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.tokens"]
    missing = [key for key in wanted if data.get(key) in (None, "", [])]
    for key in missing:
        yield error("gguf.metadata_missing", f"the key {key} is missing or empty", AGAIN, key)
    if missing:
        return
    embedding = held.tensors.get("token_embd.weight")
    if embedding is None:
        yield error("gguf.tensor_missing", "token_embd.weight is missing", AGAIN)
    elif embedding.shape[0] != len(data["tokenizer.ggml.tokens"]):
        yield error(
            "gguf.vocabulary",
            f"{len(data['tokenizer.ggml.tokens'])} tokens are listed, and the embedding has "
            f"{embedding.shape[0]} rows",
            AGAIN,
            "tokenizer.ggml.tokens",
        )
    blocks: dict[str, set[str]] = {}
    for name in held.tensors:
        if name.startswith("blk."):
            _, number, leaf = name.split(".", 2)
            blocks.setdefault(number, set()).add(leaf)
    count = data[f"{arch}.block_count"]
    if len(blocks) != count:
        yield error(
            "gguf.blocks", f"{arch}.block_count is {count}, and {len(blocks)} are there", AGAIN
        )
    everything = set().union(*blocks.values()) if blocks else set()
    for number, leaves in blocks.items():
        for leaf in sorted(everything - leaves):
            name = f"blk.{number}.{leaf}"
            yield error("gguf.tensor_missing", f"{name} is missing", AGAIN, name)
    if not any(tensor.quantized for tensor in held.tensors.values()):
        yield error("gguf.nothing_quantized", "no tensor is quantized", AGAIN)


def _check_values(held: GgufFile) -> Iterator[Finding]:
    """What can be said of values without a source."""
    for name, tensor in held.tensors.items():
        values = tensor.values()
        yield from _not_finite(name, values)
        if tensor.quantized and not values.any():
            yield error("gguf.all_zero", f"{name} ({tensor.type}) is zero throughout", AGAIN, name)


def _not_finite(name: str, values: Any) -> list[Finding]:
    import numpy as np

    broken = int(values.size - np.isfinite(values).sum())
    said = f"{name}: {broken} values are not finite"
    return [error("gguf.not_finite", said, AGAIN, name)] if broken else []


def _metadata(held: GgufFile, base: Checkpoint) -> Iterator[Finding]:
    """Keys that must say what the source's config and tokenizer say."""
    config, arch = text_config(base.config), held.architecture
    pairs = [(f"{arch}.{key}", config.get(theirs)) for key, theirs in _FROM_CONFIG.items()]
    rope = config.get("rope_parameters")
    theta = config.get("rope_theta") or (rope.get("rope_theta") if isinstance(rope, dict) else None)
    pairs.append((f"{arch}.rope.freq_base", theta))
    pairs += list(_tokenizer(base))
    for key, wanted in pairs:
        found = held.metadata.get(key)
        if wanted is None or found is None or _equal(found, wanted):
            continue
        yield error(
            "gguf.metadata_differs",
            f"{key} is {_short(found)}, and the source says {_short(wanted)}",
            AGAIN,
            key,
        )


def _tokenizer(base: Checkpoint) -> Iterator[tuple[str, Any]]:
    """The tokenizer's keys as the source's files have them."""
    file = base.path / "tokenizer.json"
    if file.is_file():
        document = json.loads(file.read_text(encoding="utf-8"))
        byte_level = '"ByteLevel"' in json.dumps(document.get("pre_tokenizer"))
        if document.get("model", {}).get("type") == "BPE":
            yield "tokenizer.ggml.model", "gpt2" if byte_level else None
    template = base.path / "chat_template.jinja"
    if template.is_file():
        yield "tokenizer.chat_template", template.read_text(encoding="utf-8")


def _compare(
    report: VerifyReport,
    held: GgufFile,
    base: Checkpoint,
    plan: PlannedLayers | None,
    progress: Progress | None,
) -> None:
    """Every tensor of the source against what is stored under llama.cpp's name of it."""
    pairs, findings = source_pairs(held, base)
    report.findings += findings
    quantized = {} if plan is None else plan.quantized
    for module in quantized:
        pair = next((p for p in pairs if p.name == f"{module}.weight"), None)
        if pair is None or not pair.stored.quantized:
            kind = pair.stored.type if pair else "missing"
            report.findings.append(
                error("plan.not_quantized", f"{module} was to be quantized and is {kind}", AGAIN)
            )
    if not family_of(held.architecture).gguf:
        said = f"values of the architecture {held.architecture} are not compared with the source"
        report.findings.append(info("gguf.values_not_compared", said, "evaluate it in llama.cpp"))
        return
    for done, pair in enumerate(pairs, 1):
        report.ledger["quantized" if pair.stored.quantized else "kept"] += 1
        report.findings += _value(report, held, base, pair)
        if progress:
            progress(min(done, len(quantized) or done), len(quantized) or len(pairs))
    report.layers.sort(key=lambda layer: layer.sqnr_db)


def source_pairs(held: GgufFile, base: Checkpoint) -> tuple[list[Pair], list[Finding]]:
    """The tensors of the source with what is stored of each, and what is missing or misshapen."""
    import gguf

    kinds = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if held.architecture not in kinds:
        said = f"the architecture {held.architecture!r} is not known"
        return [], [error("gguf.architecture", said, "update the package gguf")]
    count = int(held.metadata[f"{held.architecture}.block_count"])
    names = gguf.get_tensor_name_map(kinds[held.architecture], count)
    pairs, findings, used = [], [], set()
    for name, tensor in base.tensors.items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        stored = held.tensors.get(theirs or "")
        if stored is None:
            if not (theirs == "output.weight" and is_tied(base.config)):
                findings.append(
                    error("gguf.tensor_missing", f"{name} of the source is missing", AGAIN, name)
                )
        elif stored.shape != tensor.shape:
            said = f"{theirs} is {list(stored.shape)}, {name} is {list(tensor.shape)}"
            findings.append(error("gguf.shape", said, AGAIN, theirs))
        else:
            pairs.append(Pair(name, stored))
        used.add(theirs)
    for extra in sorted(held.tensors.keys() - used):
        said = f"{extra} has no counterpart in the source"
        findings.append(info("gguf.extra", said, "rope_freqs and the like are computed"))
    return pairs, findings


def _value(report: VerifyReport, held: GgufFile, base: Checkpoint, pair: Pair) -> list[Finding]:
    """One tensor's values; quantized ones are judged by their SQNR, others by equality."""
    import torch

    name, source = pair.stored.name, base.tensor(pair.name).float()
    mine = source_values(held, pair)
    broken = _not_finite(name, mine.numpy())
    if broken:
        return broken
    if not pair.stored.quantized:
        if torch.allclose(mine, source, rtol=_RELATIVE, atol=0):
            return []
        return [error("gguf.altered", f"{name} differs from {pair.name}", AGAIN, name)]
    noise = float((mine - source).square().sum())
    sqnr = decibels(float(source.square().sum()), noise)
    floor = _FLOORS.get(next((c for c in pair.stored.type if c.isdigit()), "8"), 1.0)
    module = pair.name.removesuffix(".weight")
    report.layers.append(LayerFidelity(module, pair.stored.type, sqnr, floor))
    if sqnr >= floor:
        return []
    said = f"{name} ({pair.stored.type}) is at {sqnr:.1f} dB of {pair.name}; the floor is {floor}"
    return [error("sqnr.below_floor", said, AGAIN, name)]


def source_values(held: GgufFile, pair: Pair) -> torch.Tensor:
    """The dequantized values of a stored tensor, float32, in the source's order of rows."""
    import torch

    values = torch.from_numpy(pair.stored.values().copy())
    heads = _heads(held, pair.name)
    return _unpermuted(values, heads) if heads else values


def _heads(held: GgufFile, name: str) -> int:
    """Heads whose rows are permuted in this tensor, 0 when they are not."""
    if family_of(held.architecture).gguf != "permuted":
        return 0
    arch, count = held.architecture, held.metadata[f"{held.architecture}.attention.head_count"]
    if ".q_proj." in name:
        return int(count)
    kv = held.metadata.get(f"{arch}.attention.head_count_kv", count)
    return int(kv) if ".k_proj." in name else 0


def _unpermuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp interleaves the two halves of each head's rows; this undoes it."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _equal(found: Any, wanted: Any) -> bool:
    if isinstance(found, float) or isinstance(wanted, float):
        return abs(float(found) - float(wanted)) <= _RELATIVE * abs(float(wanted))
    return bool(found == wanted)


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}…"
