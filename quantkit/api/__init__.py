"""The Python API: what the commands do, as functions; `import quantkit` offers them lazily.

Paths may be `str` or `Path`. Failures are the exceptions of `quantkit.errors`; Ctrl-C and an
exception of the callback leave everything as it was. Heavy libraries are imported by the call.
"""

from quantkit.api.checkpoints import SAMPLES, export, load, plan, quantize, validate, verify
from quantkit.api.progress import ProgressCallback, ProgressEvent
from quantkit.api.search import SCHEMES, WINDOWS, analyze
from quantkit.api.ship import push
from quantkit.api.sweeps import sweep

__all__ = [
    "SAMPLES", "SCHEMES", "WINDOWS", "ProgressCallback", "ProgressEvent", "analyze", "export",
    "load", "plan", "push", "quantize", "sweep", "validate", "verify",
]  # fmt: skip
