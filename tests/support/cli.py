"""The command line as users run it: a real process, its exit code and its two streams."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError

QUICK = ("--set", "calibration.samples=8", "--set", "calibration.sequence_length=128")
"""Enough calibration to be real, little enough for a test."""

METHODS: dict[str, tuple[str, ...]] = {
    "modelopt_fp8": (),
    "modelopt_fp4": ("--set", "kv_cache=fp8"),
    "modelopt_nvfp4_mlp_only": (),
    "modelopt_int8_sq": (),
    "modelopt_int4_awq": ("--set", "group_size=64"),
}
"""The ModelOpt methods with the settings that fit the small model."""


@dataclass(frozen=True)
class Run:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.out)
        return value


def command(*args: str | Path) -> list[str]:
    """The argument list of `quantkit ARGS`."""
    return [sys.executable, "-m", "quantkit", *map(str, args)]


def quantkit(*args: str | Path, cwd: Path | None = None) -> Run:
    """Run `quantkit ARGS` to its end."""
    done = subprocess.run(command(*args), capture_output=True, text=True, cwd=cwd, check=False)
    return Run(done.returncode, done.stdout, done.stderr)


def refused(run: Run, code: int, *telling: str) -> None:
    """Assert that a command failed as all must: exit code, sentence, hint, no traceback."""
    assert run.code == code, run.err
    assert "\nhint: " in "\n" + run.err, run.err
    assert "error: " in run.err, run.err
    assert "Traceback" not in run.err, run.err
    for part in telling:
        assert part in run.err, run.err


def inside(*args: str | Path) -> tuple[int, str, str]:
    """Run `quantkit ARGS` in this process: its exit code, and its error's code and message."""
    from quantkit.cli.app import app

    try:
        return app([*map(str, args)], standalone_mode=False) or 0, "", ""
    except QuantkitError as error:
        return error.exit_code, error.code, error.message


def said(*args: str | Path) -> tuple[int, str]:
    """Run `quantkit ARGS` in this process: its exit code, and all that a user reads."""
    from typer.testing import CliRunner

    from quantkit.cli.app import app

    done = CliRunner().invoke(app, [*map(str, args)])
    if isinstance(done.exception, QuantkitError):
        error = done.exception
        return error.exit_code, f"{done.stderr}\nerror {error.code}: {error}\nhint: {error.hint}"
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, " ".join((done.stdout + done.stderr).replace("│", " ").split())
