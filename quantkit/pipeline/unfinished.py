"""What a library's run leaves for `--resume`: its finished output, and its own layer checkpoints.

Kept in `DIR.partial/.stream/`: `job.json` (what decides the output), `placement.json` (where the
weights lay, which does not), `library/` (what the worker wrote), `layers/` (a library's own
checkpoints, where it has some) and `done.json` (the worker's `Result`, and size and time of each
file), written last. A kill at any moment leaves either a finished library stage or one that the
library itself goes on with, or that is done again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantkit.backends.process.job import Result
from quantkit.checkpoint.provenance import RESUME_FOLDER
from quantkit.checkpoint.whole_files import read_record, remove, write_record
from quantkit.errors import InputError

STATE_VERSION = 1
_SHARED = (".safetensors", ".gguf")
"""Files that are linked into the output, not copied: no later step changes their bytes."""


class Unfinished:
    """The state folder of one `DIR.partial`."""

    def __init__(self, partial: Path) -> None:
        self.partial = partial
        self.folder = partial / RESUME_FOLDER
        self.library = self.folder / "library"
        self.layers = self.folder / "layers"

    def open(self, key: Mapping[str, Any], *, resume: bool) -> bool:
        """Make the folder ready for the run that `key` describes; whether it goes on with one.

        Raises InputError when the run before was another one; it is then left as it is.
        """
        before = read_record(self.folder / "job.json") if resume else None
        key = {"version": STATE_VERSION, **key}
        if before is not None:
            self._same(before, key)
        self.leave(keep=before is not None)
        if before is not None:
            return True
        self.folder.mkdir()
        write_record(self.folder / "job.json", key)
        return False

    def move(self, placement: str) -> bool:
        """Remember where the weights lie from now on; whether checkpoints of finished layers had to
        go because they lay elsewhere: the libraries go on from their own placement alone."""
        file, stated = self.folder / "placement.json", {"placement": placement}
        if read_record(file) == stated:
            return False
        left = self.has_layers()
        shutil.rmtree(self.layers, ignore_errors=True)
        write_record(file, stated)
        return left

    def begin(self) -> None:
        """Empty the library's place, unless checkpoints of its own go on from what lies there."""
        (self.folder / "done.json").unlink(missing_ok=True)
        for left in self.folder.glob("quantkit-*"):  # temporary files of a run that was killed
            shutil.rmtree(left)
        if not self.has_layers():
            for folder in (self.library, self.layers):
                shutil.rmtree(folder, ignore_errors=True)
        for folder in (self.library, self.layers):
            folder.mkdir(parents=True, exist_ok=True)

    def has_layers(self) -> bool:
        """Whether the library left checkpoints of finished layers."""
        return any(path.is_file() and path.stat().st_size for path in self.layers.rglob("*"))

    def finished(self) -> Result | None:
        """What the worker of the run before did, if every file it left is as it was.

        Their bytes are not read here: verification reads them all.
        """
        done = read_record(self.folder / "done.json")
        if done is None or done.get("files") != self._files():
            return None
        return Result(**done["result"])

    def finish(self, result: Result) -> None:
        """Remember that the library's stage ended well."""
        record = {"result": asdict(result), "files": self._files()}
        write_record(self.folder / "done.json", record)
        shutil.rmtree(self.layers, ignore_errors=True)

    def place(self) -> None:
        """Put the library's output into `DIR.partial`: weights as links, the rest as copies."""
        for path in sorted(self.library.iterdir()):
            target = self.partial / path.name
            if path.is_dir():
                shutil.copytree(path, target)
            elif path.suffix in _SHARED:
                _link(path, target)
            else:
                shutil.copyfile(path, target)

    def worth_keeping(self) -> bool:
        """Whether a later run would save work by it."""
        return (self.folder / "done.json").is_file() or self.has_layers()

    def clear(self) -> None:
        """Remove the folder: the output is complete."""
        shutil.rmtree(self.folder)

    def leave(self, *, keep: bool) -> None:
        """Remove what is half-made from `DIR.partial`, and the state too unless it is kept."""
        for entry in self.partial.iterdir():
            if not keep or entry != self.folder:
                remove(entry)

    def _same(self, before: Mapping[str, Any], key: Mapping[str, Any]) -> None:
        differs = [_difference(name, before.get(name), key[name])
                   for name in key if before.get(name) != key[name]]  # fmt: skip
        if differs:
            raise InputError(
                f"{self.partial} was begun by another run: {'; '.join(differs)}.",
                hint="give the same command as before, or start anew without --resume",
                code="resume.other_settings",
            )

    def _files(self) -> dict[str, list[int]]:
        """Size and time of the last change (ns) of every file of the library."""
        if not self.library.is_dir():
            return {}
        files = sorted(path for path in self.library.rglob("*") if path.is_file())
        stats = ((str(path.relative_to(self.library)), path.stat()) for path in files)
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats}


def _difference(name: str, before: Any, now: Any) -> str:
    """What differs, down to the entries of a mapping, with short values."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        return ", ".join(_difference(f"{name} {key}", before.get(key), now.get(key))
                         for key in keys[:3])  # fmt: skip
    was, becomes = (json.dumps(value)[:40] for value in (before, now))
    return f"{name} was {was}, is {becomes}"


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # a file system without links
        shutil.copyfile(path, target)
