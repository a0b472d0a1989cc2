"""Where the recipe and calibration files lie: beside the package in a source tree, inside it in a
wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def data_dir(kind: Literal["recipes", "calibration"]) -> Path:
    """The directory of the bundled YAML files of one kind."""
    package = Path(__file__).parent
    packed = package / f"_{kind}"
    return packed if packed.is_dir() else package.parent / kind
