"""Pictures in a validation: what is asked, and what a damaged tower or projector is found by."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from quantkit.backends.registry import load_recipe
from quantkit.checkpoint.schemes import SCHEMES
from quantkit.checkpoint.wrap_vision import TOKENS, wrap_vision
from quantkit.recipe.gates import parse_gate
from quantkit.validation.ask.cachefile import BaselineCache
from quantkit.validation.ask.picture_prompts import (
    MOST,
    SEED,
    PicturePrompt,
    PicturePrompts,
    picture_prompts,
)
from quantkit.validation.ask.pictures import (
    CannotLookError,
    PictureAnswers,
    QuantizedPictures,
    measure_baseline,
    measure_quantized,
)
from quantkit.validation.judge.chosen import askable
from quantkit.validation.judge.default_gates import default_gates
from quantkit.validation.judge.metrics import OF_LOGITS
from quantkit.validation.judge.pictures import OF_PICTURES, by_picture, picture_metrics
from quantkit.validation.preflight import Candidate, open_candidate, tokenizer_of
from quantkit.validation.reports.html import as_html
from quantkit.validation.reports.markdown import as_markdown
from quantkit.validation.subjects.base import Opening
from quantkit.validation.subjects.builtin import open_builtin
from quantkit.verification import verify
from tests.support.cli import inside
from tests.support.damage import Tensors, patching
from tests.support.helpers import copy_checkpoint, edit_json, edit_tensors
from tests.support.rtn import rtn
from tests.support.validating import SOBER, damaged, measured, verdicts

CONNECTOR = "model.connector.modality_projection.proj.weight"
GROUPED = SCHEMES["w4a16"].with_weight(granularity="group", group_size=64)


@pytest.fixture(scope="module")
def source(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wrap_vision(small_model, tmp_path_factory.mktemp("pictures") / "source")


@pytest.fixture(scope="module")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """8 and 4 bits, its tower in 16."""
    root = tmp_path_factory.mktemp("quantized")
    schemes = {"8": SCHEMES["fp8_dynamic"], "4": GROUPED}
    return {bits: rtn(source, root / bits, scheme) for bits, scheme in schemes.items()}


def asked(candidate: Candidate, count: int = 3, engine: str = "builtin") -> PicturePrompts:
    return picture_prompts(candidate, engine, tokenizer_of(candidate.baseline.path), count, 2048)


def test_both_models_are_asked_the_same_of_the_same_pixels(
    source: Path, quantized: dict[str, Path]
) -> None:
    candidate = open_candidate(quantized["8"], str(source))
    found, again = asked(candidate), asked(candidate)
    assert not found.why
    assert found.digest == again.digest
    assert asked(candidate, MOST + 5).digest != found.digest
    assert len(asked(candidate, MOST + 5).prompts) == MOST
    tokenizer = tokenizer_of(source)
    for prompt in found.prompts:
        assert prompt.inputs["pixel_values"].shape == (1, 1, 3, 64, 64)
        before, after = prompt.ids[: -prompt.words], prompt.ids[-prompt.words :]
        assert tokenizer.decode(before).count("<image>") == TOKENS
        assert "<image>" not in tokenizer.decode(after)
        assert prompt.question in tokenizer.decode(after)
        assert prompt.answer in tokenizer.decode(after)
    pixels = [prompt.inputs["pixel_values"] for prompt in found.prompts]
    assert not np.array_equal(pixels[0], pixels[1])
    assert SEED > 10**6  # calibrations count up from small seeds


def test_what_cannot_be_shown_is_said_in_words(
    source: Path, quantized: dict[str, Path], small_model: Path, checkpoints: dict[str, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    text_only = asked(open_candidate(checkpoints["8"], str(small_model)))
    assert text_only == PicturePrompts()
    candidate = open_candidate(quantized["8"], str(source))
    assert asked(candidate, engine="vllm").why == "vllm is shown no pictures here"
    bare = copy_checkpoint(source, tmp_path / "bare")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (bare / name).unlink()
    assert "cannot prepare pictures" in asked(open_candidate(quantized["8"], str(bare))).why
    odd = copy_checkpoint(source, tmp_path / "odd")
    edit_json(odd / "preprocessor_config.json", lambda config: config.update(image_mean="red"))
    told = asked(open_candidate(quantized["8"], str(odd)))
    assert told.why.startswith("the processor cannot prepare pictures: ")
    assert not told.prompts


def words(*counts: int) -> PicturePrompts:
    return PicturePrompts(tuple(PicturePrompt("?", ".", [0] * 9, {}, n) for n in counts))


def answers(kl: NDArray[np.float64], agrees: NDArray[np.bool_]) -> QuantizedPictures:
    return QuantizedPictures(kl.astype(np.float32), agrees, None)


def test_every_picture_counts_as_much_whatever_is_said_of_it() -> None:
    prompts = words(*[1, 3] * 4)
    kl = np.array([0.4, 0.1, 0.2, 0.3] * 4)
    said = answers(kl, kl < 0.35)
    assert by_picture(prompts.prompts, kl).tolist() == pytest.approx([0.4, 0.2] * 4)
    found = picture_metrics(prompts, PictureAnswers(said, said), answers(kl / 2, kl < 9))
    assert found.keys() == set(OF_PICTURES)
    assert found["image_kl_mean"].value == pytest.approx(0.3)
    assert found["image_top1_agreement"].value == pytest.approx(0.5)
    assert found["image_kl_of_rtn"].value == pytest.approx(2)
    assert "does not show" in found["image_embedding_error"].why
    cached = picture_metrics(
        prompts, PictureAnswers(said, answers(kl / 4, kl < 9)), answers(kl / 2, kl < 9)
    )
    assert cached["image_kl_of_rtn"].value == pytest.approx(0.5)  # its cache costs the rest
    assert picture_metrics(prompts, PictureAnswers(said, said), "why")["image_kl_of_rtn"].why


def test_gates_of_pictures_are_those_of_models_with_towers() -> None:
    assert not [g for g in default_gates({"w4a16"}) if g.metric.startswith("image_")]
    for schemes, limit in ((set(), 0.01), ({"fp8_dynamic"}, 0.1), ({"fp8_dynamic", "w4a16"}, 0.5)):
        gates = {g.metric: g.limit for g in default_gates({"w4a16"}, tower_schemes=schemes)}
        assert gates["image_embedding_error"] == limit
        assert gates["image_kl_mean"] == 0.6
    large = default_gates({"w4a16"}, parameters=8 * 134_515_008, tower_schemes=())
    assert parse_gate("image_kl_mean<=0.3") in large
    left, notes = askable(large, "vllm")
    assert {g.metric for g in large} - {g.metric for g in left} > {"image_kl_mean"}
    assert any("vllm is shown no pictures" in note for note in notes)
    assert not set(OF_PICTURES) & set(OF_LOGITS)


def test_what_was_measured_behind_a_tower_holds_the_gates() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "towers.md").read_text(encoding="utf-8")
    _, table, _ = page.split("<!-- wrapped_methods.py -->")
    head, _, _, *rows = [line for line in table.splitlines() if line.startswith("|")]
    names = [name.strip(" `") for name in head.split("|")]
    assert len(rows) >= 9
    for row in rows:
        cells = dict(zip(names, (cell.strip(" `") for cell in row.split("|")), strict=True))
        scheme = load_recipe(cells["method"]).scheme
        limits = {g.metric: g.limit for g in default_gates({scheme}, tower_schemes=())}
        for metric in ("image_kl_mean", "image_kl_of_rtn", "image_embedding_error"):
            assert float(cells[metric]) <= limits[metric], row


def test_the_baseline_is_itself(source: Path, quantized: dict[str, Path]) -> None:
    prompts = asked(open_candidate(quantized["8"], str(source))).prompts
    subject = open_builtin(source, Opening("cpu"))
    said = measure_baseline(subject, prompts, None)
    assert len(said.first) == sum(prompt.words for prompt in prompts)
    again = measure_quantized(subject, prompts, said, None)
    assert again.errors is not None
    assert not again.errors.any()
    assert again.agrees.all()
    assert float(np.abs(again.kl).max()) < 1e-5


def test_a_baseline_that_refuses_what_its_processor_makes_is_told(
    source: Path, quantized: dict[str, Path]
) -> None:
    (prompt,) = asked(open_candidate(quantized["8"], str(source)), 1).prompts
    subject = open_builtin(source, Opening("cpu"))
    grey = {**prompt.inputs, "pixel_values": prompt.inputs["pixel_values"][:, :, :1]}
    with pytest.raises(CannotLookError, match="the baseline cannot look at pictures: "):
        measure_baseline(subject, [replace(prompt, inputs=grey)], None)


def scale_tower(path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith("model.vision_model.")]:
            tensors[name] = tensors[name] * 1.5

    edit_tensors(path, change)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "projector replaced": patching(CONNECTOR, lambda t: t.flip(0)),
    "tower scaled": scale_tower,
    "one layer of the tower scaled": patching(
        "model.vision_model.encoder.layers.1.mlp.fc1.weight", lambda t: t * 1.5
    ),
}


@pytest.mark.engine
@pytest.mark.parametrize("bits", [pytest.param("8", marks=pytest.mark.slow), "4"])
def test_a_sound_checkpoint_holds_the_gates_of_pictures(
    bits: str, source: Path, quantized: dict[str, Path]
) -> None:
    report = measured(quantized[bits], source, "mcq_drop<=1", "ppl_ratio<=inf")
    found = verdicts(report)
    gated = {m: v for m, v in found.items() if m.startswith("image_")}
    assert gated == dict.fromkeys(
        ("image_kl_mean", "image_kl_of_rtn", "image_embedding_error"), "pass"
    )
    assert report.ok, found
    assert report.metrics["image_kl_of_rtn"].value == pytest.approx(1, abs=1e-6)
    assert report.metrics["image_embedding_error"].value == 0
    document = report.to_json()
    images = document["images"]
    assert len(images["kl"]) == len(images["agreement"]) == len(images["answers"]) == 8
    assert np.mean(images["kl"]) == pytest.approx(document["metrics"]["image_kl_mean"]["value"])
    assert re.search(r"pictures with the largest KL\n\n\| question \|", as_markdown(document))
    page = as_html(document)
    assert "<h2>Pictures</h2>" in page
    assert images["questions"][int(np.argmax(images["kl"]))].replace("'", "&#39;") in page


@pytest.mark.engine
@pytest.mark.parametrize("bits", [pytest.param("8", marks=pytest.mark.slow), "4"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tower_or_projector_fails(
    damage: str, bits: str, source: Path, quantized: dict[str, Path], tmp_path: Path
) -> None:
    copy = damaged(quantized[bits], tmp_path / "copy", DAMAGES[damage])  # type: ignore[arg-type]
    report = measured(copy, source)
    found = verdicts(report)
    assert not report.ok
    assert found["image_embedding_error"] == found["verify_errors"] == "fail"
    assert found["kl_of_rtn"] == found["weight_sqnr_margin"] == "pass"  # text tells nothing
    if damage == "projector replaced":
        assert found["image_kl_of_rtn"] == "fail"


@pytest.mark.engine
def test_the_command_writes_it_all(source: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "r.json"
    assert inside("quantize", source, "--method", "rtn_fp8_dynamic", "--out", out)[0] == 0
    told = inside(
        "validate", out, "--baseline", source, "--samples", "8", "--no-throughput", "--gate", SOBER,
        "--gate", "image_top1_agreement>=0.9", "--broken-baseline", "--report", report,
    )  # fmt: skip
    assert told[0] == 0, told
    document = json.loads(report.read_text())
    kept = json.loads((out / "quantkit.json").read_text())["results"]["validation"]
    for name in OF_PICTURES:
        assert kept["metrics"][name] == document["metrics"][name]
        assert document["metrics"][name]["interval"] is not None
    value = document["metrics"]["image_kl_mean"]["value"]
    row = f"| KL divergence of the words that follow a picture, mean | {value:.4f} nats |"
    assert row in (out / "README.md").read_text()
    assert verify(out, source).ok


@pytest.mark.engine
def test_the_baseline_looks_at_pictures_once(
    source: Path, quantized: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    held: list[str] = []
    real = BaselineCache.holds

    def holds(self: BaselineCache, name: str, question: str) -> bool:
        held.append(f"{name} {real(self, name, question)}")
        return real(self, name, question)

    monkeypatch.setattr(BaselineCache, "holds", holds)
    one = measured(quantized["8"], source, samples=2)
    two = measured(quantized["8"], source, samples=2)
    assert "rounded-pictures True" in held
    assert one.metrics["image_kl_mean"] == two.metrics["image_kl_mean"]
    names = {path.name.split("-")[0] for path in (tmp_path / "cache" / "validate").glob("*/*")}
    assert "pictures" in names


@pytest.mark.engine
def test_a_processor_that_fails_leaves_the_text_gates(
    source: Path, quantized: dict[str, Path], tmp_path: Path
) -> None:
    pair = [copy_checkpoint(path, tmp_path / path.name) for path in (source, quantized["8"])]
    for path in pair:
        edit_json(path / "preprocessor_config.json", lambda config: config.update(image_mean="red"))
    report = measured(pair[1], pair[0], "image_top1_agreement>=0.5", samples=2)
    image = {m: v for m, v in verdicts(report).items() if m.startswith("image_")}
    assert image == {"image_top1_agreement": "undecided"}  # asked for, and not measured
    assert not report.ok
    (note,) = [note for note in report.notes if note.startswith("image_kl_mean and")]
    assert "are not gated: the processor cannot prepare pictures" in note
    assert report.to_json()["images"] is None
