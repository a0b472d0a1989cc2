"""Routing agreement: whether the experts that compute a token are those of the baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.checkpoint.upcycle import upcycle
from quantkit.recipe.gates import parse_gate
from quantkit.runtime.load import load
from quantkit.validation.judge.chosen import measurable
from quantkit.validation.judge.default_gates import default_gates
from quantkit.validation.reports.html import as_html
from quantkit.validation.reports.markdown import as_markdown
from quantkit.validation.subjects.builtin import Builtin
from tests.support.helpers import edit_tensors
from tests.support.mixtures import mixture
from tests.support.rtn import rtn
from tests.support.validating import damaged, measured, verdicts

pytestmark = pytest.mark.broad

IDS = np.random.default_rng(0).integers(3, 96, (2, 16))


@pytest.mark.parametrize("family", ["mixtral", "llama4_text"])
def test_what_is_seen_is_what_the_router_of_transformers_chooses(
    family: str, tmp_path: Path
) -> None:
    path = mixture(family, tmp_path / family)
    subject = Builtin(load(path, dtype="float32"), 0)
    with subject.watch_routers() as routes:
        assert len(list(subject.logits(IDS))) == 1
    found = routes.table(IDS)
    subject.runtime(torch.from_numpy(IDS))  # after the watch nothing is noted
    assert found is not None
    assert found.shape == (2, 2, 16, 2 if family == "mixtral" else 1)
    theirs: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    chosen: list[torch.Tensor] = []
    for layer in theirs.model.layers:
        router = layer.feed_forward.router if family == "llama4_text" else layer.mlp.gate
        router.register_forward_hook(
            lambda module, _, given: chosen.append(given[0 if module.top_k > 1 else 1])
        )
    with torch.inference_mode():
        theirs(torch.from_numpy(IDS))
    wanted = [logits.topk(found.shape[-1]).indices.sort(-1).values.numpy() for logits in chosen]
    assert np.array_equal(found, np.stack(wanted).reshape(found.shape))


@pytest.fixture(scope="module")
def moe(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Three layers as a mixture of four experts, and the same in 8 bits."""
    root = tmp_path_factory.mktemp("moe")
    source = upcycle(small_model, root / "source", 4)
    return source, rtn(source, root / "fp8", SCHEMES["fp8_dynamic"])


def permute(path: Path) -> None:
    """Shuffle every router's rows against its experts."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(".gate.weight")]:
            tensors[name] = tensors[name].roll(1, 0)

    edit_tensors(path, change)


def test_a_sound_mixture_passes_and_a_permuted_router_fails(
    moe: tuple[Path, Path], tmp_path: Path
) -> None:
    source, made = moe
    sound = measured(made, source, samples=8)
    assert verdicts(sound)["routing_agreement"] == "pass"
    document = sound.to_json()
    assert [row["layer"] for row in document["routing"]] == [0, 1, 2]
    worst = min(row["agreement"] for row in document["routing"])
    assert document["metrics"]["routing_agreement"]["value"] == pytest.approx(worst)
    assert "layers with the lowest routing agreement" in as_markdown(document)
    page = as_html(document)
    assert "Routing agreement, layer by layer" in page
    assert f"{worst:.1%}" in page
    broken = measured(damaged(made, tmp_path / "broken", permute), source, samples=8)
    assert verdicts(broken)["routing_agreement"] == "fail"


def test_routers_that_cannot_be_seen_are_not_gated(tmp_path: Path) -> None:
    subject = Builtin(load(mixture("jetmoe", tmp_path / "jetmoe")), 0)
    with subject.watch_routers() as routes:
        list(subject.logits(IDS))
    assert routes.table(IDS) is None
    asked = parse_gate("routing_agreement>=0.9")
    kept, notes = measurable(
        [*default_gates({"fp8_dynamic"}, 2), asked], {"routing_agreement": "nobody knows"}
    )
    assert [gate for gate in kept if gate.metric == "routing_agreement"] == [asked]
    assert notes == ["routing_agreement is not gated: nobody knows"]


def test_a_dense_model_has_no_such_gate(small_model: Path, sealed: Path) -> None:
    report = measured(sealed, small_model, samples=2)
    assert "routing_agreement" not in {*verdicts(report), *report.metrics}
    assert report.to_json()["routing"] == []
