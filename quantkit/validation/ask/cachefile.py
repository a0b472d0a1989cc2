"""What a baseline said, kept on disk, so that the next validation does not run it again.

A folder per baseline (its fingerprint) and way of computing (engine, the environment that holds it,
device, versions); in it a file per measurement, named by what was asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.checkpoint.paths import cache_dir, write_whole

ALGORITHM = 4
"""Raised whenever the same question would be measured in another way."""

Arrays = Mapping[str, NDArray[Any]]


class BaselineCache:
    """The measurements of one baseline; `hits` counts those that were not made again."""

    def __init__(self, *key: str) -> None:
        digest = hashlib.sha256(json.dumps([ALGORITHM, *key]).encode()).hexdigest()
        self.folder = cache_dir() / "validate" / digest[:32]
        self.hits = 0

    def holds(self, name: str, question: str) -> bool:
        return any(self._file(name, question, end).is_file() for end in ("json", "safetensors"))

    def arrays(self, name: str, question: str, make: Callable[[], Arrays]) -> dict[str, Any]:
        """The arrays of a measurement, read or made; `question` is a digest of what it reads."""
        from safetensors import SafetensorError
        from safetensors.numpy import load, save

        file = self._file(name, question, "safetensors")
        if file.is_file():
            try:
                found = load(file.read_bytes())
            except SafetensorError:
                file.unlink()
            else:
                self.hits += 1
                return found
        made = {key: np.ascontiguousarray(value) for key, value in make().items()}
        write_whole(file, save(made))
        return made

    def value(self, name: str, question: str, make: Callable[[], Any]) -> Any:
        """The same for a JSON value."""
        file = self._file(name, question, "json")
        if file.is_file():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                file.unlink()
            else:
                self.hits += 1
                return found
        made = make()
        write_whole(file, json.dumps(made).encode())
        return made

    def _file(self, name: str, question: str, end: str) -> Path:
        return self.folder / f"{name}-{question[:32]}.{end}"
