"""Environments that quantkit makes for libraries that cannot share its own.

An environment is a folder `NAME-KEY` under `$QUANTKIT_CACHE/environments`; the key is a digest of
what it holds (pinned requirements and Python's version), so another set is another environment. It
is made as `NAME-KEY.partial` under a lock, checked, and renamed; a folder without `.partial` works.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantkit.backends.environments.device import has_nvidia_gpu
from quantkit.backends.environments.install import pip_install, uv_install
from quantkit.checkpoint.paths import cache_dir
from quantkit.errors import BackendError, InputError

CHECK_SECONDS = 300
_CHECK = """
import importlib, importlib.metadata as metadata, sys
for pin in sys.argv[2:]:
    name, _, wanted = pin.partition("==")
    try: found = metadata.version(name)
    except metadata.PackageNotFoundError: found = "missing"
    if "+" not in wanted: found = found.partition("+")[0]
    if found != wanted: sys.exit(f"{name} is {found}, not {wanted}")
importlib.import_module(sys.argv[1])
"""


@dataclass(frozen=True)
class Spec:
    """What an environment holds. `library` must import in it.

    `pins` are `name==version`, all of them: nothing is added (but what torch's build needs).
    """

    name: str
    library: str
    purpose: str
    pins: tuple[str, ...]
    gpu: bool = False
    """Whether the library only works beside an NVIDIA GPU."""

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits that change with anything that the environment holds."""
        held = [self.name, self.library, platform.python_version(), platform.machine(), *self.pins]
        return hashlib.sha256("\n".join(held).encode()).hexdigest()[:12]

    @property
    def path(self) -> Path:
        return cache_dir() / "environments" / f"{self.name}-{self.key}"

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"


_KNOWN = {
    "msmodelslim": ("msmodelslim", "the msmodelslim_* methods; needs an older Transformers", False),
    "sglang": ("sglang", "SGLang on NVIDIA GPUs: validate --engine sglang", True),
    "vllm": ("vllm", "vLLM on CPUs: validate --engine vllm", False),
    "vllm-cuda": ("vllm", "vLLM on NVIDIA GPUs: validate --engine vllm", True),
}
"""Name → the library that must import, what the environment is for, whether it needs a GPU."""


def specs() -> dict[str, Spec]:
    """Every environment that quantkit knows, by name."""
    return {
        name: Spec(name, library, purpose, _pins(name), gpu)
        for name, (library, purpose, gpu) in _KNOWN.items()
    }


def unavailable(spec: Spec) -> str | None:
    """Why the environment cannot be used on this machine, or None."""
    if spec.gpu and not has_nvidia_gpu():
        return "it needs an NVIDIA GPU and this machine has none"
    return None


def spec_named(name: str) -> Spec:
    """The environment of that name; InputError with the known ones otherwise."""
    known = specs()
    if name not in known:
        raise InputError(
            f"There is no environment {name!r}; there are {', '.join(sorted(known))}.",
            hint="quantkit env list",
            code="environment.unknown",
        )
    return known[name]


def ready(name: str) -> Path | None:
    """The interpreter of a finished environment, or None when it is not made."""
    python = spec_named(name).python
    return python if python.is_file() else None


def check(spec: Spec) -> str | None:
    """Why a finished environment does not work, or None: its pins, and its library's import."""
    if not spec.python.is_file():
        return "it is not made yet"
    return _check(spec, spec.python)


def create(spec: Spec, wheels: Path | None, tell: Callable[[str], None]) -> Path:
    """Make the environment unless it works already; returns its interpreter.

    `wheels` is a folder of wheels for a machine without a package index. A second run waits for
    the first and uses what it made. Raises BackendError when the environment cannot be used on this
    machine, when pip and uv fail, or when the result is broken.
    """
    if reason := unavailable(spec):
        raise BackendError(
            f"The environment {spec.name} cannot be made here: {reason}.",
            hint="quantkit env list  # what each is for",
            code="environment.unavailable",
        )
    if wheels is not None and not wheels.is_dir():
        raise InputError(
            f"--wheels {wheels} is not a directory.",
            hint=f"pip download --dest {wheels} --requirement {_pin_file(spec.name)}",
            code="environment.no_wheels",
        )
    with _locked(spec, tell):
        reason = check(spec)
        if reason is None:
            tell(f"{spec.name} is ready")
            return spec.python
        shutil.rmtree(spec.path, ignore_errors=True)
        staging = spec.path.with_name(spec.path.name + ".partial")
        shutil.rmtree(staging, ignore_errors=True)
        try:
            _fill(spec, staging, wheels, tell)
            staging.rename(spec.path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return spec.python


def remove(spec: Spec, tell: Callable[[str], None]) -> list[Path]:
    """Delete every environment of that name, older ones with other pins too."""
    with _locked(spec, tell):
        found = sorted(spec.path.parent.glob(f"{spec.name}-????????????"))
        for path in found:
            doomed = path.with_name(path.name + ".partial")
            path.rename(doomed)
            shutil.rmtree(doomed)
    return found


def _fill(spec: Spec, staging: Path, wheels: Path | None, tell: Callable[[str], None]) -> None:
    tell(f"making {spec.name} ({len(spec.pins)} packages)")
    _run([sys.executable, "-m", "venv", str(staging)], spec, "venv")
    python = staging / "bin" / "python"
    pip = pip_install(python, wheels)
    torch = [pin for pin in spec.pins if pin.startswith("torch==")]
    if torch:  # alone and with what its build needs: GPU builds bring their libraries
        _run([*pip, *torch], spec, "pip")
    uv = uv_install(python, wheels)
    if not (uv and _uv_fills(uv, spec, tell)):
        _run([*pip, "--no-deps", *spec.pins], spec, "pip")
    reason = _check(spec, python)
    if reason:
        raise BackendError(
            f"The new environment {spec.name} does not work: {reason}",
            hint=f"quantkit env create {spec.name}  # again; or with --wheels DIR",
            code="environment.broken",
        )
    _move_scripts(staging, spec.path)


def _uv_fills(uv: list[str], spec: Spec, tell: Callable[[str], None]) -> bool:
    try:
        _run([*uv, "--no-deps", *spec.pins], spec, "uv")
    except BackendError as error:
        tell(f"{error.message}; pip tries next")
        return False
    return True


def _move_scripts(staging: Path, target: Path) -> None:
    """Point the scripts, which name their interpreter by its full path, to the final folder."""
    old, new = str(staging).encode(), str(target).encode()
    for path in [*(staging / "bin").iterdir(), staging / "pyvenv.cfg"]:
        if path.is_file() and not path.is_symlink() and old in (content := path.read_bytes()):
            path.write_bytes(content.replace(old, new))


def _check(spec: Spec, python: Path) -> str | None:
    command = [str(python), "-c", _CHECK, spec.library, *spec.pins]
    try:
        done = subprocess.run(
            command, cwd="/", capture_output=True, text=True, timeout=CHECK_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"its interpreter does not run: {error}"
    return (done.stderr.strip().splitlines() or ["it failed"])[-1] if done.returncode else None


def _run(command: list[str], spec: Spec, what: str) -> None:
    environment = {**os.environ, "PYTHONNOUSERSITE": "1"}
    # uv reads the settings of the folder where it is started, which may be another project's.
    done = subprocess.run(
        command, cwd="/", env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BackendError(
            f"{what} failed while making the environment {spec.name}: "
            f"{(done.stderr or done.stdout).strip()[-600:]}",
            hint=f"quantkit env create {spec.name} --wheels DIR  # without a package index",
            code="environment.create_failed",
        )


@contextmanager
def _locked(spec: Spec, tell: Callable[[str], None]) -> Iterator[None]:
    spec.path.parent.mkdir(parents=True, exist_ok=True)
    with (spec.path.parent / f"{spec.name}.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f"another run is making {spec.name}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _pins(name: str) -> tuple[str, ...]:
    text = _pin_file(name).read_text(encoding="utf-8")
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return tuple(line for line in lines if line)


def _pin_file(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.txt")
