"""The output directory: written as `DIR.partial` under a lock, renamed once, after it verified."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quantkit.checkpoint.provenance import PROVENANCE
from quantkit.checkpoint.whole_files import remove
from quantkit.errors import InputError


@contextmanager
def staged(
    target: Path, *, overwrite: bool, resumable: bool = False, resume: bool = False
) -> Iterator[Path]:
    """Yield `DIR.partial`, empty unless `resume`; publish it as `target` when the block ends well.

    When the block raises, `target` is as it was and `DIR.partial` is removed; when the work is
    `resumable` it is kept, so that a later run with `resume` picks it up. A run that was killed
    leaves a `DIR.partial` without a lock, which the next run takes over.

    Raises InputError when `target` exists and `overwrite` is not given, when the place is not
    writable or becomes full, or when another live run holds the same output.
    """
    check_target(target, overwrite=overwrite)
    partial = target.with_name(target.name + ".partial")
    lock = _lock(partial, target)
    try:
        if not resume:
            for entry in partial.iterdir():
                remove(entry)
        yield partial
        _publish(partial, target, overwrite=overwrite)
    except BaseException as error:
        if not resumable or not any(partial.iterdir()):
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(partial, resumable) from error
        raise
    finally:
        os.close(lock)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, or a parent that cannot be written.

    `overwrite` replaces what quantkit made, which has a quantkit.json, and nothing else.
    """
    if target.is_file() or target.is_symlink():
        raise InputError(
            f"The output {target} exists and is not a directory.",
            hint="choose another --out",
            code="output.exists",
        )
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise InputError(
            f"The output {target} exists and is not empty.",
            hint="choose another --out, or replace it with --overwrite once the new one verified",
            code="output.exists",
        )
    if target.is_dir() and any(target.iterdir()) and not (target / PROVENANCE).is_file():
        raise InputError(
            f"The output {target} exists and was not made by quantkit: it has no "
            f"{PROVENANCE}. --overwrite would delete {_some_of(target)}.",
            hint="choose another --out, or remove that directory first",
            code="output.not_ours",
        )
    parent = next(p for p in target.parents if p.exists())
    if not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir():
        raise _not_writable(parent)


def check_apart(target: Path, *inputs: Path) -> None:
    """Refuse an output that is, or holds, a file or directory that the run reads."""
    place = target.resolve()
    for path in inputs:
        found = path.resolve()
        if place == found or place in found.parents:
            raise InputError(
                f"The output {target} {'is' if place == found else 'holds'} {path}, which is read.",
                hint="choose another --out",
                code="output.is_input",
            )


def _some_of(directory: Path) -> str:
    names = sorted(entry.name for entry in directory.iterdir())
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_space(target: Path, needed: int, what: str) -> None:
    """Refuse when the file system of `target` has less than `needed` bytes free."""
    parent = next(p for p in target.parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(
            f"{parent} has {free / 1e9:.2f} GB free; {what} needs about {needed / 1e9:.2f} GB "
            f"({(needed - free) / 1e9:.2f} GB more).",
            hint="free some space, or choose an --out on another disk",
            code="output.no_space",
        )


def _lock(partial: Path, target: Path) -> int:
    while True:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # a run that ended removed it in between
            continue
        except OSError as error:
            raise _not_writable(target.parent) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise InputError(
                f"Another quantkit run is writing {target} now (it holds {partial.name}).",
                hint="wait for it, or choose another --out",
                code="output.locked",
            ) from error
        with suppress(FileNotFoundError):
            if partial.stat().st_ino == os.fstat(handle).st_ino:
                return handle
        os.close(handle)


def _publish(partial: Path, target: Path, *, overwrite: bool) -> None:
    replaced = target.with_name(target.name + ".replaced")
    check_target(target, overwrite=overwrite)
    if target.is_dir():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
        try:
            partial.rename(target)
        except BaseException:
            if not target.exists():
                replaced.rename(target)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        partial.rename(target)


def _full(partial: Path, resumable: bool) -> InputError:
    return InputError(
        f"No space is left under {partial.parent} to complete {partial.name} "
        f"({shutil.disk_usage(partial.parent).free / 1e6:.0f} MB are free).",
        hint=f"free some space, then run the same command{' with --resume' if resumable else ''}",
        code="output.no_space",
    )


def _not_writable(parent: Path) -> InputError:
    return InputError(
        f"{parent} is not a directory that can be written.",
        hint="choose another --out, or change its permissions",
        code="output.not_writable",
    )
