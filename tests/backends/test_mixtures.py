"""Mixtures of experts through the libraries: what `mixtures.yaml` says of them is what they do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quantkit import plan
from quantkit.backends.process.job import JobError
from quantkit.backends.registry import load_recipe
from quantkit.backends.registry.mixtures import mixtures
from quantkit.calibration import build_tokens, load_calibration
from quantkit.checkpoint.network.fused_experts import expert_block
from quantkit.errors import CheckError, InputError
from quantkit.pipeline import quantize as pipeline
from quantkit.pipeline.request import Outcome, Request
from quantkit.verification import verify
from tests.support.cli import inside
from tests.support.damage import dropping, patching, swapping
from tests.support.helpers import copy_checkpoint, edit_json, edit_tensors
from tests.support.in_process import CALIBRATION, Quiet, without_workers
from tests.support.mixtures import EXPERTS, MIXTURES, mixture

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own, in this process

SAMPLES, LENGTH = 4, 64
FEW = (
    "calibration.name=quick.yaml", f"calibration.samples={SAMPLES}",
    f"calibration.sequence_length={LENGTH}", "on_misfit=keep16",
)  # fmt: skip
OWN = {"autoround_w4a16": ("options.iters=1", "experts=all")}
"""Settings that make a method quick, or ask of it what it may not be able to do."""
TRIED = {"autoround": ("autoround_w4a16",), "gptqmodel": ("gptqmodel_w4a16",)}
"""What only the table is held against here: `test_integer_mixtures.py` has more of them."""
METHODS = {
    "modelopt": ("modelopt_fp8", "modelopt_nvfp4"),
    "llmcompressor": ("llmcompressor_fp8_dynamic", "llmcompressor_nvfp4", "llmcompressor_w4a16"),
}
BLOCK = "model.layers.0.block_sparse_moe"
FIRST = f"{BLOCK}.experts.0"


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library in this process, on texts that need no package."""
    (tmp_path / "quick.yaml").write_text(CALIBRATION)
    monkeypatch.chdir(tmp_path)
    with without_workers():
        yield


def made(source: Path, out: Path, method: str, *sets: str) -> Outcome:
    recipe = load_recipe(method, (*FEW, *OWN.get(method, ()), *sets))
    return pipeline.quantize(Request(str(source), recipe, out, device="cpu"), Quiet())


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture("mixtral", tmp_path_factory.mktemp("mixtures") / "mixtral")


def check_coverage(outcome: Outcome) -> None:
    """Every expert of every layer saw every token, whatever the router sent to it."""
    experts = outcome.provenance.experts
    assert experts is not None
    assert experts.seen
    assert {count for block in experts.seen.values() for count in block} == {SAMPLES * LENGTH}
    routed = [count for block in experts.routed.values() for count in block]
    assert not routed or min(routed) < SAMPLES * LENGTH  # GPTQModel runs no router of a last layer


@pytest.mark.library
@pytest.mark.parametrize("method", [m for methods in METHODS.values() for m in methods])
@pytest.mark.usefixtures("quick")
def test_a_mixture_keeps_its_names_and_calibrates_every_expert(
    method: str, mixtral: Path, tmp_path: Path
) -> None:
    outcome = made(mixtral, tmp_path / "out", method)
    if outcome.plan.method.calibrated:
        check_coverage(outcome)
    tensors = load_file(outcome.out / "model.safetensors")
    modules = {name.rpartition(".")[0] for name in tensors}
    assert {f"{FIRST}.{leaf}" for leaf in ("w1", "w2", "w3")} <= modules
    assert not any("gate_proj" in name or "gate_up" in name for name in tensors)
    assert tensors[f"{BLOCK}.gate.weight"].dtype == torch.bfloat16
    settings = json.loads((outcome.out / "config.json").read_text())["quantization_config"]
    assert f"{BLOCK}.gate" in settings["ignore"]
    for shared in ("input_scale", "weight_scale_2", "weight_global_scale", "input_global_scale"):
        if f"{FIRST}.w1.{shared}" in tensors:
            assert tensors[f"{FIRST}.w1.{shared}"].equal(tensors[f"{FIRST}.w3.{shared}"])


