"""The integrity check of a finished checkpoint: ours or anyone's, with or without its source."""

from quantkit.verification.findings import (
    EngineRequest,
    Finding,
    LayerFidelity,
    PlannedLayers,
    VerifyReport,
    Written,
)
from quantkit.verification.run import verify

__all__ = [
    "EngineRequest", "Finding", "LayerFidelity", "PlannedLayers", "VerifyReport", "Written",
    "verify",
]  # fmt: skip
