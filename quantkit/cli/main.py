"""The entry point of `quantkit`: Ctrl-C is handled before anything that takes time is imported."""

from __future__ import annotations

import gc
import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130
"""The exit code after Ctrl-C: 128 and the number of the signal."""
AGAIN_SECONDS = 0.05
"""After which a Ctrl-C that Python could not raise comes again."""


def _leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    """While modules are imported there is nothing to clean up, and an exception may be lost."""
    os._exit(INTERRUPTED)


def _not_lost(ignored: sys.UnraisableHookArgs) -> None:
    """Send Ctrl-C again where it came in a finalizer or a weak reference's callback, which Python
    lets nothing out of: the import system has some, and work would go on as if nothing was."""
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        from threading import Timer

        again = Timer(AGAIN_SECONDS, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(ignored)


def main() -> None:
    """Run the command line; exit codes are those of `quantkit.errors`."""
    signals = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as a shell's background job has it
        signals.append(signal.SIGINT)
    for each in signals:
        signal.signal(each, _leave)
    gc.disable()  # what is imported stays
    try:
        from quantkit.cli.app import run

        gc.freeze()
        gc.enable()
        for each in signals:
            signal.signal(each, signal.default_int_handler)
        sys.unraisablehook = _not_lost
        run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        from quantkit.cli.failures import end

        sys.exit(end(error))
