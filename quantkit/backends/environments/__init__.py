"""Which interpreter runs a backend, and managed environments. Nothing is installed implicitly."""

from quantkit.backends.environments.interpreter import (
    find_interpreter,
    install_command,
    library_versions,
    missing_reason,
)

__all__ = ["find_interpreter", "install_command", "library_versions", "missing_reason"]
