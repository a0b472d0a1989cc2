"""How products of bfloat16 matrices do on this CPU: torch's own against the same in float32.

    python benchmarks/cpu_products.py

Prints one row a number of input rows (microseconds, and the ratio), for one layer of 576 × 1536.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from quantkit.backends.process import float32_products

ROWS = (1, 2, 4, 8, 32, 128, 512, 2048)


def seconds(product: Callable[[], torch.Tensor]) -> float:
    """The median of seven runs after one."""
    product()
    taken = []
    for _ in range(7):
        start = time.perf_counter()
        product()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[3]


def main() -> None:
    """Compare for every number of rows."""
    weight = torch.randn(1536, 576).bfloat16()
    print(
        f"capability {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    )
    print("rows  bfloat16 µs  float32 µs  ratio")
    for rows in ROWS:
        x = torch.randn(rows, 576).bfloat16()

        def native(x: torch.Tensor = x) -> torch.Tensor:
            return torch.nn.functional.linear(x, weight)

        def wide(x: torch.Tensor = x) -> torch.Tensor:
            return float32_products._product(x, weight.t(), None)

        ours, theirs = seconds(wide), seconds(native)
        print(f"{rows:4}  {theirs * 1e6:11.0f}  {ours * 1e6:10.0f}  {theirs / ours:5.2f}")


if __name__ == "__main__":
    main()
