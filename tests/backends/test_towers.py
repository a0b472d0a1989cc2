"""Models with towers through the libraries: the language model is quantized, and nothing else."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from quantkit.backends.registry import backend_named, load_recipe
from quantkit.backends.registry.towers import towers
from quantkit.calibration.pictures import draw
from quantkit.checkpoint.directory import open_checkpoint, read_json
from quantkit.checkpoint.wrap_vision import wrap_vision
from quantkit.errors import InputError
from quantkit.pipeline import quantize as pipeline
from quantkit.pipeline.request import Outcome, Request
from quantkit.verification import verify
from tests.support.cli import inside
from tests.support.helpers import copy_checkpoint, edit_json
from tests.support.in_process import CALIBRATION, Quiet, without_workers
from tests.support.tokenized_towers import FAMILIES, multimodal

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own, in this process

FEW = (
    "calibration.name=quick.yaml", "calibration.samples=4", "calibration.sequence_length=64",
    "on_misfit=keep16",
)  # fmt: skip
METHODS = {
    "modelopt": ("modelopt_fp8", "modelopt_nvfp4"),
    "llmcompressor": (
        "llmcompressor_fp8_dynamic",
        "llmcompressor_w4a16",
        "llmcompressor_w8a8",
        "llmcompressor_nvfp4",
    ),
    "gptqmodel": ("gptqmodel_w4a16",),
    "autoround": ("autoround_w4a16",),
}
QUICK = {"autoround": ("options.iters=1",)}
WAYS = (
    (),
    ("experts=routed", "on_unseen=rtn"),
    ("ignore+=@experts",),
    (r"ignore+=re:.*layers\.1\..*",),
)
"""What to ask for, where the plan refuses all experts, or layers that texts do not reach."""
TOWERS = ("--set", "targets+=@towers", "--set", 'ignore=["@head", "@embeddings"]')
TEXT = "calibrated with text only"


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library in this process, on texts that need no package."""
    (tmp_path / "quick.yaml").write_text(CALIBRATION)
    monkeypatch.chdir(tmp_path)
    with without_workers():
        yield
    gc.collect()  # GPTQModel's temporary folders, while their warnings are ignored