@pytest.mark.library
@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "phimoe", "qwen3_moe"])
@pytest.mark.usefixtures("quick")
def test_no_token_sees_those_after_it_while_llmcompressor_calibrates(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modeling = import_module(f"transformers.models.{family}.modeling_{family}")
    attend, masks = modeling.eager_attention_forward, []

    def watched(module: Any, q: Any, k: Any, v: Any, mask: torch.Tensor, **more: Any) -> Any:
        masks.append(mask)
        return attend(module, q, k, v, mask, **more)

    source = mixture(family, tmp_path / "source")
    monkeypatch.setattr(modeling, "eager_attention_forward", watched)
    outcome = made(source, tmp_path / "out", "llmcompressor_nvfp4")
    assert masks
    after = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    for mask in masks:
        assert mask[:, :, after].max() < -1e30
        assert not mask[..., 0].any()
    assert "attn_implementation" not in json.loads((outcome.out / "config.json").read_text())


@pytest.mark.library
@pytest.mark.usefixtures("quick")
def test_experts_only_leaves_attention_in_16_bit(mixtral: Path, tmp_path: Path) -> None:
    outcome = made(mixtral, tmp_path / "out", "modelopt_nvfp4_experts_only")
    check_coverage(outcome)
    assert all(".experts." in name for name in outcome.plan.layers)
    tensors = load_file(outcome.out / "model.safetensors")
    assert tensors["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    assert tensors[f"{FIRST}.w1.weight"].dtype == torch.uint8


@pytest.mark.library
@pytest.mark.usefixtures("quick")
def test_experts_in_nvfp4_and_attention_in_fp8(mixtral: Path, tmp_path: Path) -> None:
    mix = 'overrides=[{"match": "@attention", "scheme": "fp8"}]'
    outcome = made(mixtral, tmp_path / "out", "llmcompressor_nvfp4", mix)
    check_coverage(outcome)
    tensors = load_file(outcome.out / "model.safetensors")
    assert tensors["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn
    assert tensors[f"{FIRST}.w1.weight_packed"].dtype == torch.uint8
    groups = json.loads((outcome.out / "config.json").read_text())["quantization_config"]
    targets = [name for group in groups["config_groups"].values() for name in group["targets"]]
    assert set(targets) >= set(outcome.plan.layers)
    asked = plan(mixtral, method="llmcompressor_nvfp4", set=[*FEW, mix], engine="vllm,sglang")
    vllm, sglang = asked.verdicts
    assert vllm.loads
    assert "to the targets of its config group" in sglang.reasons[0].fix
    with pytest.raises(InputError, match="modelopt recipes have one scheme"):
        made(mixtral, tmp_path / "none", "modelopt_nvfp4", mix)


@pytest.mark.library
@pytest.mark.parametrize("width", [128, 256], ids=["square", "wide"])
@pytest.mark.usefixtures("quick")
def test_experts_of_a_kind_of_their_own_stay_whole(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ModelOpt would take DBRX's apart, and multiply with them the wrong way round."""
    whole = MIXTURES["dbrx"]
    ffn = {**whole["ffn_config"], "ffn_hidden_size": width}
    monkeypatch.setitem(MIXTURES, "dbrx", {**whole, "ffn_config": ffn})
    source = mixture("dbrx", tmp_path / "dbrx")
    outcome = made(source, tmp_path / "out", "modelopt_fp8")
    assert set(outcome.plan.layers) == {
        f"transformer.blocks.{block}.norm_attn_norm.attn.{leaf}"
        for block in range(2)
        for leaf in ("Wqkv", "out_proj")
    }
    before, after = (load_file(f / "model.safetensors") for f in (source, outcome.out))
    experts = [name for name in before if ".experts." in name]
    assert len(experts) == 6
    assert all(after[name].equal(before[name]) for name in experts)
    assert verify(outcome.out, source).ok
    # The range of what comes out of the experts of the first block into the second's attention.
    sizes: dict[str, object] = {"samples": SAMPLES, "sequence_length": LENGTH}
    tokens = build_tokens(load_calibration("quick.yaml", sizes), source)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    layer = "transformer.blocks.1.norm_attn_norm.attn.Wqkv"
    largest: list[float] = []
    model.get_submodule(layer).register_forward_pre_hook(
        lambda _, args: largest.append(float(args[0].abs().max()))
    )
    with torch.no_grad():
        model(input_ids=load_file(tokens.path)["input_ids"])
    assert float(after[f"{layer}.input_scale"]) == pytest.approx(largest[0] / 448, rel=0.05)


def starve(model: Path) -> None:
    """A router that sends every token to the experts 0 and 1 of the first layer."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        gate = tensors[f"{BLOCK}.gate.weight"]
        tensors[f"{BLOCK}.gate.weight"] = torch.zeros_like(gate)

    edit_tensors(model, change)


@pytest.mark.library
@pytest.mark.usefixtures("quick")
def test_an_expert_without_a_token_is_refused_unless_decided(mixtral: Path, tmp_path: Path) -> None:
    starved = copy_checkpoint(mixtral, tmp_path / "starved")
    starve(starved)
    with pytest.raises(InputError) as refusal:
        made(starved, tmp_path / "out", "modelopt_fp8", "experts=routed")
    assert refusal.value.code == "calibration.experts_unseen"
    assert f"{BLOCK}.experts" in refusal.value.message
    assert not (tmp_path / "out").exists()

    check_coverage(made(starved, tmp_path / "all", "modelopt_fp8"))

    outcome = made(starved, tmp_path / "rtn", "modelopt_fp8", "experts=routed", "on_unseen=rtn")
    assert outcome.provenance.experts is not None
    assert outcome.provenance.experts.decided == "rtn"
    assert len(outcome.provenance.experts.under_floor) == 2

    outcome = made(starved, tmp_path / "kept", "modelopt_fp8", "experts=routed", "on_unseen=keep16")
    assert outcome.provenance.experts is not None
    assert outcome.provenance.experts.decided == "keep16"
    kept = outcome.plan.kept
    assert {n for n in kept if ".experts." in n} == {
        f"{BLOCK}.experts.{i}.{leaf}" for i in range(EXPERTS) for leaf in ("w1", "w2", "w3")
    }


@pytest.mark.library
@pytest.mark.usefixtures("quick")
def test_damaged_experts_are_found(mixtral: Path, tmp_path: Path) -> None:
    out = made(mixtral, tmp_path / "out", "modelopt_fp8").out
    second = f"{BLOCK}.experts.1"

    def permute(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(f"{FIRST}.")]:
            other = second + name[len(FIRST) :]
            tensors[name], tensors[other] = tensors[other], tensors[name]

    def duplicate(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(f"{second}.")]:
            tensors[name] = tensors[FIRST + name[len(second) :]].clone()

    def quantized_router(directory: Path) -> None:
        edit_tensors(
            directory,
            lambda t: t.update({f"{BLOCK}.gate.weight": t[f"{BLOCK}.gate.weight"].to(
                torch.float8_e4m3fn), f"{BLOCK}.gate.weight_scale": torch.tensor(1.0),
                f"{BLOCK}.gate.input_scale": torch.tensor(1.0)}),
        )  # fmt: skip

        def undeclare(document: dict[str, Any]) -> None:
            inner = document.get("quantization_config") or document["quantization"]
            for key in ("ignore", "exclude_modules"):
                if key in inner:
                    inner[key] = [e for e in inner[key] if e != f"{BLOCK}.gate"]

        for name in ("config.json", "hf_quant_config.json"):
            edit_json(directory / name, undeclare)

    damages: dict[str, tuple[Callable[[Path], object], bool]] = {
        "one expert with another's weights": (lambda d: edit_tensors(d, duplicate), False),
        "w1 and w3 exchanged": (swapping(f"{FIRST}.w1", f"{FIRST}.w3"), False),
        "a scale × 1.5": (patching(f"{FIRST}.w1.weight_scale", lambda t: t * 1.5), False),
        "an expert left out": (dropping(f"{second}."), True),
        "a router quantized": (quantized_router, True),
        "experts permuted against the router": (lambda d: edit_tensors(d, permute), False),
    }
    for name, (damage, tells_itself) in damages.items():
        broken = copy_checkpoint(out, tmp_path / "broken")
        damage(broken)
        sealed = verify(broken)
        assert not sealed.ok, name  # quantkit.json has the digests
        (broken / "quantkit.json").unlink()
        assert not verify(broken, mixtral).ok, name
        alone = verify(broken)
        if tells_itself:
            assert not alone.ok, name
        for path in sorted(broken.iterdir()):
            path.unlink()
        broken.rmdir()


def test_a_mixture_is_refused_by_the_table_before_anything_is_loaded(tmp_path: Path) -> None:
    unknown = mixture("mixtral", tmp_path / "unknown")
    edit_json(unknown / "config.json", lambda c: c.update(model_type="a_new_mixture"))
    told = inside("plan", unknown, "--method", "modelopt_fp8")
    assert told[:2] == (1, "plan.architecture")
    assert "was not tried with the experts of a_new_mixture" in told[2]
    assert inside("quantize", unknown, "--method", "modelopt_fp8", "--out", tmp_path / "o") == told
    scaled = mixture("llama4_text", tmp_path / "llama4")
    told = inside("plan", scaled, "--method", "modelopt_fp8")
    assert told[:2] == (1, "plan.architecture")
    assert "--set experts=routed" in told[2]
    assert inside("plan", scaled, "--method", "modelopt_fp8", "--set", "experts=routed")[0] == 0


@pytest.mark.slow
@pytest.mark.library
@pytest.mark.parametrize("family", sorted(MIXTURES))
@pytest.mark.parametrize("backend", sorted(METHODS | TRIED))
@pytest.mark.usefixtures("quick")
def test_the_table_says_what_the_library_does(backend: str, family: str, tmp_path: Path) -> None:
    source = mixture(family, tmp_path / "source")
    known = mixtures()[backend]
    for method in (METHODS | TRIED)[backend]:
        out = tmp_path / method
        refused_scheme = load_recipe(method).scheme in known.schemes.get(family, {})
        if family in known.calibrates and not refused_scheme:
            outcome = made(source, out, method)
            assert any(map(expert_block, outcome.plan.layers))
            if outcome.plan.method.calibrated:
                check_coverage(outcome)
            continue
        listed = (known.calibrates, known.routed, known.cannot, known.whole)
        if not any(family in names for names in listed):  # in no form that is quantized
            assert not any(map(expert_block, made(source, out, method).plan.layers))
            continue
        with pytest.raises(InputError) as refusal:
            made(source, out, method)
        assert refusal.value.code == "plan.architecture"
        if family in known.routed:
            assert made(source, out, method, "experts=routed", "on_unseen=rtn").provenance.experts
            continue
        # Without the table the library fails, or its result does not verify.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "refuse_beyond_dense", lambda *_: None)
            with pytest.raises((Exception, JobError, CheckError)):
                made(source, out, method)
