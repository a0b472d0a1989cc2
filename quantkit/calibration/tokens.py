"""From a mixture and a tokenizer to samples: [samples, length] ids, and an account of them all."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import __version__
from quantkit.calibration.chat import Render, TemplateRefusalError, compile_template
from quantkit.calibration.config import CalibrationConfig, Source
from quantkit.calibration.documents import Corpus, Document, Dropped, shuffled
from quantkit.calibration.picture_samples import Arrays, Look, looker, processor_digest
from quantkit.calibration.sources import open_source
from quantkit.calibration.tokenfile import TokenFile, read_token_file, write_token_file
from quantkit.calibration.tokenizer import (
    Tokenizer,
    TokenizerInfo,
    load_tokenizer,
    read_tokenizer_info,
)
from quantkit.calibration.unnatural import MARKERS, Observed, turn_marker
from quantkit.checkpoint.paths import cache_dir
from quantkit.checkpoint.progress import Progress
from quantkit.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]

ALGORITHM = 3
"""Raised whenever the same input would give other tokens."""
PREVIEW_CHARS = 500


@dataclass
class SourceTokens:
    """The samples of one source, each a list of at most `length` ids, and where they came from;
    `inputs` are what a sample's pictures became, by its number."""

    source: Source
    wanted: int
    observed: Observed
    samples: list[list[int]] = field(default_factory=list)
    inputs: dict[int, Arrays] = field(default_factory=dict)
    seen: int = 0
    cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, str]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    @property
    def used(self) -> int:
        return self.observed.documents

    def drop(self, name: str, reason: str) -> None:
        self.dropped[reason] += 1
        if len(self.examples) < 5:
            self.examples.append({"document": name, "reason": reason})


