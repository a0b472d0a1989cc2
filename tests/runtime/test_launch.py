"""The serving command of every layout, as SGLang's and vLLM's documentation has it."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantkit.backends.environments.managed import spec_named
from quantkit.checkpoint.schemes import SCHEMES
from tests.support.cli import quantkit, refused
from tests.support.helpers import edit_json
from tests.support.rtn import rtn

pytestmark = pytest.mark.broad

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
KEPT_IN_16_BIT = [
    f"model.layers.{i}.{name}"
    for i in range(3)
    for name in LINEARS
    if not name.endswith("down_proj")
]
"""All of the demo model but the layer that blocks of 128 divide."""

SIZE = 64
SGLANG = ["python3", "-m", "sglang.launch_server", "--model-path"]


def tensors_of(algorithm: str) -> dict[str, torch.Tensor]:
    """One layer's tensor parts, as ModelOpt (FP8, NVFP4, …) or msModelSlim (W8A8_DYNAMIC) has."""
    codes = torch.randint(-7, 7, (SIZE, SIZE), dtype=torch.int8)
    one, fp8 = torch.tensor(0.5), torch.float8_e4m3fn
    if algorithm == "NVFP4":
        return {
            "weight": codes.view(torch.uint8)[:, : SIZE // 2].contiguous(),
            "weight_scale": torch.ones(SIZE, SIZE // 16).to(fp8),
            "weight_scale_2": one,
            "input_scale": one,
        }
    if algorithm == "W8A8_SQ_PER_CHANNEL":
        return {"weight": codes, "weight_scale": torch.ones(SIZE), "input_scale": one}
    if algorithm == "W8A8_DYNAMIC":
        column = torch.ones(SIZE, 1)
        return {"weight": codes, "weight_scale": column, "weight_offset": torch.zeros(SIZE, 1)}
    return {"weight": codes.float().to(fp8), "weight_scale": one, "input_scale": one}


def tiny(out: Path, algorithm: str) -> Path:
    """A one-layer Llama whose linear layers are quantized; its configuration says nothing yet."""
    out.mkdir()
    parts = tensors_of(algorithm)
    names = [f"model.layers.0.{name}" for name in LINEARS]
    tensors = {f"{name}.{part}": t.clone() for name in names for part, t in parts.items()}
    tensors["model.embed_tokens.weight"] = torch.zeros(32, SIZE)
    tensors["lm_head.weight"] = torch.zeros(32, SIZE)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "llama", "hidden_size": SIZE, "intermediate_size": SIZE, "vocab_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    return out


def modelopt(out: Path, algorithm: str, *, side_file: bool = False, kv_cache: bool = False) -> Path:
    """ModelOpt's: the method in config.json, or, as older exports have it, beside it only."""
    tiny(out, algorithm)
    stated: dict[str, object] = {"quant_algo": algorithm, "exclude_modules": ["lm_head"]}
    stated["kv_cache_quant_algo"] = "FP8" if kv_cache else None
    if algorithm == "NVFP4":
        stated["group_size"] = 16
    if side_file:
        document = {"producer": {"name": "modelopt"}, "quantization": stated}
        (out / "hf_quant_config.json").write_text(json.dumps(document))
    else:
        method = {"quantization_config": {"quant_method": "modelopt", **stated}}
        edit_json(out / "config.json", lambda config: config.update(method))
    return out


def command(directory: Path, *more: str) -> list[str]:
    run = quantkit("launch", directory, *more)
    assert run.code == 0, run.err
    return shlex.split(run.out)


@pytest.mark.parametrize(
    ("scheme", "layout"),
    [
        ("fp8_dynamic", "compressed-tensors"),
        ("w8a8_dynamic", "compressed-tensors"),
        ("w4a16", "gptq"),
        ("w4a16", "awq"),
    ],
)
def test_offline_checkpoints_get_no_quantization_flag(
    small_model: Path, tmp_path: Path, scheme: str, layout: str
) -> None:
    chosen = SCHEMES[scheme]
    if scheme == "w4a16":
        chosen = chosen.with_weight(group_size=64, symmetric=layout == "gptq")
    made = rtn(small_model, tmp_path / "made", chosen, layout=layout)  # type: ignore[arg-type]
    assert command(made, "--engine", "vllm") == ["vllm", "serve", str(made)]
    if layout == "gptq":  # 960 outputs of q, k and v together are no multiple of 64 × 128
        refused(quantkit("launch", made, "--engine", "sglang"), 1, "fits no Marlin tile")
        return
    assert command(made, "--engine", "sglang") == [*SGLANG, str(made)]
    parallel = command(made, "--engine", "sglang", "--tp", "3")
    assert parallel == [*SGLANG, str(made), "--tp-size", "3"]
    refused(quantkit("launch", made, "--engine", "sglang", "--tp", "2"), 1, "will not load it")
    notes = quantkit("launch", made, "--engine", "sglang", "--json").document["notes"]
    own = {"fp8_dynamic": "w8a8_fp8", "w8a8_dynamic": "w8a8_int8"}.get(scheme)
    expected = [f"{shlex.join([*SGLANG, str(made), '--quantization', own])}"] if own else []
    assert [note.partition("(optional): ")[2] for note in notes] == expected


def test_own_kernels_are_not_offered_where_they_would_ignore_kept_layers(
    small_model: Path, tmp_path: Path
) -> None:
    keep = ("model.layers.0.mlp.down_proj",)
    made = rtn(small_model, tmp_path / "made", SCHEMES["fp8_dynamic"], keep=keep)
    assert quantkit("launch", made, "--engine", "sglang", "--json").document["notes"] == []


@pytest.mark.parametrize(
    ("algorithm", "side_file", "flag"),
    [
        ("FP8", True, "modelopt_fp8"),
        ("NVFP4", True, "modelopt_fp4"),
        ("FP8", False, "modelopt"),
        ("NVFP4", False, "modelopt"),
    ],
)
def test_modelopt_names_its_method_for_sglang(
    tmp_path: Path, algorithm: str, side_file: bool, flag: str
) -> None:
    made = modelopt(tmp_path / "made", algorithm, side_file=side_file)
    assert command(made, "--engine", "sglang") == [*SGLANG, str(made), "--quantization", flag]
    assert command(made, "--engine", "vllm") == ["vllm", "serve", str(made)]


def test_a_quantized_kv_cache_is_said(tmp_path: Path) -> None:
    made = modelopt(tmp_path / "made", "FP8", kv_cache=True)
    assert command(made, "--engine", "vllm")[3:] == ["--kv-cache-dtype", "fp8"]
    document = quantkit("launch", made, "--engine", "sglang", "--json").document
    assert document["argv"][5:] == ["--quantization", "modelopt", "--kv-cache-dtype", "fp8_e4m3"]
    assert document["kv_cache_dtype"] == "fp8_e4m3"
    assert document["minimum_version"]


def test_blocks_on_hopper_are_served_with_the_variable_that_keeps_their_scales(
    tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = rtn(small_model, tmp_path / "made", SCHEMES["fp8_block"], keep=KEPT_IN_16_BIT)
    asked = ("launch", made, "--engine", "vllm", "--gpu")
    run = quantkit(*asked, "h100")
    assert run.out.strip() == f"VLLM_USE_DEEP_GEMM_E8M0=0 vllm serve {made}"
    assert "costs accuracy" in run.err
    assert quantkit(*asked, "l40s").out.strip() == f"vllm serve {made}"
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "vllm").write_text("#!/bin/sh\necho $VLLM_USE_DEEP_GEMM_E8M0\n")
    (tmp_path / "vllm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert quantkit(*asked, "h100", "--exec").out.strip() == "0"


def test_an_online_method_is_for_16_bit_models(tmp_path: Path, small_model: Path) -> None:
    for engine, start in (("vllm", ["vllm", "serve"]), ("sglang", SGLANG)):
        asked = command(small_model, "--engine", engine, "--online", "fp8")
        assert asked == [*start, str(small_model), "--quantization", "fp8"]
    made = rtn(small_model, tmp_path / "made", SCHEMES["fp8_dynamic"])
    offline = quantkit("launch", made, "--engine", "vllm", "--online", "fp8")
    refused(offline, 1, "quantized offline (compressed-tensors)", "rounds the weights twice")
    gone = quantkit("launch", small_model, "--engine", "sglang", "--online", "int4wo-128")
    refused(gone, 1, "raises ImportError since April 2026")
    refused(quantkit("launch", small_model, "--engine", "vllm", "--online", "fp9"), 1, "mxfp8")


def test_msmodelslim_gguf_and_16_bit(tmp_path: Path, small_model: Path) -> None:
    slim = tiny(tmp_path / "slim", "W8A8_DYNAMIC")
    names = [f"model.layers.0.{n}.{p}" for n in LINEARS for p in tensors_of("W8A8_DYNAMIC")]
    described = {**dict.fromkeys(names, "W8A8_DYNAMIC"), "lm_head.weight": "FLOAT"}
    described |= {"model.embed_tokens.weight": "FLOAT", "model_quant_type": "W8A8_DYNAMIC"}
    (slim / "quant_model_description.json").write_text(json.dumps(described))
    assert command(slim, "--engine", "sglang") == [*SGLANG, str(slim)]
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "model.gguf").write_bytes(b"GGUF")
    assert command(gguf, "--engine", "sglang") == [*SGLANG, str(gguf / "model.gguf")]
    refused(quantkit("launch", gguf, "--engine", "vllm"), 1, "vLLM does not read the layout gguf")
    assert command(small_model, "--engine", "vllm") == ["vllm", "serve", str(small_model)]


def test_what_no_server_loads_is_refused(tmp_path: Path) -> None:
    made = modelopt(tmp_path / "made", "W8A8_SQ_PER_CHANNEL")
    for engine in ("vllm", "sglang"):
        refused(quantkit("launch", made, "--engine", engine), 1, "has no kernel", "one of: FP8")
    refused(quantkit("launch", made, "--engine", "llama"), 1, "vllm or sglang")
    refused(quantkit("launch", made, "--engine", "vllm", "--tp", "0"), 1, "--tp")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_heads_that_do_not_divide_are_refused_in_16_bit_too(engine: str, small_model: Path) -> None:
    made = quantkit("launch", small_model, "--engine", engine, "--tp", "2")
    refused(made, 1, "cannot share 9 attention heads", "tensor-parallel size 1")


def test_exec_runs_the_argument_list_without_a_shell(
    tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "a model; echo"
    model.symlink_to(small_model)
    refused(quantkit("launch", model, "--engine", "vllm", "--exec"), 3, "quantkit env create vllm")
    place = spec_named("vllm").python.parent
    place.mkdir(parents=True)
    for name in ("python", "vllm"):
        (place / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (place / name).chmod(0o755)
    run = quantkit("launch", model, "--engine", "vllm", "--tp", "3", "--exec")
    assert run.code == 0, run.err
    assert run.out.splitlines() == ["serve", str(model), "--tensor-parallel-size", "3"]


def test_exec_takes_an_engine_of_the_users_own(
    tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "vllm").write_text("#!/bin/sh\necho started $1\n")
    (tmp_path / "vllm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run = quantkit("launch", small_model, "--engine", "vllm", "--exec")
    assert (run.code, run.out) == (0, "started serve\n"), run.err