@pytest.fixture(scope="module")
def wrapped(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of the demo model behind a vision tower."""
    return wrap_vision(small_model, tmp_path_factory.mktemp("towers") / "wrapped")


def asked(source: Path, out: Path, method: str, *sets: str) -> Request:
    chosen = load_recipe(method)
    calibration = FEW if chosen.calibration else FEW[3:]
    quick = QUICK.get(chosen.backend, ())
    recipe = load_recipe(method, (*calibration, *quick, *sets))
    return Request(str(source), recipe, out, device="cpu")


def made(source: Path, out: Path, method: str, *sets: str) -> Outcome:
    return pipeline.quantize(asked(source, out, method, *sets), Quiet())


def way(source: Path, out: Path, method: str) -> tuple[str, ...]:
    """The first of `WAYS` that the plan does not refuse; its last refusal where it refuses all."""
    for sets in WAYS:
        try:
            pipeline.plan_only(asked(source, out, method, *sets))
        except InputError as error:
            refused = error
        else:
            return sets
    raise refused


def check_rest(source: Path, out: Path) -> None:
    """What is no linear layer of the decoder is there bit by bit, under the same name, but for the
    norms of folds; so are the files of tokenizer and processor. GPTQ's layout has the biases of its
    layers in float16."""
    before, after = open_checkpoint(source), open_checkpoint(out)
    kept = {m.tensor for m in before.modules if m.kind not in ("linear", "experts")}
    kept |= before.tensors.keys() - {m.tensor for m in before.modules}
    packed = {name.removesuffix("qweight") for name in after.tensors if name.endswith(".qweight")}
    kept -= {f"{module}bias" for module in packed}
    folds = read_json(out / "quantkit.json")["folds"] or {}
    kept -= {f"{norm}.weight" for norm in folds.get("norm", ())}
    assert kept <= after.tensors.keys()
    assert not [name for name in kept if before.digest(name) != after.digest(name)]
    for path in before.sidecars():
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_of_an_opened_tower_the_linear_layers_are_quantized(wrapped: Path, tmp_path: Path) -> None:
    assert inside("quantize", wrapped, "--method", "rtn_fp8_dynamic", *TOWERS,
                  "--out", tmp_path / "out")[0] == 0  # fmt: skip
    before, after = open_checkpoint(wrapped), open_checkpoint(tmp_path / "out")
    changed = {
        module.name
        for module in before.modules
        if before.digest(module.tensor) != after.digest(module.tensor)
    }
    tower = {name for name in changed if not name.startswith("model.text_model.layers.")}
    assert len(changed) == 34
    assert len(tower) == 13  # two layers of six, and the projector
    assert not [name for name in tower if "embed" in name]
    assert verify(tmp_path / "out", wrapped).ok


@pytest.mark.library
@pytest.mark.parametrize("method", [m for methods in METHODS.values() for m in methods])
@pytest.mark.usefixtures("quick")
def test_only_the_language_model_is_quantized(method: str, wrapped: Path, tmp_path: Path) -> None:
    sets = ("group_size=64",) if "w4a16" in method else ()
    outcome = made(wrapped, tmp_path / "out", method, *sets)
    assert all(name.startswith("model.text_model.layers.") for name in outcome.plan.layers)
    assert len(outcome.plan.layers) == 21
    check_rest(wrapped, outcome.out)
    told = [note for note in outcome.provenance.notes if note.startswith(TEXT)]
    assert bool(told) == outcome.plan.method.calibrated
    assert (TEXT in (outcome.out / "README.md").read_text()) == bool(told)
    assert verify(outcome.out, wrapped).ok
    assert verify(outcome.out).ok


@pytest.mark.library
@pytest.mark.parametrize("family", ["gemma3", "llava"])
@pytest.mark.usefixtures("quick")
def test_autoround_names_layers_and_blocks_as_the_checkpoint_does(
    family: str, tmp_path: Path
) -> None:
    """In memory gemma3's are model.language_model.layers, and llava's head lm_head."""
    source = multimodal(family, tmp_path / "source")
    outcome = made(source, tmp_path / "out", "autoround_w4a16")
    settings = json.loads((outcome.out / "config.json").read_text())["quantization_config"]
    assert settings["block_name_to_quantize"] == "language_model.model.layers"
    assert not list(outcome.out.glob("*extra*"))
    check_rest(source, outcome.out)
    outcome = made(source, tmp_path / "awq", "autoround_w4a16", "options.format=auto_awq")
    settings = json.loads((outcome.out / "config.json").read_text())["quantization_config"]
    listed = settings["modules_to_not_convert"]
    assert any(name.startswith("vision_tower.") for name in listed)
    assert not [name for name in listed if name.endswith(".layers")]
    assert settings["to_quant_block_names"] == "language_model.model.layers"


@pytest.mark.library
@pytest.mark.parametrize("family", ["llama4", "mistral3", "qwen2_5_vl", "smolvlm"])
@pytest.mark.usefixtures("quick")
def test_gptqmodel_takes_rows_of_tokens(family: str, tmp_path: Path) -> None:
    """The library's definitions load a processor, which needs torchvision or num2words; Llama 4 and
    Mistral 3 go through it with their weights in memory alone."""
    source = multimodal(family, tmp_path / "source")
    outcome = made(source, tmp_path / "out", "gptqmodel_w4a16")
    assert len(outcome.plan.layers) == (38 if family == "llama4" else 14)
    check_rest(source, outcome.out)
    assert verify(outcome.out, source).ok


MIXED = """\
sources:
  - type: pictures
  - type: stdlib
    part: topics
"""
"""Half of the samples are conversations about drawn pictures."""

ROWS = """\
short: pad
sources:
  - type: file
    path: rows.jsonl
    turn_fields: [q, a]
    image_field: image
"""


@pytest.mark.library
@pytest.mark.parametrize(
    "method", ["modelopt_fp8", "llmcompressor_w4a16", "llmcompressor_nvfp4", "llmcompressor_fp8"]
)
@pytest.mark.usefixtures("quick")
def test_pictures_and_texts_calibrate_together(method: str, wrapped: Path, tmp_path: Path) -> None:
    (tmp_path / "mixed.yaml").write_text(MIXED)
    sets = ["calibration.name=mixed.yaml", "calibration.sequence_length=128"]
    if method == "llmcompressor_w4a16":
        sets.append("group_size=64")
    outcome = made(wrapped, tmp_path / "out", method, *sets)
    assert len(outcome.plan.layers) == 21
    check_rest(wrapped, outcome.out)
    assert verify(outcome.out, wrapped).ok
    assert not [note for note in outcome.provenance.notes if note.startswith(TEXT)]


def both(source: Path, out: Path, *asked: str) -> tuple[int, str, str]:
    """What `plan` says, which is what `quantize` says."""
    told = inside("plan", source, *asked)
    if told[0]:
        assert inside("quantize", source, *asked, "--out", out) == told
        assert not out.exists()
    return told


def test_what_smooths_cannot_mix_pictures_and_texts(wrapped: Path, tmp_path: Path) -> None:
    mixed, alike = tmp_path / "mixed.yaml", tmp_path / "alike.yaml"
    mixed.write_text(MIXED)
    alike.write_text("sources:\n  - type: pictures\n")

    def told(method: str, calibration: Path, *sets: str) -> tuple[int, str, str]:
        every = (f"calibration.name={calibration}", *FEW[1:3], "group_size=64", *sets)
        asked = [word for one in every for word in ("--set", one)]
        return both(wrapped, tmp_path / "out", "--method", method, *asked)

    refused = told("llmcompressor_w4a16", mixed, "options.smoothing_strength=0.8")
    assert refused[:2] == (1, "llmcompressor.mixed_samples")
    assert "only some have pictures" in refused[2]
    assert told("llmcompressor_w4a16", mixed)[0] == 0
    assert told("llmcompressor_w4a16", alike, "options.smoothing_strength=0.8")[0] == 0


@pytest.mark.library
@pytest.mark.usefixtures("quick")
def test_a_file_with_pictures_in_some_rows_is_refused_in_the_same_words(
    wrapped: Path, tmp_path: Path
) -> None:
    """The plan does not read the rows of a file."""
    Image.fromarray(draw(7, 0).pixels).save(tmp_path / "0.png")
    rows = [{"q": "What is shown?", "a": "A drawing. " * 9, "image": "0.png"},
            {"q": "Who wrote this?", "a": "A test did, and nobody else. " * 9}]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    (tmp_path / "rows.yaml").write_text(ROWS)
    sets = ("calibration.name=rows.yaml", "calibration.sequence_length=128")
    with pytest.raises(InputError) as caught:
        made(wrapped, tmp_path / "out", "llmcompressor_w8a8", *sets)
    assert caught.value.code == "llmcompressor.mixed_samples"
    assert not (tmp_path / "out").exists()
    recipe = load_recipe("llmcompressor_w8a8")
    assert backend_named("llmcompressor").mixed_pictures(recipe) == caught.value.message  # type: ignore[misc]


def test_what_cannot_be_done_is_refused_in_the_plan(wrapped: Path, tmp_path: Path) -> None:
    out, fp8 = tmp_path / "out", ("--method", "modelopt_fp8")
    told = both(wrapped, out, "--method", "msmodelslim_w8a16")
    assert told[:2] == (1, "plan.architecture")
    assert "a vision or audio tower" in told[2]
    told = both(wrapped, out, *fp8, *TOWERS)
    assert told[:2] == (1, "plan.unseen_layers")
    data_free = ("--method", "llmcompressor_fp8_dynamic", *TOWERS)
    assert both(wrapped, out, *data_free)[0] == 0
    across = multimodal("mllama", tmp_path / "mllama")
    told = both(across, out, *fp8)
    assert told[:2] == (1, "plan.unseen_layers")
    assert "model.layers.1.cross_attn" in told[2]
    assert both(across, out, *fp8, "--set", r"ignore+=re:.*layers\.1\..*")[0] == 0


def test_a_family_that_nobody_tried_is_told(wrapped: Path, tmp_path: Path) -> None:
    unknown = copy_checkpoint(wrapped, tmp_path / "unknown")
    edit_json(unknown / "config.json", lambda config: config.update(model_type="a_new_one"))
    recipe = load_recipe("modelopt_fp8")
    _, plan = pipeline.plan_only(Request(str(unknown), recipe, tmp_path / "out", device="cpu"))
    assert any("was not tried with a_new_one" in note for note in plan.notes)
    _, plan = pipeline.plan_only(Request(str(wrapped), recipe, tmp_path / "out", device="cpu"))
    assert not any("was not tried" in note for note in plan.notes)
    assert any(note.startswith(TEXT) for note in plan.notes)
    few = ("--method", "autoround_w4a16", "--set", "group_size=64")
    told = both(unknown, tmp_path / "out", *few)
    assert told[:2] == (1, "plan.architecture")
    assert "only a few were tried" in told[2]


@pytest.mark.slow
@pytest.mark.library
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("backend", sorted(METHODS))
@pytest.mark.usefixtures("quick")
def test_the_table_says_what_the_library_does(backend: str, family: str, tmp_path: Path) -> None:
    source = multimodal(family, tmp_path / "source")
    known = towers()[backend]
    refused = family in known.cannot or (family not in known.takes and bool(known.others))
    if family not in known.takes and not refused:
        pytest.skip(f"nobody tried {backend} with {family}, and plans say so")
    for method in METHODS[backend]:
        out = tmp_path / method
        if refused or load_recipe(method).scheme in known.schemes.get(family, {}):
            with pytest.raises(InputError) as refusal:
                made(source, out, method)
            assert refusal.value.code == "plan.architecture"
            continue
        made(source, out, method, *way(source, out, method))
        check_rest(source, out)