def build_tokens(
    config: CalibrationConfig,
    model: Path,
    *,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> TokenFile:
    """The token file of a calibration for a model: from the cache, or made now.

    `progress(done, samples)` is called as samples come about. Raises InputError for a source
    that is missing, empty or too small, a field that does not exist, a model without tokenizer
    or with another model's, and samples longer than the model reads.
    """
    info = read_tokenizer_info(model, trust_remote_code)
    if info.max_length is not None and config.sequence_length > info.max_length:
        raise InputError(
            f"sequence_length = {config.sequence_length}, but the model {model} reads at most "
            f"{info.max_length} tokens (max_position_embeddings).",
            hint=f"set sequence_length to {info.max_length} or less",
            code="calibration.too_long",
        )
    corpora = [open_source(source) for source in config.sources]
    key = cache_key(config, info, corpora)
    path = cache_dir() / "calibration" / f"{key}.safetensors"
    if (cached := read_token_file(path)) is not None:
        return cached
    tokenizer = load_tokenizer(info, trust_remote_code)
    render: Render | None = None
    if info.chat_template is not None:
        render = compile_template(info.chat_template, info.special_tokens)
    encode = _encoder(info, tokenizer, render)
    look = looker(model, render) if config.has_pictures else None
    own = turn_marker(render, info.special_tokens) if render else None
    markers = (*MARKERS, own) if own else MARKERS
    parts: list[SourceTokens] = []
    wanted = shares([source.weight for source in config.sources], config.samples)
    for index, (source, corpus) in enumerate(zip(config.sources, corpora, strict=True)):
        observed = Observed(info.special_tokens.get("bos_token"), markers)
        part = SourceTokens(source, wanted[index], observed)
        done = sum(len(earlier.samples) for earlier in parts)
        for count in _fill(part, corpus.read(config.seed + index), config, info, encode, look):
            if progress is not None:
                progress(done + count, config.samples)
        _check_count(part, config)
        parts.append(part)
    ids, mask, pictures = _assemble(parts, config, info)
    summary = {"key": key, **_summary(config, info, corpora, parts, tokenizer)}
    return write_token_file(path, ids, mask, summary, pictures)


def cache_key(config: CalibrationConfig, info: TokenizerInfo, corpora: list[Corpus]) -> str:
    """SHA-256 (first 32 digits) over everything that shapes the tokens."""
    mixture = config.model_dump(exclude={"name", "description", "licence"})
    for source in mixture["sources"]:
        source.pop("path", None)  # its content's digest is in the key
    shaped_by = {
        "algorithm": ALGORITHM,
        "mixture": mixture,
        "content": [corpus.digest for corpus in corpora],
        "tokenizer": [info.digest, info.library, info.chat_template, dict(info.special_tokens)],
        "vocabulary": info.vocab_size,
    }
    if config.has_pictures:
        shaped_by["processor"] = [processor_digest(info.model), version("transformers")]
    text = json.dumps(shaped_by, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def shares(weights: list[float], total: int) -> list[int]:
    """`total` split in proportion to the weights, by largest remainders, at least 1 each."""
    spare = total - len(weights)
    exact = [weight / sum(weights) * spare for weight in weights]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: counts[i] - exact[i])
    for index in by_remainder[: spare - sum(counts)]:
        counts[index] += 1
    return [count + 1 for count in counts]


Encode = Callable[[Document, Source], tuple[list[int], bool]]


def _encoder(info: TokenizerInfo, tokenizer: Tokenizer, render: Render | None) -> Encode:
    """A document's ids, and whether the chat template already ended it."""
    bos = info.special_tokens.get("bos_token")

    def text_ids(text: str) -> list[int]:
        ids = tokenizer.encode(text, True)
        if bos and text.startswith(bos):
            begin = tokenizer.encode(bos, False)
            return ids[len(begin) :] if ids[: 2 * len(begin)] == 2 * begin else ids
        return ids

    def encode(document: Document, source: Source) -> tuple[list[int], bool]:
        if isinstance(document.content, str):
            return text_ids(document.content), False
        if render is not None:
            return tokenizer.encode(render(document.content, document.tools), False), True
        if source.without_template == "error":
            raise InputError(
                f"The calibration source {source.label} holds conversations, but the model "
                f"{info.model} has no chat template.",
                hint="add chat_template.jinja to the model, or set without_template: plain",
                code="calibration.no_template",
            )
        text = "\n\n".join(message["content"] or "" for message in document.content)
        return text_ids(text), False

    return encode


def _fill(
    part: SourceTokens,
    documents: Iterable[Document | Dropped],
    config: CalibrationConfig,
    info: TokenizerInfo,
    encode: Encode,
    look: Look | None,
) -> Iterable[int]:
    """Add samples to `part` until it has what it wants; yields their count as it grows."""
    length, packed = config.sequence_length, []
    for document in documents:
        part.seen += 1
        if isinstance(document, Dropped):
            part.drop(document.name, document.reason)
            continue
        if document.pictures and look is not None:
            ids, inputs = look(document, length)
            part.observed.add(document)
            part.lengths.append(len(ids))
            part.inputs[len(part.samples)] = inputs
            part.samples.append(ids)
            yield len(part.samples)
            if len(part.samples) == part.wanted:
                break
            continue
        try:
            ids, ended = encode(document, part.source)
        except TemplateRefusalError as error:
            part.drop(document.name, f"refused by the chat template: {error}")
            continue
        part.lengths.append(len(ids))
        if len(ids) < part.source.min_tokens:
            part.drop(document.name, f"fewer than {part.source.min_tokens} tokens (min_tokens)")
            continue
        if config.short == "drop" and len(ids) < length:
            part.drop(document.name, f"fewer than {length} tokens (short: drop)")
            continue
        part.observed.add(document)
        if config.short == "pack":
            packed += ids
            if not ended and ids[-1] != _eos(info):
                packed.append(_eos(info))
        else:
            packed = ids
        while len(packed) >= length and len(part.samples) < part.wanted:
            part.samples.append(packed[:length])
            packed = packed[length:] if config.short == "pack" else []
            part.cut += 0 if config.short == "pack" else len(ids) - length
            yield len(part.samples)
        if config.short == "pad" and packed:
            part.samples.append(packed)
            yield len(part.samples)
        if len(part.samples) == part.wanted:
            break
    if config.short == "pack" and packed:
        if len(part.samples) < part.wanted and config.allow_fewer:
            part.samples.append(packed)
        else:
            part.cut += len(packed)


def _eos(info: TokenizerInfo) -> int:
    if info.eos is None:
        raise InputError(
            f"{info.model} states no eos_token_id, which packing puts between documents.",
            hint="add eos_token_id to its generation_config.json, or set short: pad",
            code="calibration.no_eos",
        )
    return info.eos


def _check_count(part: SourceTokens, config: CalibrationConfig) -> None:
    got, label = len(part.samples), part.source.label
    dropped = "; ".join(f"{count} × {reason}" for reason, count in part.dropped.items())
    account = f"{part.seen} documents" + (f", of which dropped: {dropped}" if dropped else "")
    if not part.used:
        raise InputError(
            f"The calibration source {label} is empty: {account}.",
            hint=_empty_hint(part),
            code="calibration.empty_source",
        )
    if part.observed.only_identifiers:
        raise InputError(
            f"The calibration source {label} holds identifiers, not text: "
            f"{part.observed.identifiers} of {part.used} documents used are UUIDs, hex digests, "
            "base64 or numbered names.",
            hint="name its text_field or messages_field in a calibration file: "
            "quantkit calibration show default  # an example",
            code="calibration.identifiers",
        )
    if got < part.wanted and not config.allow_fewer:
        possible = config.samples * got // part.wanted
        fewer = f"set samples to {possible}, " if possible >= len(config.sources) else ""
        raise InputError(
            f"The calibration source {label} gave {got} of {part.wanted} samples of "
            f"{config.sequence_length} tokens: {account}, {sum(part.lengths)} tokens in all.",
            hint=f"{fewer}lower sequence_length, add text, or set allow_fewer: true",
            code="calibration.too_few_samples",
        )


def _empty_hint(part: SourceTokens) -> str:
    reasons = " ".join(part.dropped)
    if "min_tokens" in reasons:
        return "name another source, or lower its min_tokens"
    if "chat template" in reasons:
        return "name a source whose roles the template accepts, or repair the model's template"
    return "name another source, or mend its rows"


def _assemble(
    parts: list[SourceTokens], config: CalibrationConfig, info: TokenizerInfo
) -> tuple[Ids, Ids, dict[int, Arrays]]:
    """Ids and mask [samples, length], the sources' samples mixed in a seeded order, and what the
    pictures of a row became."""
    import numpy as np

    rows = [sample for part in parts for sample in part.samples]
    looked = [part.inputs.get(number) for part in parts for number in range(len(part.samples))]
    pictures = {}
    ids = np.full((len(rows), config.sequence_length), info.pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for place, row in enumerate(shuffled(len(rows), config.seed)):
        ids[place, : len(rows[row])] = rows[row]
        mask[place, : len(rows[row])] = 1
        if (inputs := looked[row]) is not None:
            pictures[place] = inputs
    largest = int(ids.max())
    if info.vocab_size is not None and largest >= info.vocab_size:
        raise InputError(
            f"The tokenizer in {info.model} gives token id {largest}, but the model's vocab_size "
            f"is {info.vocab_size}: it belongs to another model.",
            hint="copy the tokenizer files of the base model into the directory",
            code="calibration.wrong_tokenizer",
        )
    return ids, mask, pictures


def _summary(
    config: CalibrationConfig,
    info: TokenizerInfo,
    corpora: list[Corpus],
    parts: list[SourceTokens],
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    template = info.chat_template
    libraries = {"quantkit": __version__, "python": platform.python_version()}
    name, number = info.library.split()
    libraries[name] = number
    libraries |= {other: version(other) for other in ("jinja2", "numpy")}
    if any(source.type == "hub" for source in config.sources):
        libraries["datasets"] = version("datasets")
    return {
        "name": config.name,
        "licence": config.licence,
        "algorithm": ALGORITHM,
        "mixture": config.stored(),
        "tokenizer_digest": info.digest,
        "chat_template_digest": template and hashlib.sha256(template.encode()).hexdigest(),
        "sources": [
            {
                "source": part.source.label,
                "content_digest": corpus.digest,
                "samples": len(part.samples),
                "tokens": sum(map(len, part.samples)),
                "documents_seen": part.seen,
                "documents_used": part.used,
                "documents_dropped": dict(part.dropped),
                "documents_of_identifiers": part.observed.identifiers,
                "documents_rendered_already": part.observed.rendered,
                "dropped_examples": part.examples,
                "tokens_cut": part.cut,
                "preview": tokenizer.decode(part.samples[0])[:PREVIEW_CHARS],
            }
            for part, corpus in zip(parts, corpora, strict=True)
        ],
        "notes": [note for part in parts for note in part.observed.notes(part.source.label)],
        "document_lengths": histogram([n for part in parts for n in part.lengths]),
        "versions": libraries,
    }


def histogram(lengths: list[int]) -> dict[str, int]:
    """Counts by powers of two: `{"256-511": 12, …}`."""
    exponents = sorted(Counter(length.bit_length() for length in lengths).items())
    return {
        f"{1 << e - 1}-{(1 << e) - 1}" if e else "0": count for e, count in exponents
    }  # fmt: skip
