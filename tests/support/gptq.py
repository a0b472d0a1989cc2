"""A plain GPTQ (https://arxiv.org/abs/2210.17323, algorithm 1), small enough for many seeds."""

from __future__ import annotations

import torch

from quantkit.checkpoint.schemes import NumberFormat
from quantkit.formats.base import QuantWeight

DAMP = 0.01


def gptq(weight: torch.Tensor, inputs: torch.Tensor, bits: int, group: int) -> QuantWeight:
    """Weight [out, in] and inputs [samples, in] → symmetric codes whose error in one column is
    made good in the columns after it."""
    hessian = inputs.t().double() @ inputs.double()
    hessian.diagonal().add_(DAMP * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left = weight.double().clone()
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = []
    most = 2 ** (bits - 1) - 1
    for column in range(weight.shape[1]):
        if column % group == 0:
            scale = left[:, column : column + group].abs().amax(1) / most
            scales.append(scale)
        code = (left[:, column] / scale).round().clamp(-most - 1, most)
        codes[:, column] = code.to(torch.int8)
        error = (left[:, column] - code * scale) / upper[column, column]
        left[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :]
    number = NumberFormat("int4" if bits == 4 else "int3", "group", group_size=group)
    return QuantWeight(number, codes, torch.stack(scales, 1).float())
