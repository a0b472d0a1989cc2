"""Which tokens GPTQModel calibrates each expert with, counted where they enter its Hessian.

With `ExpertsRoutingBypass` the library calls the linear layers of every expert itself, and then
runs the block as the router says: hooks on the experts see only the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from gptqmodel.quantization.gptq import GPTQ

from quantkit.backends.adapters.experts_seen import ExpertsSeen


@contextmanager
def calibrated_experts(
    experts: ExpertsSeen, blocks: Mapping[str, str], *, routed: bool
) -> Iterator[None]:
    """While the body runs, `experts` counts the routed tokens, and as seen those that calibrate:
    the same where the library calibrates with `routed` tokens only.

    Every expert's last layer is looked at: the two before it have one Hessian together. blocks:
    module that holds the experts of a layer → its name in the checkpoint.
    """
    seen = {block: [0] * len(watched.seen) for block, watched in experts.modules.items()}
    add_batch = GPTQ.add_batch

    def counted(self: Any, inp: torch.Tensor, out: torch.Tensor, batch_index: Any = None) -> None:
        name = getattr(self._named_module, "full_name", "")
        holder, _, last = name.rpartition(".")
        block, _, index = holder.rpartition(".")
        if block in blocks and last in ("down_proj", "w2"):
            watched = experts.modules[blocks[block]]
            seen[blocks[block]][int(index)] += watched.without_padding(len(inp))
        add_batch(self, inp, out, batch_index)

    GPTQ.add_batch = counted
    try:
        with experts.watch(feed=False):
            yield
    finally:
        GPTQ.add_batch = add_batch
        for block, counts in seen.items():
            experts.modules[block].seen = counts
            if routed:
                experts.modules[block].routed = counts
