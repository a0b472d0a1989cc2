"""The checkpoint against its own quantkit.json: has anything changed since it was sealed?

The file is untrusted input: whatever is malformed in it is a finding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from quantkit.checkpoint.directory import read_json
from quantkit.checkpoint.schemes import SCHEMES
from quantkit.errors import InputError
from quantkit.verification.findings import Finding, PlannedLayers, error, warning

FILE = "quantkit.json"
SUPPORTED = 1
_UNSEALED = frozenset({FILE, "README.md"})
_WEIGHTS = (".safetensors", ".gguf")
_RESTORE = "restore it from where the checkpoint was made, or quantize again"


class Sealed(Protocol):
    """What carries a quantkit.json: a checkpoint, or a GGUF file in its directory."""

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, Any]: ...

    def digest(self, name: str) -> str: ...


@dataclass(frozen=True)
class Seal:
    """What a well-formed quantkit.json says that can be checked; digests are SHA-256."""

    tensors: Mapping[str, str]
    files: Mapping[str, str]
    plan: PlannedLayers | None
    calibration: Mapping[str, Any] | None
    needs_calibration: bool
    source_faults: frozenset[tuple[str, str | None]] = frozenset()
    """Code and place of what the source lacked already."""


def read_seal(checkpoint: Sealed) -> tuple[Seal | None, list[Finding]]:
    """quantkit.json, None when there is none or it cannot be understood."""
    path = checkpoint.path / FILE
    if not path.exists():
        return None, []
    try:
        return _parse(read_json(path)), []
    except (InputError, KeyError, TypeError, ValueError) as problem:
        said = problem.message if isinstance(problem, InputError) else f"{FILE} {problem}"
        return None, [
            error(
                "provenance.malformed",
                said,
                f"restore {FILE}, or delete it and verify with --source MODEL",
                FILE,
            )
        ]


def check_seal(checkpoint: Sealed, seal: Seal) -> list[Finding]:
    """Tensors and files that changed, are gone or are new since sealing; calibration that ran."""
    return [
        *_check_tensors(checkpoint, seal.tensors),
        *_check_files(checkpoint.path, seal.files),
        *_check_calibration(seal),
    ]


def _parse(document: dict[str, Any]) -> Seal:
    version = document.get("schema_version")
    if version != SUPPORTED:
        raise ValueError(f"has schema_version {version!r}; this version reads {SUPPORTED}")
    calibration = document.get("calibration")
    if calibration is not None and not isinstance(calibration, dict):
        raise ValueError("calibration is no object")
    tensors, files = _digests(document, "tensors"), _digests(document, "files")
    if not tensors:
        raise ValueError("holds no tensor digests")
    plan = _plan(document)
    names = set(plan.quantized.values()) if plan else set()
    static = {
        name for name, scheme in SCHEMES.items()
        if scheme.input and scheme.input.granularity == "tensor" and not scheme.input.dynamic
    }  # fmt: skip
    needs = not names.isdisjoint(static)
    return Seal(tensors, files, plan, calibration, needs, _source_faults(document))


def _source_faults(document: Mapping[str, Any]) -> frozenset[tuple[str, str | None]]:
    source = document.get("source")
    listed = source.get("faults") or [] if isinstance(source, dict) else []
    if not isinstance(listed, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("code"), str) for entry in listed
    ):
        raise ValueError("source.faults is no list of findings")
    return frozenset((entry["code"], _text(entry.get("where"))) for entry in listed)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _digests(document: Mapping[str, Any], key: str) -> dict[str, str]:
    found = document.get(key)
    if not isinstance(found, dict):
        raise ValueError(f"{key} is no object")
    for name, digest in found.items():
        if not isinstance(digest, str) or len(digest) != 64:
            raise ValueError(f"{key}[{name!r}] is no SHA-256 digest")
        if key == "files" and Path(name).name != name:
            raise ValueError(f"files names {name!r}, outside of the directory")
    return found


def _plan(document: Mapping[str, Any]) -> PlannedLayers | None:
    plan = document.get("plan")
    if plan is None:
        return None
    if not isinstance(plan, dict):
        raise ValueError("plan is no object")
    quantized, kept = plan.get("quantized"), plan.get("kept")
    if not isinstance(quantized, dict) or not isinstance(kept, dict | list):
        raise ValueError("plan is malformed")
    if not all(isinstance(scheme, str) for scheme in quantized.values()):
        raise ValueError("plan.quantized holds something else than scheme names")
    folds = document.get("folds")
    if folds is not None and not isinstance(folds, dict):
        raise ValueError("folds is no object")
    return PlannedLayers(quantized, frozenset(map(str, kept)), folds=bool(folds))


def _check_tensors(checkpoint: Sealed, sealed: Mapping[str, str]) -> Iterator[Finding]:
    present = sorted(checkpoint.tensors.keys() & sealed.keys())
    with ThreadPoolExecutor(2) as pool:
        digests = dict(zip(present, pool.map(checkpoint.digest, present), strict=True))
    for name in present:
        if digests[name] != sealed[name]:
            yield error(
                "digest.mismatch",
                f"{name} has changed since {FILE} was written",
                _RESTORE,
                name,
            )
    for name in sorted(sealed.keys() - checkpoint.tensors.keys()):
        yield error("digest.missing", f"{name} is gone since sealing", _RESTORE, name)
    for name in sorted(checkpoint.tensors.keys() - sealed.keys()):
        yield error("digest.extra", f"{name} was added after sealing", _RESTORE, name)


def _check_files(directory: Path, sealed: Mapping[str, str]) -> Iterator[Finding]:
    for name, digest in sorted(sealed.items()):
        path = directory / name
        if not path.is_file():
            yield error("digest.file_missing", f"{name} is gone since sealing", _RESTORE, name)
        elif _sha256(path) != digest:
            yield error(
                "digest.file_mismatch",
                f"{name} has changed since {FILE} was written",
                _RESTORE,
                name,
            )
    for path in sorted(directory.iterdir()):
        known = path.name in sealed or path.name in _UNSEALED or path.suffix in _WEIGHTS
        if not known and path.is_file() and not path.name.startswith("."):
            yield warning(
                "digest.file_extra",
                f"{path.name} was added after sealing",
                "remove it if nobody knows what it is for",
                path.name,
            )


def _check_calibration(seal: Seal) -> Iterator[Finding]:
    calibration = seal.calibration
    if calibration is None:
        return
    tokens, modules = calibration.get("tokens"), calibration.get("modules")
    empty = [what for what, n in (("tokens", tokens), ("modules", modules)) if n == 0]
    if empty and (seal.needs_calibration or tokens == 0):
        yield error(
            "calibration.never_ran",
            f"{FILE} says that calibration saw 0 {' and 0 '.join(empty)}",
            "calibrate again; scales without data are noise",
            FILE,
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
