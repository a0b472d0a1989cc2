"""A saved quantized state (`mto.save`, a `.pth`), looked at without running code from it.

The file is a zip archive of one folder: `data.pkl`, a pickle of the structure, and one record a
tensor. A pickle runs whatever callables it names, so the names are read here, with pickletools
(which executes nothing), and held against the few that a ModelOpt state needs. The worker then
loads the file with `weights_only=True`, torch's own second barrier.
"""

from __future__ import annotations

import json
import pickletools
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantkit.backends.process.job import STATE_NOTE
from quantkit.errors import InputError

MAX_PICKLE_BYTES = 1 << 28
CHUNK = 1 << 22

_DTYPES = (
    "bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16",
    "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu",
)  # fmt: skip
_STORAGES = (
    "Bool", "Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double",
    "Untyped",
)  # fmt: skip
ALLOWED_GLOBALS = frozenset(
    {
        "collections.OrderedDict",
        "torch.Size",
        "torch.device",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch.storage.UntypedStorage",
        "__builtin__.slice",
        "__builtin__.set",
        "builtins.slice",
        "builtins.set",
    }
    | {f"torch.{name}" for name in _DTYPES}
    | {f"torch.{name}Storage" for name in _STORAGES}
)
"""What states of every ModelOpt method hold, `slice` in those whose blocks had to be padded."""

_INDIRECT = frozenset(
    {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"}
)
"""Opcodes that name callables in ways torch.save (protocol 2) never writes."""

_NOTE_TYPES = {
    "schema_version": int, "model": str, "fingerprint": str, "versions": dict, "layers": dict,
}  # fmt: skip


def read_state_note(path: Path) -> dict[str, Any] | None:
    """What quantkit wrote into the file when it saved it; None for a file made elsewhere.

    Keys: `schema_version`, `method`, `scheme`, `kv_cache`, `options`, `layers`, `keep`,
    `versions`, `calibration`, `notes`, and those of the job's `checkpoint_note`, of which `model`
    and `fingerprint` must be there. Raises InputError as `check_state` does.
    """
    with _open(path) as archive:
        name = f"{_folder(archive, path)}/{STATE_NOTE}"
        if name not in archive.namelist():
            return None
        _check_record(archive, archive.getinfo(name), path)
        text = archive.read(name)
    try:
        note = json.loads(text)
        wrong = next((k for k, t in _NOTE_TYPES.items() if not isinstance(note[k], t)), None)
    except (ValueError, TypeError, LookupError) as error:
        wrong = str(error)
    if wrong:
        raise _corrupt(path, f"in its {STATE_NOTE}: {wrong}")
    return dict(note)


def check_state(path: Path) -> None:
    """Refuse a file that is no archive, is cut short or altered, or names code to run.

    Every record's CRC-32 is checked (torch does not), so the whole file is read once. Raises
    InputError with the code `state.missing`, `.not_an_archive`, `.truncated`, `.corrupt` or
    `.unsafe_pickle`.
    """
    with _open(path) as archive:
        folder = _folder(archive, path)
        for record in archive.infolist():
            _check_record(archive, record, path)
        for record in archive.infolist():
            if record.filename.endswith(".pkl"):
                _check_pickle(archive, record, path)
        if f"{folder}/data.pkl" not in archive.namelist():
            raise _not_a_state(path, "has no data.pkl")


def refuse_mismatch(
    path: Path,
    note: Mapping[str, Any],
    *,
    model: Path,
    fingerprint: str,
    versions: Mapping[str, str],
    library: str,
) -> None:
    """Refuse to export a state with another base model or another release of its library.

    `fingerprint` is that of `model`; `versions` are those of the interpreter that would export.
    Raises InputError with the code `state.other_model` or `state.other_library`.
    """
    if note["fingerprint"] != fingerprint:
        raise InputError(
            f"{path} was made from {note['model']} with the fingerprint "
            f"{note['fingerprint'][:12]}, but {model} has {fingerprint[:12]}.",
            hint=f"name the model that it was made from: --model {note['model']}",
            code="state.other_model",
        )
    saved, present = note["versions"].get(library), versions.get(library)
    if saved != present:
        raise InputError(
            f"{path} was saved by {library} {saved}, but this environment has {present or 'none'}.",
            hint=f"use an interpreter with {library}=={saved}: --python ENV/bin/python",
            code="state.other_library",
        )


def _open(path: Path) -> zipfile.ZipFile:
    if not path.is_file():
        raise InputError(
            f"{path} does not exist.",
            hint="name a file that quantkit quantize --checkpoint-save or mto.save wrote",
            code="state.missing",
        )
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        with path.open("rb") as handle:
            begins_as_zip = handle.read(4) == b"PK\x03\x04"
        if begins_as_zip:
            raise InputError(
                f"{path} is cut short: it begins as a saved state, but its directory is missing "
                f"({path.stat().st_size} bytes).",
                hint="copy it again, or save it again",
                code="state.truncated",
            ) from error
        raise _not_a_state(path, "is no zip archive") from error


def _not_a_state(path: Path, what: str) -> InputError:
    return InputError(
        f"{path} {what}, so it is no state that mto.save wrote.",
        hint="name a file that quantkit quantize --checkpoint-save or mto.save wrote",
        code="state.not_an_archive",
    )


def _folder(archive: zipfile.ZipFile, path: Path) -> str:
    """The one folder all records lie in; duplicates could show one file to us, another to torch."""
    names = archive.namelist()
    folders = {name.partition("/")[0] for name in names}
    if len(folders) != 1:
        raise _not_a_state(path, f"holds {len(folders)} folders")
    if len(set(names)) != len(names):
        raise _corrupt(path, "by two records of one name")
    return folders.pop()


def _check_record(archive: zipfile.ZipFile, record: zipfile.ZipInfo, path: Path) -> None:
    try:
        with archive.open(record) as handle:
            while handle.read(CHUNK):
                pass
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        raise _corrupt(path, f"in {record.filename}: {error}") from error


def _corrupt(path: Path, what: str) -> InputError:
    return InputError(
        f"{path} is damaged {what}.", hint="copy it again, or save it again", code="state.corrupt"
    )


def _check_pickle(archive: zipfile.ZipFile, record: zipfile.ZipInfo, path: Path) -> None:
    with archive.open(record) as handle:
        pickle = handle.read(MAX_PICKLE_BYTES + 1)
    try:
        refused = next((n for n in _globals(pickle) if n not in ALLOWED_GLOBALS), None)
    except ValueError as error:
        refused = f"an opcode that cannot be read ({error})"
    if len(pickle) > MAX_PICKLE_BYTES:
        refused = f"more than {MAX_PICKLE_BYTES} bytes"
    if refused:
        raise InputError(
            f"{path} would run code when it is loaded: {record.filename} names {refused}, "
            "which a saved state has no use for.",
            hint="do not load it; ask for the file as mto.save wrote it",
            code="state.unsafe_pickle",
        )


def _globals(pickle: bytes) -> Iterator[str]:
    """Every callable that a pickle names, as "module.attribute", without unpickling."""
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name == "GLOBAL":
            yield str(argument).replace(" ", ".")
        elif opcode.name in _INDIRECT:
            named = ".".join(strings[-2:]) if opcode.name == "STACK_GLOBAL" else str(argument)
            yield f"{named} (by {opcode.name})"
        elif isinstance(argument, str):
            strings.append(argument)
