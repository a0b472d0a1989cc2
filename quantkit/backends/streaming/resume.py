"""What an interrupted run left: which shards are finished, from which source, with which settings.

Kept in `DIR.partial/.stream/`: `job.json` (settings and the source files' identity) and one record
a finished shard, written after the shard has its final name. A kill at any moment leaves either a
finished shard with its record or something that is written again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantkit import __version__
from quantkit.backends.streaming.job import (
    LayerError,
    ShardRecord,
    ShardTask,
    StreamOptions,
    WorkRecord,
)
from quantkit.checkpoint.directory import Checkpoint, read_header
from quantkit.checkpoint.provenance import RESUME_FOLDER
from quantkit.checkpoint.schemes import Scheme
from quantkit.checkpoint.whole_files import read_record, write_record
from quantkit.errors import InputError, QuantkitError

STATE_VERSION = 1


def settings(
    layers: Mapping[str, Scheme], options: StreamOptions, tasks: Sequence[ShardTask]
) -> dict[str, Any]:
    """Everything but the source that decides the output's bytes, by the user's words for it."""
    schemes = json.dumps({name: asdict(scheme) for name, scheme in sorted(layers.items())})
    shards = json.dumps([[task.file, sorted(task.outputs.items())] for task in tasks])
    return {
        "version": STATE_VERSION,
        "quantkit": __version__,
        "schemes": hashlib.sha256(schemes.encode()).hexdigest(),
        "shards": hashlib.sha256(shards.encode()).hexdigest(),
        **asdict(options),
    }


def source_identity(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Source file → size and time of change (ns): the shards, and the config that says what their
    tensors are."""
    files = [*checkpoint.files, checkpoint.path / "config.json"]
    stats = {file.name: file.stat() for file in files if file.exists()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


class State:
    """The folder of one output directory."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._folder = out / RESUME_FOLDER

    def begin(self, job: Mapping[str, Any]) -> None:
        """Forget what is there and start anew."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        write_record(self._folder / "job.json", job)

    def found(self) -> dict[str, Any] | None:
        """The job of the run before, or None."""
        return read_record(self._folder / "job.json")

    def record(self, shard: ShardRecord) -> None:
        """Remember a finished shard."""
        write_record(self._folder / f"{shard.file}.json", asdict(shard))

    def records(self) -> dict[str, ShardRecord]:
        """Every finished shard by its file's name."""
        found = {}
        for file in sorted(self._folder.glob("*.safetensors.json")):
            data = read_record(file)
            if data is not None:
                done = data["done"]
                done["layers"] = {name: LayerError(**e) for name, e in done["layers"].items()}
                found[data["file"]] = ShardRecord(data["file"], data["size"], WorkRecord(**done))
        return found

    def intact(self, shard: ShardRecord) -> bool:
        """Whether the shard's file holds what its record says, byte for byte."""
        try:
            found = Checkpoint(self.out, {}, read_header(self.out / shard.file)).digests()
        except (OSError, QuantkitError):
            return False
        return found == shard.done.digests

    def clear(self) -> None:
        """Remove the folder: the output is complete."""
        shutil.rmtree(self._folder, ignore_errors=True)


def finished_shards(
    state: State, job: Mapping[str, Any], checkpoint: Checkpoint, tasks: Sequence[ShardTask]
) -> dict[str, ShardRecord]:
    """The shards of an earlier run that need not be done again, every digest checked.

    A file that does not hold what its record says is done again. Raises InputError when the
    earlier run had other settings or another source.
    """
    before = state.found()
    if before is None:
        return {}
    if "settings" not in before:
        raise InputError(
            f"{state.out} was begun by a method of another backend.",
            hint="give the same method as before, or start anew without --resume",
            code="resume.other_settings",
        )
    changed = [name for name, old in before["source"].items() if job["source"].get(name) != old]
    if changed or len(before["source"]) != len(job["source"]):
        raise _source_changed(checkpoint, changed[0] if changed else "the list of shards")
    _same_settings(before["settings"], job["settings"], state.out)
    wanted = {task.file for task in tasks}
    records = {file: record for file, record in state.records().items() if file in wanted}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        intact = dict(zip(records, pool.map(state.intact, records.values()), strict=True))
        sound = [record for file, record in records.items() if intact[file]]
        names = [name for record in sound for name in record.done.source]
        source = dict(zip(names, pool.map(checkpoint.digest, names), strict=True))
    for record in sound:
        for name, digest in record.done.source.items():
            if source[name] != digest:
                raise _source_changed(checkpoint, checkpoint.tensors[name].file.name)
    return {record.file: record for record in sound}


def _same_settings(before: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    other = [key for key in now if before.get(key) != now[key]]
    if other:
        raise InputError(
            f"{out} was begun with other settings: {', '.join(other)}.",
            hint="give the same method and --set as before, or start anew without --resume",
            code="resume.other_settings",
        )


def _source_changed(checkpoint: Checkpoint, what: str) -> InputError:
    return InputError(
        f"{checkpoint.path} changed since the run that --resume would go on with: {what} differs.",
        hint="start anew without --resume",
        code="resume.source_changed",
    )
