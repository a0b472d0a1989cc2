"""Where quantkit keeps what it can make again: the demo model, token files, environments."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$QUANTKIT_CACHE`, or `~/.cache/quantkit`; not created here."""
    chosen = os.environ.get("QUANTKIT_CACHE")
    return Path(chosen).expanduser().resolve() if chosen else Path.home() / ".cache" / "quantkit"
