"""What `analyze` may cost, in forward passes over its text, and the windows that this leaves.

A pass is counted in multiply-adds of linear layers; attention's own products, routers and the
rounding of weights come on top. A window costs one pass forward, one more from
the kept inputs, one back, and one a scheme; head and embeddings are computed once forward and once
back, so that what is counted is less.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def limit(schemes: int) -> float:
    """The most forward passes over all windows asked for."""
    return 1.2 * schemes + 1


def affordable(windows: NDArray[np.int64], schemes: int) -> NDArray[np.int64]:
    """Those of the windows [n, length], evenly spread, that keep the limit; where not even one
    does, the beginning of the first."""
    share = limit(schemes) / (schemes + 3)
    count = min(len(windows), int(share * len(windows) + 1e-9))
    if count == 0:
        return windows[:1, : max(2, int(share * windows.shape[1]))]
    taken: NDArray[np.int64] = windows[np.arange(count) * len(windows) // count]
    return taken
