"""quantkit: quantize large language models offline, prove the result, ship it.

Importing this package loads the standard library only: the worker
(`quantkit/backends/process/worker.py`) also starts in environments in which quantkit's own
dependencies are missing.
"""

__version__ = "0.1.0"
