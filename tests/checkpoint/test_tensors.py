"""Bytes of tensors on disk: whole, in pieces, their digest, what of them is not finite."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import quantkit
from quantkit.checkpoint.headers import header_bytes, read_header
from quantkit.checkpoint.scan import scan
from quantkit.checkpoint.tensors import (
    PIECE,
    count_nonfinite,
    digest,
    pieces,
    read_tensor,
    torch_dtypes,
)
from quantkit.errors import InputError
from tests.support.families import model

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A tensor of every dtype, one larger than a piece, one empty."""
    torch.manual_seed(0)
    tensors = {str(dtype): torch.randn(5, 3).to(dtype) for dtype in FLOATS}
    tensors |= {str(t): torch.arange(12).to(t) for t in (torch.int64, torch.int32, torch.uint8)}
    tensors["e4m3"] = torch.randn(4, 4).to(torch.float8_e4m3fn)
    tensors["large"] = torch.randn(PIECE // 2 + 7).to(torch.bfloat16)
    tensors["empty"] = torch.empty(0, 4)
    save_file(tensors, tmp_path / "t.safetensors")
    return tmp_path / "t.safetensors"


def test_whole_pieces_and_digest_are_the_same_bytes(file: Path) -> None:
    with safe_open(file, "pt") as library:
        for name, info in read_header(file).items():
            wanted = library.get_tensor(name)
            found = read_tensor(info)
            assert found.dtype == wanted.dtype == torch_dtypes()[info.dtype]
            assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))
            held = b"".join(piece.tobytes() for piece in pieces(info))
            assert held == wanted.view(torch.uint8).numpy().tobytes()
            stated = f"{info.dtype}{list(info.shape)}".encode()
            assert digest(info) == hashlib.sha256(stated + held).hexdigest()


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_what_is_not_finite_is_counted(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.tensor([1.0, -2.0, torch.inf, -torch.inf, torch.nan, 0.0]).to(dtype)
    save_file({"w": values}, tmp_path / "t.safetensors")
    info = read_header(tmp_path / "t.safetensors")["w"]
    assert count_nonfinite(info) == int((~values.float().isfinite()).sum()) > 0


def test_a_file_that_ends_early_is_refused(file: Path) -> None:
    infos = read_header(file)
    file.write_bytes(file.read_bytes()[:-4])
    last = max(infos.values(), key=lambda info: info.end)
    for read in (read_tensor, digest, lambda info: list(pieces(info))):
        with pytest.raises(InputError, match=f"ends inside tensor {last.name}") as caught:
            read(last)
        assert caught.value.code == "checkpoint.truncated"


def test_a_header_that_we_write_is_read_by_the_library(tmp_path: Path) -> None:
    shapes = {"b": ("U8", (3,)), "a": ("F32", (2, 2)), "empty": ("BF16", (0, 4))}
    head, starts = header_bytes(shapes)
    target = tmp_path / "t.safetensors"
    target.write_bytes(head + bytes(16 + 3))
    assert {name: info.start for name, info in read_header(target).items()} == starts
    with safe_open(target, "pt") as library:
        found = {name: library.get_slice(name).get_shape() for name in library.keys()}  # noqa: SIM118
    assert found == {name: list(shape) for name, (_, shape) in shapes.items()}


def test_a_scan_finds_what_the_digests_say(tmp_path: Path) -> None:
    from quantkit.checkpoint.directory import open_checkpoint

    checkpoint = open_checkpoint(model("llama", tmp_path / "m"))
    found = scan(checkpoint)
    assert found.digests == checkpoint.digests()
    assert not found.bad


def test_nobody_else_maps_or_hashes_a_tensors_bytes() -> None:
    package = Path(quantkit.__file__).parent
    found = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("memmap", "readinto", "preadv")
    }
    assert found == {"checkpoint/tensors.py"}
