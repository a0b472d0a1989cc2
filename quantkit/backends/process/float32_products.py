"""Products of bfloat16 matrices on CPUs that are slow at them, computed in float32.

x86 processors without AVX-512 have no bfloat16 instructions, and torch has no fast product for
them: 2048 × 576 × 1536 takes five to eight times as long as in float32, casts included
(`benchmarks/cpu_products.py`). Products of bfloat16 numbers are exact in float32; sums are rounded
to bfloat16 once, as the native ones are. Up to `FEW_ROWS` rows the weight's cast costs more than it
gains. Attention of torch's own is as fast either way and stays as it is.

Shared by workers and runtime, so it imports torch and the standard library only.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch.nn.functional import linear as native_linear

FEW_ROWS = 4
"""Products of up to so many rows are left to torch."""

BLOCK_ELEMENTS = 1 << 20
"""Weights cast at a time: 4 MiB in float32. Whole heads of a vocabulary would need hundreds."""

_SLOW = frozenset({"DEFAULT", "AVX2"})
"""Capabilities without bfloat16 (ATen `cpu/Utils`); ATEN_CPU_CAPABILITY imitates them."""

_Product = Callable[..., torch.Tensor]
_MM: _Product = torch.ops.aten.mm.out
_ADDMM: _Product = torch.ops.aten.addmm.out
_BMM: _Product = torch.ops.aten.bmm.out
_BADDBMM: _Product = torch.ops.aten.baddbmm.out

_installed: list[torch.library.Library] = []


@cache
def slow_bfloat16() -> bool:
    """Whether this CPU's bfloat16 products are slower than float32 ones."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.cpu.get_cpu_capability() in _SLOW
    )


def described() -> str:
    """How bfloat16 products are computed where they are not native, for a record; else empty."""
    capability: str = torch.backends.cpu.get_cpu_capability()
    return f"float32 on {capability.lower()}" if slow_bfloat16() else ""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As torch's: x [..., in], weight [out, in], bias [out] → [..., out] in the dtype of x."""
    rows = x.numel() // x.shape[-1] if x.numel() else 0
    if not (_eligible(x, weight) and rows > FEW_ROWS):
        return native_linear(x, weight, bias)
    result: torch.Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
        x.reshape(rows, -1), weight, bias
    )
    return result.view(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    """`_product` of x [n, in] and a weight [out, in], with gradients that are computed so too."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _product(x, weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _product(gradient, weight, None) if needs_x else None,
            _product(gradient.t(), x, None) if needs_weight else None,
            gradient.sum(0) if needs_bias else None,
        )


def install() -> None:
    """Compute the bfloat16 products of this whole process so, those of autograd included.

    Replaces ATen's `mm`, `addmm`, `bmm` and `baddbmm` for CPUs; other dtypes go on to the forms of
    the same operators that write into a given tensor. For processes of our own only.
    """
    if _installed or not slow_bfloat16():
        return
    import warnings

    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it says that a kernel is replaced
        for name, function in (
            ("mm", _mm), ("addmm", _addmm), ("bmm", _bmm), ("baddbmm", _baddbmm)
        ):  # fmt: skip
            library.impl(name, function, "CPU")  # type: ignore[no-untyped-call]
    _installed.append(library)


def _eligible(*tensors: torch.Tensor) -> bool:
    return (
        all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in tensors)
        and slow_bfloat16()
    )


def _worth(a: torch.Tensor, b: torch.Tensor) -> bool:
    return _eligible(a, b) and min(a.shape[0], b.shape[1]) > FEW_ROWS and a.shape[1] > 0


def _product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """a [m, k] @ b [k, n] + bias [n], the columns of b block by block, in bfloat16."""
    (count, inner), columns = a.shape, b.shape[1]
    result = a.new_empty(count, columns)
    wide = a.float()
    for part in _blocks(columns, inner):
        product = _MM(wide, b[:, part].float(), out=wide.new_empty(count, part.stop - part.start))
        if bias is not None:
            product += bias[part]
        result[:, part] = product
    return result


def _blocks(columns: int, inner: int) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // inner)
    for start in range(0, columns, step):
        yield slice(start, min(start + step, columns))


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if _worth(a, b):
        return _product(a, b, None)
    return _MM(a, b, out=a.new_empty(a.shape[0], b.shape[1]))


def _addmm(
    c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    if _worth(a, b) and beta == alpha == 1 and c.dim() == 1 and c.shape[0] == b.shape[1]:
        return _product(a, b, c)
    out = a.new_empty(a.shape[0], b.shape[1])
    return _ADDMM(c, a, b, beta=beta, alpha=alpha, out=out)


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    if _eligible(a, b) and min(a.shape[1], b.shape[2]) > 1:
        for one in range(a.shape[0]):
            out[one] = _MM(
                a[one].float(),
                b[one].float(),
                out=out.new_empty(out.shape[1:], dtype=torch.float32),
            )
        return out
    return _BMM(a, b, out=out)


def _baddbmm(
    c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    if _eligible(c, a, b):
        product = _BADDBMM(
            c.float(), a.float(), b.float(), beta=beta, alpha=alpha,
            out=a.new_empty(a.shape[0], a.shape[1], b.shape[2], dtype=torch.float32),
        )  # fmt: skip
        return product.to(a.dtype)
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return _BADDBMM(c, a, b, beta=beta, alpha=alpha, out=out)
