"""A mixture whose experts all stay in 16 bit, named one by one: no engine may stop at the list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from quantkit.backends.registry import load_recipe
from quantkit.checkpoint.directory import Checkpoint, TensorInfo
from quantkit.checkpoint.schemes import SCHEMES
from quantkit.engines import LayerPart, Loadable, judge
from quantkit.engines.aliases import expanded
from quantkit.formats import compressed_tensors_config
from quantkit.formats.base import LayerSpec
from quantkit.pipeline.engine_view import ignore_list
from quantkit.pipeline.plan import make_plan
from quantkit.verification import EngineRequest, verify
from tests.support.helpers import edit_json, edit_tensors
from tests.support.rtn import rtn

Json = dict[str, Any]
CONFIG: Json = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 256,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64, "num_hidden_layers": 1,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "vocab_size": 256,
    "tie_word_embeddings": False,
}  # fmt: skip
BLOCK = "model.layers.0.mlp.experts"
ATTENTION = [f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkvo"]
EXPERTS = [f"{BLOCK}.{n}.{leaf}_proj" for n in range(4) for leaf in ("gate", "up", "down")]
KEPT = ["lm_head", "model.layers.0.mlp.gate", *EXPERTS]
SCHEME = {"compressed-tensors": "fp8_dynamic", "modelopt": "fp8", "auto-round": "w4a16"}
PACKING = {"compressed-tensors": "float-quantized", "modelopt": "FP8", "auto-round": "gptq"}
FIRST_EXPERT = f"{BLOCK}.0."


def settings(layout: str, ignore: list[str]) -> Json:
    scheme = SCHEMES[SCHEME[layout]]
    if layout == "compressed-tensors":
        spec = LayerSpec(scheme, PACKING[layout], (256, 256))
        written = compressed_tensors_config.quantization_config(
            dict.fromkeys(ATTENTION, spec), ignore
        )
        for group in written["config_groups"].values():
            group["targets"] = ["Linear"]
        return written
    if layout == "modelopt":
        return {"quant_method": layout, "quant_algo": "FP8", "ignore": ignore}
    extra = {name: {"bits": 16, "data_type": "float"} for name in ignore}
    return {
        "quant_method": layout, "bits": 4, "group_size": 128, "sym": True, "extra_config": extra,
    }  # fmt: skip


def codes(layout: str, ignore: list[str], engine: str, quantized: tuple[str, ...] = ()) -> set[str]:
    scheme, parts = SCHEMES[SCHEME[layout]], {}
    for name in [*ATTENTION, *KEPT]:
        kind: Any = {"lm_head": "head", "model.layers.0.mlp.gate": "router"}.get(name, "linear")
        held = name in ATTENTION or name in quantized
        shape = (256, 256)
        packing = PACKING[layout] if held else ""
        parts[name] = LayerPart(name, kind, shape, scheme if held else None, packing)
    loadable = Loadable(CONFIG, layout, settings(layout, ignore), parts)
    return {reason.code for v in judge(loadable, (engine,), (1,)) for reason in v.reasons}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("layout", SCHEME)
def test_all_experts_by_their_full_names(layout: str, engine: str) -> None:
    assert not codes(layout, expanded(KEPT, CONFIG), engine)
    if (layout, engine) != ("modelopt", "sglang"):  # which asks for the block's name alone
        assert not codes(layout, KEPT, engine)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_list_without_a_layer_of_the_experts_is_refused(engine: str) -> None:
    partial = [name for name in KEPT if not name.endswith(".up_proj")]
    found = codes("compressed-tensors", expanded(partial, CONFIG), engine)
    assert "engine.ignore_partial" in found


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("layout", SCHEME)
def test_a_list_of_some_experts_is_refused(layout: str, engine: str) -> None:
    rest = tuple(name for name in EXPERTS if not name.startswith(FIRST_EXPERT))
    partial = [name for name in KEPT if name not in rest]
    listed = expanded(partial, CONFIG)
    assert BLOCK not in listed
    assert "engine.mixed_experts" in codes(layout, listed, engine, rest)


@pytest.mark.parametrize("extra", [{}, {f"{FIRST_EXPERT}gate_proj": {"bits": 4}}])
def test_autoround_takes_entries_that_agree_for_one(extra: Json) -> None:
    written = settings("auto-round", KEPT)
    written["extra_config"] |= extra
    parts = {name: LayerPart(name, "linear", (256, 256)) for name in EXPERTS}
    loadable = Loadable(CONFIG, "auto-round", written, parts)
    found = {r.code for v in judge(loadable, ("vllm", "sglang"), (1,)) for r in v.reasons}
    assert ("engine.ignore_partial" in found) == bool(extra)


def test_granites_experts_are_listed_by_the_engines_names() -> None:
    block = "model.layers.0.block_sparse_moe"
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (256, 256),
        **{f"{name}.weight": (256, 256) for name in ATTENTION},
        f"{block}.router.layer.weight": (4, 256),
        f"{block}.input_linear.weight": (4, 256, 256),
        f"{block}.output_linear.weight": (4, 256, 128),
        "model.layers.0.shared_mlp.input_linear.weight": (256, 256),
        "model.norm.weight": (256,),
    }
    file = Path("model.safetensors")
    tensors = {name: TensorInfo(name, "BF16", shape, file, 0, 2) for name, shape in shapes.items()}
    config = {
        **CONFIG, "model_type": "granitemoeshared",
        "architectures": ["GraniteMoeSharedForCausalLM"],
        "tie_word_embeddings": True, "num_local_experts": 4,
    }  # fmt: skip
    source = Checkpoint(Path(), config, tensors)
    plan = make_plan(source, load_recipe("rtn_fp8_dynamic", ("ignore+=@experts",)))
    listed = ignore_list(source, plan.kept)
    asked = [f"{block}.experts.0.{leaf}_proj" for leaf in ("gate", "up", "down")]
    assert {f"{block}.input_linear", f"{block}.experts", *asked} <= set(listed)
    assert not any("shared_mlp.experts" in name for name in listed)
    assert expanded(listed, config) == listed
    scheme = SCHEMES["fp8_dynamic"]
    parts = {
        m.name: LayerPart(
            m.name, m.kind, m.shape, scheme if m.name in plan.layers else None, "float-quantized"
        )
        for m in source.modules
        if len(m.shape) > 1
    }
    for ignore, loads in ((listed, True), ([n for n in listed if n not in asked], False)):
        written = settings("compressed-tensors", ignore)
        loadable = Loadable(config, "compressed-tensors", written, parts)
        for verdict in judge(loadable, ("vllm", "sglang"), (1,)):
            assert verdict.loads == loads, (verdict.reasons, verdict.unknown)


@pytest.mark.parametrize("listed", [False, True])
def test_a_16_bit_draft_layer_is_neither_quantized_nor_loaded(tmp_path: Path, listed: bool) -> None:
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    sizes |= {"vocab_size": 128, "num_attention_heads": 2}
    network = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes))  # type: ignore[no-untyped-call]
    network.bfloat16().save_pretrained(tmp_path / "model")
    out = rtn(tmp_path / "model", tmp_path / "out", SCHEMES["fp8_dynamic"])
    (out / "model.safetensors.index.json").unlink(missing_ok=True)
    next(out.glob("*.safetensors")).rename(out / "model.safetensors")
    draft = {"mtp.fc.weight": (64, 128), "mtp.layers.0.mlp.down_proj.weight": (64, 128)}
    added = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in draft.items()}
    edit_tensors(out, lambda tensors: tensors.update(added))

    def declare(config: Json) -> None:
        config["mtp_num_hidden_layers"] = 1
        quantization = config["quantization_config"]
        quantization["config_groups"]["group_0"]["targets"] = ["Linear"]
        if listed:
            quantization["ignore"] += [name.removesuffix(".weight") for name in draft]

    edit_json(out / "config.json", declare)
    report = verify(out, engines=EngineRequest(("vllm", "sglang"), (1,)))
    codes = {finding.code for finding in report.findings}
    assert ("declared.not_quantized" in codes) != listed
    assert ("engine.loads" in codes) == listed
    assert "structure.mtp_quantized" not in codes
