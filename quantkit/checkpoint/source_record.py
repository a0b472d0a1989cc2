"""Which directory of this machine a checkpoint was made from: a note in the cache, never published.

A file a model, named by the model's fingerprint.
"""

from __future__ import annotations

import json
from pathlib import Path

from quantkit.checkpoint.paths import cache_dir, write_whole


def remember_source(directory: Path, fingerprint: str) -> None:
    """Note that the model of this fingerprint lies in `directory`."""
    content = json.dumps({"directory": str(directory.resolve())})
    write_whole(_note(fingerprint), content.encode())


def source_of(fingerprint: str) -> Path | None:
    """The directory that held the model of this fingerprint; whether it still does, its bytes
    tell."""
    try:
        noted = json.loads(_note(fingerprint).read_text(encoding="utf-8"))["directory"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return Path(noted) if isinstance(noted, str) and Path(noted).is_dir() else None


def _note(fingerprint: str) -> Path:
    return cache_dir() / "sources" / f"{fingerprint[:32]}.json"
