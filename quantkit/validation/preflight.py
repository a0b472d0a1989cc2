"""Refusals before a token is generated: broken checkpoints, baselines that do not fit, memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.backends.process.job import Reporter
from quantkit.calibration.chat import THINKING, Render, compile_template
from quantkit.calibration.tokenizer import (
    Tokenizer,
    TokenizerInfo,
    load_tokenizer,
    read_tokenizer_info,
)
from quantkit.checkpoint.directory import Checkpoint, open_checkpoint
from quantkit.checkpoint.gguf import GgufFile, gguf_in, open_gguf
from quantkit.checkpoint.hub import resolve_model
from quantkit.checkpoint.network.config import positions, text_size
from quantkit.checkpoint.network.language import text_config
from quantkit.checkpoint.progress import Progress
from quantkit.checkpoint.provenance import Provenance, Source, read
from quantkit.checkpoint.scan import Scan, scan
from quantkit.checkpoint.source_record import source_of
from quantkit.errors import InputError, command
from quantkit.formats.registry import is_quantized
from quantkit.pipeline.quantized_source import as_subject, dequantized
from quantkit.verification import VerifyReport, verify

SHAPE_KEYS = (
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size",
    "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip
PROBE = 'The quick brown fox (№ 42) said:\n\t"naïve café, 3.14 – 世界!"  def f(x): return x**2'
"""Text whose ids tell one tokenizer from another."""

_EMBEDDINGS = ("embed_tokens", "tok_embeddings", "word_embeddings", "embed_in", "wte")

_STILL_LOADS = (
    "sqnr.", "scale.wrong", "fold.", "ledger.altered", "ledger.cast", "sidecar.", "config.removed",
    "plan.", "kv.", "input_scale.uncalibrated", "gguf.altered", "ignore.",
)  # fmt: skip
"""Errors of `verify` with which a checkpoint loads and runs: the gates judge these."""


@dataclass(frozen=True)
class Candidate:
    """The checkpoint under test and its baseline, opened and found comparable.

    `provenance` is the checkpoint's quantkit.json, None where there is none.
    """

    held: Checkpoint | GgufFile
    baseline: Checkpoint
    provenance: Provenance | None

    @property
    def path(self) -> Path:
        return self.held.path

    @property
    def source(self) -> Source:
        """What it was made from, as far as it says so."""
        return (self.provenance and self.provenance.source) or Source()


def open_candidate(path: Path, baseline: str) -> Candidate:
    """Open both, of a quantized source as baseline its dequantized copy. Raises InputError for what
    cannot be opened, for a baseline that is quantized in a way that is not read as a source, of
    another architecture or with another tokenizer, or that nothing names."""
    held = open_gguf(path) if gguf_in(path) else open_checkpoint(path)
    provenance = read(path)
    base = open_checkpoint(resolve_model(baseline or remembered(path, provenance)))
    if subject := as_subject(base):
        base = open_checkpoint(dequantized(subject))
    if found := is_quantized(base):
        raise InputError(
            f"The baseline {base.path} is quantized itself ({found}).",
            hint="--baseline with the 16-bit model that this checkpoint was made from",
            code="validate.baseline_quantized",
        )
    if isinstance(held, Checkpoint):
        _refuse_other_architecture(held, base)
        _refuse_other_tokenizer(held, base)
    return Candidate(held, base, provenance)


def source_here(path: Path, ui: Reporter) -> tuple[Path, Scan] | None:
    """The directory of this machine that a checkpoint was made from, with its scan; None where
    none is noted, or it no longer holds that model."""
    stated = read(path)
    fingerprint = stated.source.fingerprint if stated and stated.source else ""
    directory = source_of(fingerprint) if fingerprint else None
    if directory is None:
        return None
    try:
        source = open_checkpoint(directory)
        ui.stage("scan baseline", source.weight_bytes, "bytes")
        found = scan(source, ui.advance)
    except InputError:
        found = None
    if found is None or found.fingerprint != fingerprint:
        ui.note(f"{directory} no longer holds the model that {path} was made from")
        return None
    return directory, found


def check_integrity(candidate: Candidate, progress: Progress | None = None) -> VerifyReport:
    """`verify` against the baseline; InputError for an error with which the model cannot run."""
    report = verify(candidate.path, candidate.baseline.path, progress=progress)
    fatal = [f for f in report.errors if not f.code.startswith(_STILL_LOADS)]
    if fatal:
        more = f" (and {len(fatal) - 1} more errors)" if len(fatal) > 1 else ""
        raise InputError(
            f"{candidate.path} is not a consistent checkpoint: "
            f"{fatal[0].message.removesuffix('.')}{more}.",
            hint=command("verify", candidate.path, "--source", candidate.baseline.path),
            code=fatal[0].code,
        )
    return report


def staged(ui: Reporter, name: str) -> Progress:
    """A progress callback that begins its stage when it first hears of the total."""
    begun = False

    def advance(done: int, total: int) -> None:
        nonlocal begun
        if not begun:
            ui.stage(name, total)
            begun = True
        ui.advance(done)

    return advance


def scan_baseline(base: Checkpoint, ui: Reporter) -> Scan:
    """The scan of the baseline, whose progress is told."""
    ui.stage("scan baseline", base.weight_bytes, "bytes")
    return scan(base, ui.advance)


def longest_of(candidate: Candidate) -> int | None:
    """The positions that both networks have; None where neither config states them."""
    held = candidate.held.config if isinstance(candidate.held, Checkpoint) else {}
    found = [most for config in (held, candidate.baseline.config) if (most := positions(config))]
    return min(found, default=None)


def tokenizer_of(model: Path) -> Tokenizer:
    """The model's own tokenizer; InputError when it has none that can be read."""
    return load_tokenizer(read_tokenizer_info(model))


