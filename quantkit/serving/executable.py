"""The program behind a serving command, for `launch --exec`."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec

from quantkit.errors import BackendError
from quantkit.serving.engines import ENGINES, find_interpreter
from quantkit.serving.launch import Launch


def executable(made: Launch) -> str:
    """The full path of the command's program: of the managed environment, else the user's own.

    Raises BackendError, with the command that makes the environment, when the engine is in neither.
    """
    name = made.argv[0]
    module = name.startswith("python")
    try:
        python = find_interpreter(ENGINES[made.engine])
    except BackendError:
        here = sys.executable if find_spec(made.engine) else None
        found = here if module else shutil.which(name)
        if found is None:
            raise
        return found
    return str(python if module else python.with_name(name))
