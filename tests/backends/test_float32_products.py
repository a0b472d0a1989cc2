"""Bfloat16 products in float32: right, in autograd too, and only where the CPU is slow at them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantkit.backends.process import float32_products
from quantkit.backends.process.job import Result

SLOW = """
import torch
from quantkit.backends.process import float32_products as products
products.slow_bfloat16.cache_clear()
products.slow_bfloat16 = lambda: True
torch.manual_seed(0)
x, w, b = torch.randn(33, 70), torch.randn(50, 70), torch.randn(50)
x, w, b = (t.bfloat16().requires_grad_() for t in (x, w, b))
def gradients(f):
    for t in (x, w, b): t.grad = None
    y = f(x, w, b)
    y.backward(torch.ones_like(y))
    return [y.detach(), x.grad, w.grad, b.grad]
wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
y = torch.nn.functional.linear(*wide); y.backward(torch.ones_like(y))
exact = [y.detach(), *(t.grad for t in wide)]
called = gradients(products.linear)  # by itself, as the runtime and the search call it
products.install(); products.install()
ours = gradients(torch.nn.functional.linear)
for name, a, e in [*zip("yxwb", ours, exact), *zip("yxw", called, exact)]:
    assert a.dtype == torch.bfloat16
    bound = e.abs() * 2**-8 + 1e-5
    assert ((a.double() - e).abs() <= bound).all(), name
a, c = torch.randn(3, 9, 20).bfloat16(), torch.randn(3, 20, 7).bfloat16()
e = a.double() @ c.double()
assert ((torch.bmm(a, c).double() - e).abs() <= e.abs() * 2**-8 + 1e-5).all()
d = torch.randn(3, 9, 7).bfloat16()
e2 = d.double() * 2 + e * 3
got = torch.baddbmm(d, a, c, beta=2, alpha=3).double()
assert ((got - e2).abs() <= e2.abs() * 2**-8 + 1e-4).all()
f, g = torch.randn(9, 20), torch.randn(20, 7)
h = torch.randn(9, 7)
assert torch.allclose(torch.addmm(h, f, g, beta=0.5), h / 2 + f @ g, atol=1e-5)
assert torch.allclose(f @ g, (f.double() @ g.double()).float(), atol=1e-5)
assert (torch.arange(6).view(2, 3) @ torch.arange(6).view(3, 2)).tolist() == [[10, 13], [28, 40]]
assert torch.empty(0, 4).bfloat16() @ torch.empty(4, 3).bfloat16() is not None
print("good")
"""


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without bfloat16 products of its own."""
    monkeypatch.setattr(float32_products, "slow_bfloat16", lambda: True)


@pytest.mark.parametrize("shape", [(5, 576), (2, 40, 64), (1, 576), (0, 64)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_is_the_exact_one_rounded_once(
    slow: None, shape: tuple[int, ...], biased: bool
) -> None:
    torch.manual_seed(1)
    x = torch.randn(shape).bfloat16()
    weight, bias = torch.randn(300, shape[-1]).bfloat16(), torch.randn(300).bfloat16()
    got = float32_products.linear(x, weight, bias if biased else None)
    exact = x.double() @ weight.double().t() + (bias.double() if biased else 0)
    assert got.dtype == torch.bfloat16
    assert got.shape == exact.shape
    few = x.numel() // x.shape[-1] <= float32_products.FEW_ROWS
    rounding = 2**-7 if few else 2**-8  # few rows are torch's own, rounded before the bias too
    assert bool(((got.double() - exact).abs() <= exact.abs() * rounding + 0.02).all())


def test_blocks_of_columns_make_one_product(slow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(8, 64).bfloat16(), torch.randn(100, 64).bfloat16()
    whole = float32_products.linear(x, weight)
    monkeypatch.setattr(float32_products, "BLOCK_ELEMENTS", 64 * 33)
    assert torch.equal(float32_products.linear(x, weight), whole)


def test_other_dtypes_and_fast_cpus_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(8, 64), torch.randn(10, 64)
    native = torch.nn.functional.linear(x.bfloat16(), weight.bfloat16())
    monkeypatch.setattr(float32_products, "slow_bfloat16", lambda: False)
    assert torch.equal(float32_products.linear(x.bfloat16(), weight.bfloat16()), native)
    assert float32_products.described() == ""
    monkeypatch.setattr(float32_products, "slow_bfloat16", lambda: True)
    assert torch.equal(float32_products.linear(x, weight), torch.nn.functional.linear(x, weight))


def test_a_whole_process_computes_so_forwards_and_backwards() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", SLOW],
        capture_output=True, text=True, env=dict(os.environ),
    )  # fmt: skip
    assert run.stdout == "good\n", run.stderr


@pytest.mark.parametrize("capability", ["avx2", None])
def test_the_capability_decides(capability: str | None) -> None:
    """ATEN_CPU_CAPABILITY imitates a lesser CPU, so one machine shows both."""
    code = (
        "import torch; from quantkit.backends.process import float32_products as p;"
        "print(p.described(), torch.backends.cpu.get_cpu_capability())"
    )
    env = dict(os.environ)
    env.pop("ATEN_CPU_CAPABILITY", None)
    if capability:
        env["ATEN_CPU_CAPABILITY"] = capability
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
    )
    said = run.stdout.strip()
    assert said == "float32 on avx2 AVX2" or (not capability and said.startswith("AVX512"))


def test_a_result_keeps_how_it_was_computed(tmp_path: Path) -> None:
    Result(ok=True, compute="float32 on avx2").write(tmp_path / "result.json")
    assert Result.read(tmp_path / "result.json").compute == "float32 on avx2"
