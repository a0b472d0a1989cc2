"""The seam to the engines: every failure that threads describe is refused, every twin accepted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.checkpoint.without_weights import open_headers
from quantkit.engines import LayerPart, Loadable, Verdict, judge
from quantkit.engines.complete_settings import completed
from quantkit.pipeline.engine_view import planned, verdicts
from quantkit.pipeline.plan import make_plan
from quantkit.pipeline.request import chosen_recipe
from quantkit.verification import EngineRequest, VerifyReport, verify
from tests.engines.broken_checkpoints import SEEDS, Seed
from tests.engines.refused_plans import DENSE, PLANS, Asked
from tests.support.backends import engine_alarms
from tests.support.families import BASES, INT4, model
from tests.support.helpers import edit_json
from tests.support.rtn import rtn
from tests.support.tokenized_towers import multimodal

pytestmark = pytest.mark.broad

Base = Callable[[str], Path]
USED = sorted({(seed.base, seed.engine) for seed in SEEDS})


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A checkpoint of `BASES`, made on first use."""
    root = tmp_path_factory.mktemp("bases")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = root / name.replace(" ", "-")
            made[name] = BASES[name](folder / "model", folder / "out")
        return made[name]

    return get


def verified(path: Path, engine: str) -> VerifyReport:
    return verify(path, engines=EngineRequest((engine,)))


def test_there_are_forty_of_them_in_several_families() -> None:
    assert len(SEEDS) + len(PLANS) >= 40
    assert len({seed.base.split()[0] for seed in SEEDS}) >= 8
    assert all(seed.thread for seed in SEEDS)
    assert all(case.thread for case in PLANS)


