"""The token file: safetensors with `input_ids` and `attention_mask`, and JSON beside it.

Both tensors are int64 [samples, length]. What the pictures of row N became are tensors
`picture.N.NAME`, NAME being an argument of the model's forward pass. The JSON says how the tokens
came about; it is written last, so that a token file with its JSON is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.backends.process.job import token_digest
from quantkit.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]

SUMMARY_VERSION = 1
PICTURE = "picture."
"""How the names of tensors begin that a picture became."""


@dataclass(frozen=True)
class TokenFile:
    """A finished token file; `tokens` counts those that are not padding, `digest` is
    `quantkit.backends.process.job.token_digest` over them."""

    path: Path
    digest: str
    samples: int
    length: int
    tokens: int
    summary: dict[str, Any]

    def arrays(self) -> tuple[Ids, Ids]:
        """`input_ids` and `attention_mask`, int64 [samples, length]."""
        from safetensors.numpy import load_file

        tensors = load_file(self.path)
        return tensors["input_ids"], tensors["attention_mask"]


def write_token_file(
    path: Path,
    ids: Ids,
    mask: Ids,
    summary: dict[str, Any],
    pictures: Mapping[int, Mapping[str, NDArray[np.generic]]] | None = None,
) -> TokenFile:
    """Write tokens and summary; readers, and other writers of the same tokens, see whole files.

    Raises InputError when the directory cannot be written.
    """
    from safetensors.numpy import save

    digest = _digest(ids, mask)
    samples, length = ids.shape
    summary = {
        "schema_version": SUMMARY_VERSION,
        "digest": digest,
        "samples": samples,
        "length": length,
        "tokens": int(mask.sum()),
        **summary,
    }
    tensors: dict[str, NDArray[np.generic]] = {"input_ids": ids, "attention_mask": mask}
    for row, inputs in sorted((pictures or {}).items()):
        tensors |= {f"{PICTURE}{row}.{name}": value.copy() for name, value in inputs.items()}
    if pictures:
        summary["pictures"] = {
            name: hashlib.sha256(value.tobytes()).hexdigest()
            for name, value in tensors.items()
            if name.startswith(PICTURE)
        }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, save(tensors, {"digest": digest}))
        text = json.dumps(summary, indent=2, ensure_ascii=False)
        _replace(path.with_suffix(".json"), text.encode())
    except OSError as error:
        raise InputError(
            f"The token file {path} cannot be written: {error.strerror or error}.",
            hint="free space there, or set QUANTKIT_CACHE to a directory that can be written",
            code="calibration.cache_unwritable",
        ) from error
    return _token_file(path, summary)


def read_token_file(path: Path) -> TokenFile | None:
    """A token file that is complete and whose tokens have the digest that its JSON states."""
    from safetensors import SafetensorError

    try:
        summary = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        found = _token_file(path, summary)
        ids, mask = found.arrays()
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
    whole = (found.samples, found.length) == ids.shape == mask.shape
    return found if whole and _digest(ids, mask) == found.digest else None


def _digest(ids: Ids, mask: Ids) -> str:
    return token_digest(row[seen == 1].tolist() for row, seen in zip(ids, mask, strict=True))


def _token_file(path: Path, summary: dict[str, Any]) -> TokenFile:
    return TokenFile(
        path=path,
        digest=summary["digest"],
        samples=summary["samples"],
        length=summary["length"],
        tokens=summary["tokens"],
        summary=summary,
    )


def _replace(path: Path, content: bytes) -> None:
    staged = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        staged.write_bytes(content)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
