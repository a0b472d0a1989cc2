"""What a model is, by the content of its files: the same wherever and whenever it was fetched."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.paths import cache_dir, write_whole
from quantkit.checkpoint.whole_files import read_record, sha256_of

_SHA256 = re.compile(r"[0-9a-f]{64}")


def identity_of(checkpoint: Checkpoint) -> dict[str, str]:
    """File → SHA-256, of the weights, the config and what is copied beside them."""
    files = {*checkpoint.files, *checkpoint.sidecars(), checkpoint.path / "config.json"}
    return {file.name: _digest(file) for file in sorted(files) if file.is_file()}


def _digest(file: Path) -> str:
    """The Hub's cache names large files by their digest; others are read once, until changed."""
    blob = file.resolve()
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    stat = blob.stat()
    now = {"size": stat.st_size, "changed": stat.st_mtime_ns}
    name = hashlib.sha256(str(blob).encode()).hexdigest()[:32]
    kept = cache_dir() / "sweep" / f"{name}.json"
    known = read_record(kept) or {}
    if {key: known.get(key) for key in now} == now and isinstance(known.get("sha256"), str):
        return str(known["sha256"])
    digest = sha256_of(blob)
    write_whole(kept, json.dumps({**now, "sha256": digest}).encode())
    return digest