@pytest.mark.parametrize(("name", "engine"), USED, ids=lambda value: str(value))
def test_the_sound_checkpoint_is_accepted(base: Base, name: str, engine: str) -> None:
    report = verified(base(name), engine)
    assert report.ok, report.errors
    assert report.modules_quantized > 0
    assert "engine.loads" in report.codes("info")


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: seed.name)
def test_the_broken_one_is_refused(base: Base, seed: Seed, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(base(seed.base), broken)
    seed.change(broken)
    report = verified(broken, seed.engine)
    assert seed.code in report.codes(), report.errors
    assert all(finding.hint and finding.message for finding in report.errors)


ARTIFACTS = (
    "llmcompressor/fp8_dynamic", "llmcompressor/w8a8", "llmcompressor/w4a16",
    "llmcompressor/w4a16_asym", "llmcompressor/nvfp4", "llmcompressor/mxfp4", "gptqmodel/w4",
    "gptqmodel/w8_v2", "autoround/auto_gptq", "autoround/auto_awq", "autoround/awq",
    "autoround/mxfp4", "modelopt/fp8_kv", "modelopt/fp8_pc_pt", "modelopt/mxfp8", "modelopt/mixed",
)  # fmt: skip
"""What the libraries themselves write, less what gives members of a merged layer two schemes."""

LOADED = {"llmcompressor/fp8_dynamic", "llmcompressor/w8a8", "llmcompressor/w4a16",
          "gptqmodel/w4", "autoround/auto_gptq"}  # fmt: skip
"""Those that vLLM really loads."""


@pytest.mark.parametrize("name", ARTIFACTS)
def test_what_libraries_write_raises_no_alarm(artifact: Base, name: str) -> None:
    assert not engine_alarms(artifact(name), "vllm", names_only=name not in LOADED)


@pytest.mark.parametrize("name", ["llmcompressor/fp8_dynamic", "modelopt/mixed"])
def test_completed_lists_are_understood_by_every_engine(
    artifact: Base, name: str, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact(name), copy)
    assert any("engine.ignore_" in alarm for alarm in engine_alarms(copy, "sglang"))
    for file in ("config.json", "hf_quant_config.json"):
        if (copy / file).is_file():
            edit_json(copy / file, complete)
    assert not engine_alarms(copy, "vllm", "sglang")


def complete(document: dict[str, Any]) -> None:
    whole = dict(document)
    if "quantization_config" in document:
        settings = completed(document["quantization_config"], whole)
        document["quantization_config"] = settings
    else:
        document.update(completed(document, whole))


def judged(config: dict[str, Any], method: str, flags: tuple[str, ...], at: Path) -> list[Verdict]:
    """The verdicts of `quantkit plan` on a config.json without weights."""
    at.mkdir()
    (at / "config.json").write_text(json.dumps(config))
    pairs = list(zip(flags[::2], flags[1::2], strict=True))
    named = {flag: value for flag, value in pairs if flag != "--set"}
    serve = [f"serve.engines=[{named['--engine']}]", f"serve.tp=[{named.get('--tp', 1)}]"]
    serve += [f"serve.gpu={named['--gpu']}"] if "--gpu" in named else []
    sets = [value for flag, value in pairs if flag == "--set"]
    source = open_headers(at)
    return verdicts(source, make_plan(source, chosen_recipe(method, "", "", [*sets, *serve])))


@pytest.mark.parametrize("case", PLANS, ids=lambda case: case.name)
def test_the_plan_is_refused_and_its_twin_is_not(case: Asked, tmp_path: Path) -> None:
    (verdict,) = judged(case.config, case.method, case.flags, tmp_path / "refused")
    assert not verdict.loads
    assert case.code in {reason.code for reason in verdict.reasons}
    assert all(reason.fix for reason in verdict.reasons)
    flags = case.flags if case.twin_flags is None else case.twin_flags
    method = case.twin_method or case.method
    (twin,) = judged(case.config | case.twin, method, flags, tmp_path / "accepted")
    assert twin.loads, twin.reasons


def test_layers_outside_of_the_blocks_that_autoround_names_are_not_quantized(
    tmp_path: Path,
) -> None:
    """vLLM 0.26 on an H200 loaded the checkpoint that the plan had refused."""
    source = multimodal("idefics3", tmp_path / "model")
    recipe = chosen_recipe("autoround_w4a16", "", "", ["group_size=64", "serve.engines=[vllm]"])
    checkpoint = open_headers(source)
    plan = make_plan(checkpoint, recipe)
    assert planned(checkpoint, plan).settings["block_name_to_quantize"] == "model.text_model.layers"
    (verdict,) = verdicts(checkpoint, plan)
    assert verdict.loads, verdict.reasons


def test_a_plan_says_what_differs_where_the_engine_has_the_scheme(tmp_path: Path) -> None:
    (verdict,) = judged(DENSE, "modelopt_mxfp8", ("--engine", "sglang"), tmp_path / "model")
    (reason,) = verdict.reasons
    assert "weight_scale_inv" in reason.message
    assert "no kernel" not in reason.message


def modelopt_mixed(*algorithms: str) -> Loadable:
    """q, k and v in the first, the output projection in the last algorithm."""
    kinds = [*[algorithms[0]] * 3, algorithms[-1]]
    names = [f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"]
    schemes = {"FP8": SCHEMES["fp8"], "NVFP4": SCHEMES["nvfp4"]}
    listed = {name: {"quant_algo": kind} for name, kind in zip(names, kinds, strict=True)}
    listed["model.layers.0.self_attn.qkv_proj"] = {"quant_algo": algorithms[0]}
    settings = {"quant_algo": "MIXED_PRECISION", "quantized_layers": listed, "ignore": ["lm_head"]}
    parts = {
        name: LayerPart(name, "linear", (4096, 4096), schemes[kind], kind)
        for name, kind in zip(names, kinds, strict=True)
    }
    return Loadable(DENSE, "modelopt", settings, parts)


def test_sglang_reads_mixed_precision_only_with_an_nvfp4_layer() -> None:
    (refused,) = judge(modelopt_mixed("FP8", "FP8"), ("sglang",), (1,))
    assert [reason.code for reason in refused.reasons] == ["engine.scheme"]
    assert "NVFP4" in refused.reasons[0].message
    assert all(v.loads for v in judge(modelopt_mixed("FP8", "NVFP4"), ("sglang", "vllm"), (1,)))
    assert all(v.loads for v in judge(modelopt_mixed("FP8", "FP8"), ("vllm",), (1,)))


@pytest.mark.parametrize(
    ("config", "flags", "size"),
    [
        ({"intermediate_size": 11008}, ("--engine", "vllm", "--tp", "8"), 32),
        ({"intermediate_size": 11008}, ("--engine", "vllm", "--tp", "4"), 64),
        ({"intermediate_size": 11008}, ("--engine", "vllm", "--tp", "4,8"), 32),
        ({"intermediate_size": 13696}, ("--engine", "vllm", "--tp", "8"), None),
        ({}, ("--engine", "sglang", "--set", "group_size=256"), 128),
        ({}, ("--engine", "vllm,sglang", "--set", "group_size=512"), 128),
    ],
)
def test_a_group_size_that_is_advised_is_accepted(
    config: dict[str, Any], flags: tuple[str, ...], size: int | None, tmp_path: Path
) -> None:
    """11008 / 8 = 1376 = 43 × 32; 13696 / 8 = 1712 = 107 × 16, and no kernel has groups of 16."""
    found = judged({**DENSE, **config}, "rtn_w4a16", flags, tmp_path / "asked")
    fixes = {reason.fix for verdict in found for reason in verdict.reasons}
    if size is None:
        assert fixes == {"a smaller tensor-parallel size, or keep this layer in 16 bit"}
        return
    assert fixes == {f"--set group_size={size}"}
    advised = (*flags, "--set", f"group_size={size}")
    again = judged({**DENSE, **config}, "rtn_w4a16", advised, tmp_path / "advised")
    assert all(verdict.loads for verdict in again), again


@pytest.mark.parametrize(("family", "loads"), [("glm4", False), ("phi3", True)])
def test_vllm_looks_for_the_members_of_a_layer_stored_merged(
    family: str, loads: bool, tmp_path: Path
) -> None:
    """vLLM's GLM-4 is merged from gate_proj and up_proj, which a GPTQ file does not name."""
    made = rtn(model(family, tmp_path / "m"), tmp_path / "o", INT4, layout="gptq")
    codes = verified(made, "vllm").codes()
    assert ("engine.ignore_overreach" in codes) is not loads
    assert verified(made, "sglang").ok


def test_what_to_change_is_named_as_the_layout_names_it() -> None:
    parts = modelopt_mixed("FP8", "NVFP4")
    listed = dict(parts.settings["quantized_layers"])
    del listed["model.layers.0.self_attn.o_proj"]
    less = replace(parts, settings={**parts.settings, "quantized_layers": listed})
    (verdict,) = judge(less, ("vllm",), (1,))
    (reason,) = verdict.reasons
    assert reason.code == "engine.ignore_overreach"
    assert "quantized_layers" in reason.fix
    assert "targets" not in reason.fix
