"""The job description: the only thing that a backend knows of quantkit (standard library only).

The pipeline writes a `Job` as `job.json`, starts `worker.py job.json result.json` with the
backend's interpreter, and reads a `Result` back. Both are plain JSON, so that the worker also
runs where neither pydantic nor quantkit is installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

JOB_VERSION = 1


@dataclass(frozen=True)
class Job:
    """What to do, with every choice already made; paths are absolute.

    `layers` maps each module that must be quantized to its scheme's fields; `keep` lists every
    linear module that must stay in 16 bit, both by their names in the source checkpoint.
    `tokens` is a safetensors file with `input_ids` [samples, length] int64 and
    `attention_mask` of the same shape, or None for a method that needs no calibration.
    """

    task: Literal["quantize", "export"]
    backend: str
    adapter: str
    method: str
    model: str
    out: str
    scheme: dict[str, Any]
    kv_cache: str = "none"
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    keep: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    tokens: str | None = None
    batch_size: int = 4
    device: str = "cpu"
    seed: int = 0
    shard_size: int = 5_000_000_000
    checkpoint_save: str | None = None
    checkpoint_note: dict[str, Any] = field(default_factory=dict)
    restore: str | None = None
    trust_remote_code: bool = False
    version: int = JOB_VERSION

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Job:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass
class Result:
    """What a backend did.

    `stages` are `{name, seconds, peak_rss_bytes}` in order; `notes` are the library's own
    fall-backs and skipped layers, in words for the user; `calibration` holds
    `{samples, tokens, digest, modules}` as they really reached the model; `folds` names the
    tensors of the source that the method rewrites (`{kind: [module, …]}`).
    """

    ok: bool = False
    error: dict[str, str] | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)
    folds: dict[str, list[str]] = field(default_factory=dict)
    peak_rss_bytes: int = 0

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Result:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


class Reporter(Protocol):
    """How an adapter talks to the user while it works."""

    def stage(self, name: str, total: int = 0) -> None:
        """Begin a stage of `total` steps (0: unknown); ends the one before."""

    def advance(self, done: int) -> None:
        """`done` steps of the current stage are finished."""

    def note(self, text: str) -> None:
        """Tell the user, and keep in quantkit.json, a fall-back or a skipped layer."""


Adapter = Callable[[Job, Reporter, Result], None]
"""`run(job, report, result)`: write a Hugging Face checkpoint into `job.out`, fill `result`.

Raises any exception on failure; a `JobError` when the sentence is meant for the user.
"""


class JobError(Exception):
    """A failure in a worker with a sentence and a hint that are meant for the user."""

    def __init__(self, message: str, *, hint: str, code: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code
