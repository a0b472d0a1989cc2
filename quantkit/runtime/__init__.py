"""The verification runtime: a checkpoint reloaded with real kernels, as an engine serves it."""

from quantkit.runtime.load import load
from quantkit.runtime.model import Runtime

__all__ = ["Runtime", "load"]
