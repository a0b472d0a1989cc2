"""Every failure a user can meet: one sentence with the values, one hint with the next command."""

from __future__ import annotations

import shlex
from typing import Any

EXIT_OK = 0
EXIT_INPUT = 1
EXIT_USAGE = 2
EXIT_BACKEND = 3
EXIT_CHECK = 4


def command(*words: object) -> str:
    """`quantkit WORDS` as a shell takes it: what hints and "next:" print."""
    return shlex.join(["quantkit", *map(str, words)])


class QuantkitError(Exception):
    """A failure with an exit code, a stable `code` for machines and a `hint` for people.

    `message` says what failed, with the values; `hint` is the next command or change to make.
    """

    exit_code = EXIT_INPUT

    def __init__(self, message: str, *, hint: str, code: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code


class InputError(QuantkitError):
    """The request or the input is wrong (exit 1)."""


class ReportError(InputError):
    """A report file could not be written after the work; `result` is what it would have held."""

    def __init__(self, message: str, *, hint: str, code: str, result: Any) -> None:
        super().__init__(message, hint=hint, code=code)
        self.result = result


class BackendError(QuantkitError):
    """A backend, an engine or the worker failed (exit 3)."""

    exit_code = EXIT_BACKEND


class CheckError(QuantkitError):
    """A verification or a gate failed (exit 4)."""

    exit_code = EXIT_CHECK
