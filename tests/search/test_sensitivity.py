"""The estimates of `analyze` against what single groups really cost, and the command itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

import quantkit
from quantkit.checkpoint.directory import Checkpoint, open_checkpoint
from quantkit.checkpoint.schemes import SCHEMES
from quantkit.errors import InputError
from quantkit.validation.ask.data import eval_text
from quantkit.validation.ask.text import BaselineText, measure_baseline, measure_quantized
from quantkit.validation.preflight import tokenizer_of
from quantkit.validation.search.analyze import fitting
from quantkit.validation.search.cost import affordable, limit
from quantkit.validation.search.groups import Group, fusable_groups, schemes_named
from quantkit.validation.search.sensitivity import Measured, measure
from quantkit.validation.subjects.base import Opening
from quantkit.validation.subjects.builtin import open_builtin
from tests.support.cli import inside, said
from tests.support.mixtures import mixture
from tests.support.rtn import rtn
from tests.support.tiny import byte_llama

pytestmark = pytest.mark.broad

TITLES = ["fp8_dynamic", "w4a16:64"]


class Quiet:
    """A reporter that nobody listens to."""

    def stage(self, name: str, total: int = 0, unit: str = "steps") -> None: ...
    def advance(self, done: int) -> None: ...
    def note(self, text: str) -> None: ...


@pytest.fixture(scope="module")
def source(small_model: Path) -> Checkpoint:
    return open_checkpoint(small_model)


@pytest.fixture(scope="module")
def windows(small_model: Path) -> NDArray[np.int64]:
    return eval_text(None, tokenizer_of(small_model), 8, 128).windows


@pytest.fixture(scope="module")
def baseline(source: Checkpoint, windows: NDArray[np.int64]) -> BaselineText:
    return measure_baseline(open_builtin(source.path, Opening("cpu")), windows, None)


@pytest.fixture(scope="module")
def measured(source: Checkpoint, windows: NDArray[np.int64]) -> Measured:
    groups, schemes = fusable_groups(source, "vllm"), schemes_named(TITLES)
    fits = {group.name: fitting(group, schemes) for group in groups}
    return measure(source, groups, fits, windows, device="cpu", seed=0, ui=Quiet())


def test_groups_are_those_that_the_engine_fuses(source: Checkpoint) -> None:
    groups = fusable_groups(source, "vllm")
    assert [group.name.rpartition(".")[2] for group in groups[:4]] == [
        "down_proj", "gate_up_proj", "qkv_proj", "o_proj",
    ]  # fmt: skip
    assert [len(group.modules) for group in groups] == [1, 2, 3, 1] * 3
    assert [group.layer for group in groups] == [0] * 4 + [1] * 4 + [2] * 4
    linear = [m for m in source.modules if m.kind == "linear"]
    assert sum(group.weights for group in groups) == sum(m.shape[0] * m.shape[1] for m in linear)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("model.layers.0.mlp.gate_up_proj", "w4a16:64"),
        ("model.layers.1.self_attn.qkv_proj", "w4a16:64"),
        ("model.layers.2.mlp.down_proj", "w4a16:64"),
    ],
)
def test_an_estimate_is_near_what_the_group_alone_costs(
    name: str, title: str, source: Checkpoint, windows: NDArray[np.int64], measured: Measured,
    baseline: BaselineText, tmp_path: Path,
) -> None:  # fmt: skip
    (group,) = (one for one in fusable_groups(source, "vllm") if one.name == name)
    inside = {module.name for module in group.modules}
    others = {module.name for module in source.modules} - inside
    scheme = schemes_named([title])[title]
    made = rtn(source.path, tmp_path / "one", scheme, keep=others)
    text = measure_quantized(open_builtin(made, Opening("cpu")), windows, baseline, None)
    assert text.kl is not None
    (cell,) = (one for one in measured.cells if (one.group, one.scheme) == (name, title))
    assert cell.kl == pytest.approx(float(text.kl.mean()), rel=0.4)


def test_fewer_bits_cost_more(measured: Measured) -> None:
    by_scheme = {
        title: {cell.group: cell for cell in measured.cells if cell.scheme == title}
        for title in TITLES
    }
    assert len(by_scheme[TITLES[0]]) == 12
    for name, eight in by_scheme["fp8_dynamic"].items():
        four = by_scheme["w4a16:64"][name]
        assert 0 < eight.error < four.error
        assert 0 < eight.kl < four.kl
        assert eight.bits > 1.8 * four.bits


def test_layers_that_are_read_one_by_one_give_the_same(tmp_path: Path) -> None:
    source = open_checkpoint(byte_llama(tmp_path / "llama", hidden=128, wide=256))
    groups, schemes = fusable_groups(source, "vllm"), schemes_named(["nvfp4", "w4a16:64"])
    fits = {group.name: fitting(group, schemes) for group in groups}
    ids = np.random.default_rng(0).integers(3, 250, (4, 64))
    whole, streamed = (
        measure(source, groups, fits, ids, device="cpu", seed=0, ui=Quiet(), streamed=one)
        for one in (False, True)
    )
    assert len(whole.cells) == 16
    assert streamed.cells == whole.cells


@pytest.mark.parametrize("titles", [["w4a16:64"], ["nvfp4", "w8a8", "w4a16:64", *TITLES[:1]]])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_the_products_are_counted_and_keep_the_limit(
    kind: str, titles: list[str], tmp_path: Path
) -> None:
    made = (byte_llama(tmp_path / kind, hidden=128, wide=512) if kind == "llama"
            else mixture(kind, tmp_path / kind))  # fmt: skip
    source = open_checkpoint(made)
    groups, schemes = fusable_groups(source, "vllm"), schemes_named(titles)
    fits = {group.name: fitting(group, schemes) for group in groups}
    ids = np.random.default_rng(0).integers(3, 250, (8, 32))
    windows = affordable(ids, len(titles))
    with FlopCounterMode(display=False) as counter:
        found = measure(source, groups, fits, windows, device="cpu", seed=0, ui=Quiet())
    products = (torch.ops.aten.mm, torch.ops.aten.addmm)
    seen = sum(counter.get_flop_counts()["Global"].get(one, 0) for one in products) // 2
    routers = 0 if kind == "llama" else 0.005  # theirs are too small to count
    assert seen * (1 - routers) <= found.products <= seen
    passes = found.products / found.forward_products * windows.size / ids.size
    assert 0.5 * limit(len(titles)) < passes <= limit(len(titles))


@pytest.mark.parametrize("schemes", [1, 2, 5, 20])
@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_the_windows_that_are_measured_are_those_that_can_be_paid(schemes: int, count: int) -> None:
    ids = np.arange(count * 10).reshape(count, 10)
    taken = affordable(ids, schemes)
    assert taken.size * (schemes + 3) <= ids.size * limit(schemes) + 1e-9
    assert set(taken.flat) <= set(ids.flat)
    assert len(np.unique(taken)) == taken.size >= 2
    if schemes >= 10:
        assert taken.size == ids.size


def test_a_scheme_takes_the_largest_group_that_fits(source: Checkpoint) -> None:
    groups = {group.name: group for group in fusable_groups(source, "vllm")}

    def size(group: Group, scheme: str) -> int | None:
        found = group.fitted(SCHEMES[scheme])
        return found.weight.group_size if found else None

    assert size(groups["model.layers.0.self_attn.qkv_proj"], "w4a16") == 64
    assert size(groups["model.layers.0.mlp.down_proj"], "w4a16") == 128
    assert size(groups["model.layers.0.self_attn.qkv_proj"], "nvfp4") == 16


@pytest.mark.parametrize("kind", ["qwen3_moe", "granitemoe", "deepseek_v3"])
def test_the_experts_of_a_layer_are_one_group(kind: str, tmp_path: Path) -> None:
    source = open_checkpoint(mixture(kind, tmp_path / kind))
    groups, schemes = fusable_groups(source, "vllm"), schemes_named(TITLES)
    fits = {group.name: fitting(group, schemes) for group in groups}
    ids = np.random.default_rng(0).integers(0, 250, (4, 64))
    found = measure(source, groups, fits, ids, device="cpu", seed=0, ui=Quiet())
    experts = [group for group in groups if group.experts]
    assert experts
    assert len({group.layer for group in experts}) == len(experts)
    kl = {(cell.group, cell.scheme): cell.kl for cell in found.cells}
    for group in groups:
        assert 0 < kl[group.name, "fp8_dynamic"] < kl[group.name, "w4a16:64"]


def test_the_command_writes_its_reports(tmp_path: Path) -> None:
    llama = byte_llama(tmp_path / "llama", hidden=128, wide=256)
    page, data = tmp_path / "a.html", tmp_path / "a.json"
    code, told = said(
        "analyze", llama, "--schemes", "w4a16", "--samples", "1", "--report", page,
        "--report", data,
    )  # fmt: skip
    assert code == 0, told
    assert "8 groups" in told
    document: dict[str, Any] = json.loads(data.read_text())
    assert document["kind"] == "quantkit.sensitivity"
    saved = document["whole"]["w4a16"]["bytes_saved"]
    assert saved == sum(g["schemes"]["w4a16"]["bytes_saved"] for g in document["groups"])
    text = page.read_text()
    assert text.count("<svg") == 2
    assert "model.layers.0.mlp.gate_up_proj" in text
    assert "src=" not in text
    assert "http://" not in text.replace("http://www.w3.org", "")


@pytest.mark.parametrize(
    ("schemes", "code"),
    [("w4a17", "search.unknown_scheme"), ("fp8_dynamic:32", "search.group_size"),
     ("w4a16:4", "search.group_size"), ("", "search.no_scheme")],
)  # fmt: skip
def test_schemes_that_are_none_are_refused(schemes: str, code: str, small_model: Path) -> None:
    assert inside("analyze", small_model, "--schemes", schemes)[1] == code


def test_a_quantized_model_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="quantized already") as caught:
        quantkit.analyze(checkpoints["8"])
    assert caught.value.code == "search.quantized"
