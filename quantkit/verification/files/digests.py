"""The checkpoint against its own quantkit.json: has anything changed since it was sealed?

The file is untrusted input: whatever is malformed in it is a finding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from quantkit.checkpoint.provenance import (
    NOT_SEALED,
    PROVENANCE,
    Calibration,
    Provenance,
    read,
)
from quantkit.checkpoint.schemes import SCHEMES
from quantkit.checkpoint.whole_files import sha256_of
from quantkit.errors import InputError
from quantkit.verification.findings import Finding, PlannedLayers, error, warning

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
    calibration: Calibration | None
    needs_calibration: bool
    source_faults: frozenset[tuple[str, str | None]] = frozenset()
    """Code and place of what the source lacked already."""


def read_seal(checkpoint: Sealed) -> tuple[Seal | None, list[Finding]]:
    """quantkit.json, None when there is none or it cannot be understood."""
    try:
        stated = read(checkpoint.path)
        return (None if stated is None else _seal(stated)), []
    except (InputError, ValueError) as problem:
        said = problem.message if isinstance(problem, InputError) else f"{PROVENANCE} {problem}"
        return None, [
            error(
                "provenance.malformed",
                said,
                f"restore {PROVENANCE}, or delete it and verify with --source MODEL",
                PROVENANCE,
            )
        ]


def check_seal(checkpoint: Sealed, seal: Seal) -> list[Finding]:
    """Tensors and files that changed, are gone or are new since sealing; calibration that ran."""
    return [
        *_check_tensors(checkpoint, seal.tensors),
        *_check_files(checkpoint.path, seal.files),
        *_check_calibration(seal),
    ]


def _seal(stated: Provenance) -> Seal:
    if stated.schema_version is None:
        raise ValueError("has no schema_version")
    if stated.files is None or not stated.tensors:
        raise ValueError("holds no digests of tensors and files")
    plan = None
    if stated.plan:
        kept = frozenset(stated.plan.kept)
        plan = PlannedLayers(stated.plan.quantized, kept, folds=bool(stated.folds))
    static = {
        name for name, scheme in SCHEMES.items()
        if scheme.input and scheme.input.granularity == "tensor" and not scheme.input.dynamic
    }  # fmt: skip
    names = set(stated.plan.quantized.values()) if stated.plan else set()
    return Seal(
        tensors=stated.tensors,
        files=stated.files,
        plan=plan,
        calibration=stated.calibration,
        needs_calibration=not names.isdisjoint(static),
        source_faults=frozenset(stated.source.faults if stated.source else ()),
    )


def _check_tensors(checkpoint: Sealed, sealed: Mapping[str, str]) -> Iterator[Finding]:
    present = sorted(checkpoint.tensors.keys() & sealed.keys())
    with ThreadPoolExecutor(2) as pool:
        digests = dict(zip(present, pool.map(checkpoint.digest, present), strict=True))
    for name in present:
        if digests[name] != sealed[name]:
            yield error(
                "digest.mismatch",
                f"{name} has changed since {PROVENANCE} was written",
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
        elif sha256_of(path) != digest:
            yield error(
                "digest.file_mismatch",
                f"{name} has changed since {PROVENANCE} was written",
                _RESTORE,
                name,
            )
    for path in sorted(directory.iterdir()):
        known = path.name in sealed or path.name in NOT_SEALED or path.suffix in _WEIGHTS
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
    tokens, modules = calibration.tokens, calibration.modules
    empty = [what for what, n in (("tokens", tokens), ("modules", modules)) if n == 0]
    if empty and (seal.needs_calibration or tokens == 0):
        yield error(
            "calibration.never_ran",
            f"{PROVENANCE} says that calibration saw 0 {' and 0 '.join(empty)}",
            "calibrate again; scales without data are noise",
            PROVENANCE,
        )
