"""Which interpreter runs a backend. Nothing is installed implicitly."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from quantkit.backends.environments.managed import ready
from quantkit.backends.registry import Backend
from quantkit.errors import BackendError, InputError

PROBE_SECONDS = 60
_FIND = """
import importlib.util, sys
spec = importlib.util.find_spec(sys.argv[1])
sys.exit(spec is None or spec.origin is None)
"""
_VERSIONS = """
import importlib.metadata as metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try: found[name] = metadata.version(name)
    except metadata.PackageNotFoundError: pass
print(json.dumps(found))
"""


def find_interpreter(backend: Backend, python: str | None = None) -> Path:
    """The interpreter that can import the backend's library: `python`, else that of the backend's
    managed environment, else the current one.

    The library is looked up, not imported. Raises InputError when `python` is no interpreter and
    BackendError, with the command that installs the library, when it is not there.
    """
    if python:
        chosen = _executable(python)
    else:
        managed = ready(backend.environment) if backend.environment else None
        chosen = managed or Path(sys.executable)
    if not _has(chosen, backend.library):
        place = f"which {chosen} does not have"
        if backend.environment and not python:
            place = f"which runs in the environment {backend.environment}; it is not made yet"
        raise BackendError(
            f"The backend {backend.name} needs {backend.distribution}, {place}.",
            hint=install_command(backend, chosen),
            code="environment.missing_library",
        )
    return chosen


def missing_reason(backend: Backend) -> str | None:
    """Why the backend's library cannot be used here, with the command that adds it, or None."""
    try:
        find_interpreter(backend)
    except BackendError as error:
        return f"not installed: {error.hint}"
    return None


def install_command(backend: Backend, python: Path) -> str:
    """The one command that adds the backend's library to an interpreter."""
    if not _is_current(python):
        return shlex.join([str(python), "-m", "pip", "install", backend.distribution])
    if backend.environment:
        return f"quantkit env create {backend.environment}"
    wanted = f"quantkit[{backend.extra}]" if backend.extra else backend.distribution
    return shlex.join([str(python), "-m", "pip", "install", wanted])


def library_versions(python: Path, names: Iterable[str]) -> dict[str, str]:
    """Installed versions by distribution name in an interpreter; absent ones are left out."""
    if not _is_current(python):
        found: dict[str, str] = json.loads(_probe(python, _VERSIONS, *names).stdout)
        return found
    versions = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _has(python: Path, library: str) -> bool:
    if _is_current(python):
        spec = importlib.util.find_spec(library)
        return spec is not None and spec.origin is not None
    return _probe(python, _FIND, library).returncode == 0


def _is_current(python: Path) -> bool:
    """By path, not by the file behind it: virtual environments share their base's binary."""
    return os.path.abspath(python) == os.path.abspath(sys.executable)  # noqa: PTH100


def _executable(python: str) -> Path:
    path = Path(os.path.abspath(Path(python).expanduser()))  # noqa: PTH100
    if not path.is_file() or not os.access(path, os.X_OK):
        raise InputError(
            f"--python {python}: {path} is not an executable file.",
            hint="name the interpreter itself, for example --python ENV/bin/python",
            code="environment.no_interpreter",
        )
    return path


def _probe(python: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a few lines in another interpreter, away from modules in the current folder."""
    try:
        return subprocess.run(
            [str(python), "-c", code, *arguments],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(
            f"{python} does not work as a Python interpreter: {error}",
            hint="name another one with --python",
            code="environment.no_interpreter",
        ) from error
