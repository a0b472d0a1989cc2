"""How a command ends that failed: a sentence, a hint, an exit code, and an object with `--json`.

Ctrl-C is handled in `main.py`.

Starts with the standard library alone: it also tells why the rest could not be imported.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import select
import shlex
import sys
import traceback

from quantkit import __version__
from quantkit.checkpoint.paths import new_log
from quantkit.cli.output import print_error
from quantkit.errors import BackendError, InputError, QuantkitError

DEBUG = "QUANTKIT_DEBUG"
"""Environment variable that shows tracebacks on stderr too, unless it is empty or 0."""

WIDTH = 300


def end(error: Exception) -> int:
    """Tell on stderr, and with `--json` on stdout, why the command failed; its exit code."""
    failure = error if isinstance(error, QuantkitError) else explained(error)
    if os.environ.get(DEBUG, "0") not in ("", "0"):
        traceback.print_exception(error)
    try:
        if "--json" in sys.argv:
            told = {"code": failure.code, "message": failure.message, "hint": failure.hint}
            sys.stdout.write(json.dumps({"error": told}, indent=2) + "\n")
        sys.stdout.flush()
    except OSError:
        _leave_stdout()
    print_error(failure.message, failure.hint)
    return failure.exit_code


def explained(error: Exception) -> QuantkitError:
    """What no code of ours expected, as a failure of ours; its traceback goes to a log."""
    if isinstance(error, BrokenPipeError) and _stdout_is_closed():
        return InputError(
            "Standard output was closed before everything was written to it.",
            hint="let the command behind the | read to its end, or write to a file with >",
            code="output.closed",
        )
    log = _logged(error)
    code, sentence, hint = _sentence(error)
    return BackendError(sentence, hint=f"{hint}; {log}", code=code)


def _sentence(error: Exception) -> tuple[str, str, str]:
    """Code, message and the hint's first half."""
    from quantkit.backends.process.worker import is_out_of_memory

    where = _path_of(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        sentence = f"No space is left for {where or 'what is written'}."
        return "system.no_space", sentence, "free some space, then run the command again"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        sentence = f"{where or 'A file'} cannot be used: {os.strerror(error.errno)}."
        return "system.no_permission", sentence, f"ls -ld {shlex.quote(where) if where else '.'}"
    if is_out_of_memory(error):
        return "system.out_of_memory", "Memory ran out.", "use a machine with more memory"
    if isinstance(error, RecursionError):
        sentence = "Something is nested deeper than Python can follow."
        return "system.too_deep", sentence, "look for a config or a recipe that nests without end"
    said = " ".join(str(error).split())[:WIDTH].rstrip(".")
    sentence = f"quantkit failed unexpectedly: {type(error).__name__}{f': {said}' if said else ''}."
    return "internal.unexpected", sentence, "report this with the command and its log"


def _path_of(error: Exception) -> str:
    name = error.filename if isinstance(error, OSError) else None
    return os.fsdecode(name) if isinstance(name, str | bytes) else ""


def _logged(error: Exception) -> str:
    """Write the traceback to a log; where it is, or why there is none."""
    about = (
        f"quantkit {__version__}, Python {platform.python_version()}, {platform.platform()}\n"
        f"{shlex.join(sys.argv)}\n\n"
    )
    try:
        log = new_log("failure")
        log.write_text(about + "".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError:
        return f"its log cannot be written: {DEBUG}=1 shows the traceback"
    return f"its log: {log}"


def _stdout_is_closed() -> bool:
    """Whether nobody reads the pipe (or socket) that stdout is."""
    try:
        watch = select.poll()
        watch.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))
    except (OSError, ValueError, AttributeError):
        return False


def _leave_stdout() -> None:
    """Let what is still buffered go nowhere, so that the end of the process writes it in peace."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
