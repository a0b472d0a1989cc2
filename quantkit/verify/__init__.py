"""The integrity check of a finished checkpoint: ours or anyone's, with or without its source."""

from quantkit.verify.findings import (
    Finding,
    LayerFidelity,
    PlannedLayers,
    VerifyReport,
    Written,
)
from quantkit.verify.run import verify

__all__ = ["Finding", "LayerFidelity", "PlannedLayers", "VerifyReport", "Written", "verify"]
