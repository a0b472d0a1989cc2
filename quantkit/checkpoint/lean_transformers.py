"""Transformers' configuration classes without the import of its networks.

A configuration writes its docstring when its module is imported, and for that imports the model
classes, text generation and torch's compiler: 1.5 s of a process that needs none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_docstrings() -> Iterator[None]:
    """Leave the docstrings of what is imported inside as they are written."""
    import transformers.utils

    place: Any = transformers.utils
    theirs = getattr(place, "auto_docstring", None)
    if theirs is None:
        yield
        return

    def kept(decorated: Any = None, **_: Any) -> Any:
        same: Callable[[Any], Any] = lambda one: one  # noqa: E731
        return same if decorated is None else decorated

    place.auto_docstring = kept
    try:
        yield
    finally:
        place.auto_docstring = theirs
