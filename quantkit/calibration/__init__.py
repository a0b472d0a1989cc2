"""Calibration: a named mixture of sources becomes one hashed token file that every backend reads.

`load_calibration` reads the mixture, `build_tokens` makes (or finds in the cache) the tokens of
one model, `leakage` tells how much of a text those tokens have seen.
"""

from quantkit.calibration.config import CalibrationConfig
from quantkit.calibration.heldout import held_out_texts, leakage
from quantkit.calibration.load import calibration_files, load_calibration
from quantkit.calibration.tokenfile import TokenFile, read_token_file
from quantkit.calibration.tokens import build_tokens

__all__ = [
    "CalibrationConfig",
    "TokenFile",
    "build_tokens",
    "calibration_files",
    "held_out_texts",
    "leakage",
    "load_calibration",
    "read_token_file",
]
