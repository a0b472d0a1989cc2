"""A model without its weights: names and shapes from what is there of it (index, config, headers).

Enough to plan with. Whatever is not read from a header is marked as derived.
"""

from quantkit.derive.names import left_out
from quantkit.derive.open import open_headers, remote_checkpoint

__all__ = ["left_out", "open_headers", "remote_checkpoint"]
