"""The job description: the only thing that a backend knows of quantkit (standard library only).

The pipeline writes a `Job` as `job.json`, starts `worker.py job.json result.json` with the
backend's interpreter, and reads a `Result` back. Both are plain JSON, so that the worker also
runs where neither pydantic nor quantkit is installed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from quantkit.checkpoint.schemes import Placement, Scheme

JOB_VERSION = 1

Unit = Literal["steps", "bytes"]

NO_DATA = {"passes": 0}
"""`Result.calibration` of a backend that found that the job's options need no calibration data."""

STATE_NOTE = "quantkit.json"
"""Record of a saved `.pth` (a zip archive) that holds what quantkit remembers of it."""


@dataclass(frozen=True)
class Job:
    """What to do, with every choice already made; paths are absolute.

    `scheme` is the recipe's (None to export a state of unknown origin); `layers` maps each module
    that must be quantized to its own; `keep` lists every linear module that must stay in 16 bit,
    both by their names in the source checkpoint.
    `tokens` is a safetensors file with `input_ids` [samples, length] int64 and
    `attention_mask` of the same shape, or None for a method that needs no calibration.
    `devices` are those that `spread` fills, in order; `device` is the first of them. `ranks` says
    that each is worked on by a process of its own with its share of the samples (`ranks.py`): it
    has its number as `rank`, and meets the others at the file `meeting`.
    `resume_folder` is where a library that has checkpoints of finished layers keeps them: empty,
    or as a run of the same job left it that was stopped.
    """

    task: Literal["quantize", "export"]
    backend: str
    adapter: str
    method: str
    model: str
    out: str
    scheme: Scheme | None
    kv_cache: str = "none"
    layers: dict[str, Scheme] = field(default_factory=dict)
    keep: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    tokens: str | None = None
    batch_size: int = 4
    experts: Literal["all", "routed"] = "all"
    expert_floor: int = 1
    on_unseen: Literal["error", "keep16", "rtn"] = "error"
    device: str = "cpu"
    devices: list[str] = field(default_factory=list)
    placement: Placement = "resident"
    ranks: bool = False
    rank: int | None = None
    meeting: str = ""
    seed: int = 0
    shard_size: int = 5_000_000_000
    checkpoint_save: str | None = None
    checkpoint_note: dict[str, Any] = field(default_factory=dict)
    restore: str | None = None
    resume_folder: str | None = None
    trust_remote_code: bool = False
    version: int = JOB_VERSION

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Job:
        return cls.from_json(json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Job:
        """The job whose fields (`asdict`) went through JSON."""
        scheme, layers = values["scheme"], values.get("layers", {})
        rebuilt = {
            "scheme": Scheme.from_json(scheme) if scheme else None,
            "layers": {name: Scheme.from_json(own) for name, own in layers.items()},
        }
        return cls(**{**values, **rebuilt})


@dataclass
class Result:
    """What a backend did.

    `stages` are `{name, seconds, cpu_seconds, peak_rss_bytes}` in order, `cpu_seconds` summed over
    the worker's threads; `notes` are the library's own
    fall-backs and skipped layers, in words for the user; `calibration` holds
    `{samples, tokens, digest, passes, modules}` as they really reached the model (`digest` by
    `token_digest`, `passes` runs over all samples, `modules` that were calibrated with them);
    `experts` holds `{calibrated, floor, min, median, under_floor, decided, routed, seen}`, the last
    two as tokens of each expert by the name of its block (`experts_seen.settled`);
    `kept` names layers of the plan that stay in 16 bit after all (`on_unseen: keep16`);
    `folds` names the modules of the source that the method rewrites (`{"norm": [module, …]}`).
    `compute` says how bfloat16 products were computed where the CPU has none ("float32 on avx2").
    `error` holds `{kind, code, type, message, hint, stage, traceback}`, with `kind` "input" when
    the job itself is wrong and "backend" otherwise.
    """

    ok: bool = False
    error: dict[str, str] | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)
    experts: dict[str, Any] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    folds: dict[str, list[str]] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    compute: str = ""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Result:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


class Reporter(Protocol):
    """How an adapter talks to the user while it works."""

    def stage(self, name: str, total: int = 0, unit: Unit = "steps") -> None:
        """Begin a stage of `total` steps or bytes (0: unknown); ends the one before."""

    def advance(self, done: int) -> None:
        """`done` steps of the current stage are finished."""

    def note(self, text: str) -> None:
        """Tell the user, and keep in quantkit.json, a fall-back or a skipped layer."""


Adapter = Callable[[Job, Reporter, Result], None]
"""`run(job, report, result)`: write a Hugging Face checkpoint into `job.out`, fill `result`.

Raises any exception on failure; a `JobError` when the sentence is meant for the user.
"""


def token_digest(samples: Iterable[Iterable[int]]) -> str:
    """SHA-256 over the ids of all samples in order, masked positions left out, as int64 LE.

    The calibration file and the adapter, which watches what reaches the model, use the same rule.
    """
    total = hashlib.sha256()
    for ids in samples:
        values = array("q", ids)
        if sys.byteorder == "big":
            values.byteswap()
        total.update(values.tobytes())
    return total.hexdigest()


class JobError(Exception):
    """A failure in a worker with a sentence and a hint that are meant for the user."""

    def __init__(self, message: str, *, hint: str, code: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code


class JobInputError(JobError):
    """A `JobError` whose cause is the user's input, not the backend."""