def chat_of(info: TokenizerInfo, thinking: bool | None = None) -> Render | None:
    """The model's chat template, up to where its answer begins; None where it has none."""
    if info.chat_template is None:
        return None
    told = {} if thinking is None else {THINKING: thinking}
    return compile_template(
        info.chat_template, info.special_tokens, generation_prompt=True, told=told
    )


def refuse_missing_rows(base: Checkpoint, ids: Iterable[Sequence[int]]) -> None:
    """InputError where the tokenizer gives an id that the network's embedding has no row for."""
    tables = [m.shape[0] for m in base.modules if m.name.endswith(_EMBEDDINGS)]
    rows = max(tables, default=0) or text_size(base.config, "vocab_size")
    highest = max((max(one) for one in ids if len(one)), default=0)
    if rows and highest >= rows:
        raise InputError(
            f"The tokenizer of {base.path} gives the id {highest}, but the embedding has "
            f"{rows} rows.",
            hint="put the tokenizer files beside the weights that belong to them",
            code="validate.small_vocabulary",
        )


def remembered(path: Path, provenance: Provenance | None) -> str:
    """The Hub name of the model that a checkpoint was made from."""
    name = provenance.source.name if provenance and provenance.source else ""
    if "/" not in name:
        raise InputError(
            f"{path} does not say which model on the hub it was made from.",
            hint=command("validate", path, "--baseline", "MODEL"),
            code="validate.no_baseline",
        )
    return name


def _refuse_other_architecture(held: Checkpoint, base: Checkpoint) -> None:
    ours, theirs = _shape(held), _shape(base)
    if None in (ours["head_dim"], theirs["head_dim"]):  # each family has its own default
        ours["head_dim"] = theirs["head_dim"] = None  # `verify` compares the shapes themselves
    differ = [key for key in SHAPE_KEYS if ours[key] != theirs[key]]
    if differ:
        key = differ[0]
        raise InputError(
            f"The baseline {base.path} is another architecture than {held.path}: {key} is "
            f"{theirs[key]!r}, not {ours[key]!r}.",
            hint="--baseline with the model that this checkpoint was made from",
            code="validate.other_architecture",
        )


def _shape(checkpoint: Checkpoint) -> dict[str, Any]:
    """`SHAPE_KEYS` of a config; as many key-value heads as heads where it does not state them."""
    config = text_config(checkpoint.config)
    stated = {key: config.get(key) for key in SHAPE_KEYS}
    if stated["num_key_value_heads"] is None:
        stated["num_key_value_heads"] = stated["num_attention_heads"]
    return stated


def _refuse_other_tokenizer(held: Checkpoint, base: Checkpoint) -> None:
    ids = [tokenizer_of(path).encode(PROBE, True) for path in (held.path, base.path)]
    if ids[0] != ids[1]:
        at = _first_difference(ids[0], ids[1])
        raise InputError(
            f"{held.path} and the baseline {base.path} have different tokenizers: token {at} of "
            f"a probe text is {_at(ids[0], at)} in one and {_at(ids[1], at)} in the other.",
            hint=f"copy the tokenizer files of {base.path} into {held.path}, or name its own "
            "baseline",
            code="validate.other_tokenizer",
        )


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _at(ids: Sequence[int], index: int) -> str:
    return str(ids[index]) if index < len(ids) else "missing"
