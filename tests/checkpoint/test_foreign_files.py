"""Model directories as people have them: foreign files, adapters, leftovers, GGUF, caches."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from quantkit.backends.registry import load_recipe
from quantkit.checkpoint.directory import Checkpoint, open_checkpoint
from quantkit.checkpoint.gguf import open_gguf
from quantkit.checkpoint.hub import open_for_plan, resolve_model
from quantkit.errors import InputError
from quantkit.formats.registry import detect
from quantkit.pipeline.plan import Plan, make_plan
from quantkit.pipeline.quantize import quantize
from quantkit.pipeline.request import Request
from quantkit.verification import verify
from quantkit.verification.files.sidecars import check_alone
from tests.support.helpers import edit_json, edit_tensors

pytestmark = pytest.mark.broad

TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128,
    "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "someone/base-7b"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = hf.LlamaForCausalLM(hf.LlamaConfig(**TINY))  # type: ignore[no-untyped-call]
    network.bfloat16().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def planned(path: Path) -> tuple[Checkpoint, Plan]:
    source = open_for_plan(str(path))
    return source, make_plan(source, load_recipe("rtn_fp8_dynamic"))


def fails(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        planned(path)
    return caught.value


def follow(hint: str, **environment: str) -> None:
    command = hint[hint.index(": ") + 2 :]
    subprocess.run(shlex.split(command), check=True, env={**os.environ, **environment})


def lora(file: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file({f"{name}A.weight": torch.ones(4, 64), f"{name}B.weight": torch.ones(64, 4)}, file)


def set_config(path: Path, **changes: Any) -> None:
    edit_json(path / "config.json", lambda config: config.update(changes))


@pytest.mark.parametrize(
    "name", ["consolidated", "model.fp16", "adapter_model", "adapters", "ema", "._model", ".tmp"]
)
def test_without_an_index_model_safetensors_alone_is_the_model(model: Path, name: str) -> None:
    before, plan = planned(model)
    assert not plan.notes
    lora(model / f"{name}.safetensors")
    source, plan = planned(model)
    assert source.tensors == before.tensors
    told = [note for note in plan.notes if f"{name}.safetensors left aside" in note]
    assert len(told) == (0 if name.startswith(".") else 1)


def test_an_index_of_mistrals_copy_is_not_the_models(model: Path) -> None:
    before, _ = planned(model)
    lora(model / "consolidated-00001-of-00001.safetensors")
    (model / "consolidated.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "consolidated-00001-of-00001.safetensors"}})
    )
    assert planned(model)[0].tensors == before.tensors


def test_shards_without_an_index_are_whole_or_refused(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    for number in (1, 2):
        part = dict(list(tensors.items())[number - 1 :: 2])
        save_file(part, model / f"model-0000{number}-of-00002.safetensors")
    assert planned(model)[0].tensors.keys() == tensors.keys()
    (model / "model-00002-of-00002.safetensors").unlink()
    assert fails(model).code == "checkpoint.missing_shard"


@pytest.mark.parametrize("config", [False, True])
@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_is_named_and_its_hint_merges(
    model: Path, tmp_path: Path, weights: str, config: bool
) -> None:
    adapter = tmp_path / "an adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(ADAPTER))
    lora(adapter / weights)
    if config:
        (adapter / "config.json").write_text((model / "config.json").read_text())
    error = fails(adapter)
    assert error.code == "checkpoint.adapter"
    assert "someone/base-7b" in error.message
    assert "merge first" in error.hint
    stand_in = tmp_path / "lib" / "peft.py"
    stand_in.parent.mkdir()
    stand_in.write_text(
        "import shutil\n"
        "class AutoPeftModelForCausalLM:\n"
        "    from_pretrained = classmethod(lambda cls, *a, **k: cls())\n"
        "    merge_and_unload = lambda self: self\n"
        f"    save_pretrained = lambda self, out: shutil.copytree({str(model)!r}, out)\n"
    )
    (stand_in.parent / "transformers.py").write_text(
        "class AutoTokenizer:\n"
        "    from_pretrained = classmethod(lambda cls, *a: cls())\n"
        "    save_pretrained = lambda self, out: None\n"
    )
    follow(error.hint, PYTHONPATH=str(stand_in.parent))
    assert planned(tmp_path / "an adapter-merged")[1].layers


def test_factors_among_the_weights_are_not_published(model: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    edit_tensors(model, lambda tensors: tensors.update({name: torch.ones(4, 64)}))
    assert fails(model).code == "checkpoint.adapter"


STALE: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "version": {"version": "0.9.1"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "blocks": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


@pytest.mark.parametrize("case", STALE)
@pytest.mark.parametrize("nested", [False, True])
def test_stale_settings_are_refused_and_the_hint_removes_them(
    model: Path, case: str, nested: bool
) -> None:
    settings = {"quantization_config": STALE[case]}
    set_config(model, **({"text_config": settings} if nested else settings))
    error = fails(model)
    assert error.code == "format.stale_settings"
    assert "stale" in error.message
    follow(error.hint)
    edit_json(model / "config.json", lambda c: c.pop("text_config", None))
    assert planned(model)[1].layers


def test_a_stale_file_beside_the_config_is_removed_too(model: Path) -> None:
    (model / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    follow(fails(model).hint)
    assert planned(model)[1].layers


def test_settings_over_quantized_weights_are_not_stale(model: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(model, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))
    set_config(model, quantization_config={"quant_method": "bitsandbytes"})
    assert "quantized already" in fails(model).message


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors", "gptq", "modelopt"])
def test_two_methods_are_a_contradiction_that_names_both(model: Path, method: str) -> None:
    edit_tensors(
        model,
        lambda t: t.update(
            {"lm_head.weight_scale_2": torch.ones(()), "x.weight_scale": torch.ones(1)}
        ),
    )
    set_config(model, quantization_config={"quant_method": method, "weight_block_size": [128, 128]})
    (model / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    checkpoint = open_checkpoint(model)
    if method == "modelopt":
        assert detect(checkpoint).NAME == "modelopt"
        return
    for asked in (lambda: detect(checkpoint), lambda: planned(model)):
        with pytest.raises(InputError) as caught:
            asked()
        assert caught.value.code == "format.contradiction"
        assert method in caught.value.message
        assert "modelopt NVFP4" in caught.value.message


def dot_scales(tensors: dict[str, torch.Tensor]) -> None:
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        scale = torch.full((1, 1), 0.5).to(torch.float8_e8m0fnu)
        tensors[f"{name.removesuffix('.weight')}.scale"] = scale


def test_fp8_blocks_with_dot_scales_are_a_source(model: Path) -> None:
    edit_tensors(model, dot_scales)
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    set_config(model, quantization_config=settings)
    source, plan = planned(model)
    assert len(plan.layers) == 14
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    assert source.tensor(name).float().item() == 0.5
    set_config(model, quantization_config={**settings, "weight_block_size": [32, 32]})
    assert f"{name}" not in planned(model)[0].tensors


def test_a_cache_folder_means_its_only_snapshot(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models--some--model"
    first = folder / "snapshots" / "0a"
    first.parent.mkdir(parents=True)
    model.rename(first)
    assert resolve_model(str(folder)) == first
    assert resolve_model(str(folder / "snapshots")) == first
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder)
    assert str(first) in caught.value.hint
    (folder / "snapshots" / "1b").mkdir()
    with pytest.raises(InputError) as caught:
        resolve_model(str(folder))
    assert caught.value.code == "hub.several_snapshots"


def write_index(model: Path, names: Iterable[str], file: str) -> None:
    document = {"weight_map": dict.fromkeys(names, file)}
    (model / "model.safetensors.index.json").write_text(json.dumps(document))


@pytest.mark.parametrize("whole", [False, True])
def test_an_index_of_other_shards_is_refused_by_plan_and_quantize(model: Path, whole: bool) -> None:
    before = planned(model)[0].tensors
    write_index(model, [*before, *([] if whole else ["lost"])], "model-00001-of-00009.safetensors")
    error = fails(model)
    with pytest.raises(InputError) as caught:
        open_checkpoint(model)
    assert (error.message, error.hint) == (caught.value.message, caught.value.hint)
    assert error.code == "checkpoint.missing_shard"
    assert "model-00001-of-00009.safetensors" in error.message
    assert ("hold every tensor" in error.message) == whole
    if whole:
        subprocess.run(shlex.split(error.hint.partition("(")[2].partition(")")[0]), check=True)
        assert planned(model)[0].tensors == before


def test_an_index_alone_or_beside_mistrals_copy_is_planned(model: Path) -> None:
    names = planned(model)[0].tensors
    write_index(model, names, "model-00001-of-00009.safetensors")
    (model / "model.safetensors").rename(model / "consolidated.safetensors")
    assert planned(model)[1].layers


@pytest.mark.parametrize("name", ["TokenizersBackend", "PreTrainedTokenizerFast"])
def test_a_tokenizer_of_transformers_5_is_said(model: Path, name: str) -> None:
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    new = name == "TokenizersBackend"
    found = {finding.code for finding in check_alone(open_checkpoint(model))}
    assert ("sidecar.newer_tokenizer" in found) == new
    assert any("Transformers 4" in note for note in planned(model)[1].notes) == new


def no_tensors(file: Path) -> None:
    file.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64))


def unknown_architecture(file: Path) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(file, "novel")
    writer.add_tensor("token_embd.weight", np.ones((8, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("write", "code"),
    [(no_tensors, "gguf.unreadable"), (unknown_architecture, "gguf.architecture")],
)
def test_a_gguf_that_is_no_source_is_named(
    tmp_path: Path, write: Callable[[Path], None], code: str
) -> None:
    file = tmp_path / "tiny.gguf"
    write(file)
    for path in (file, tmp_path):
        error = fails(path)
        assert error.code == code
        assert "tiny.gguf" in error.message


def tiny_gguf(file: Path) -> None:
    """A Llama of two layers in Q8_0 with a byte-level tokenizer of its own."""
    import gguf
    import numpy as np
    from gguf import GGMLQuantizationType as Kind

    file.parent.mkdir(exist_ok=True)
    letters = [chr(0x61 + n) for n in range(126)]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(32)
    writer.add_vocab_size(130)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", *letters, "ab", "cd"])
    writer.add_token_types([3, 3, *([1] * 128)])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    attention: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("attn_q", "attn_k", "attn_v", "attn_output"), (64, 64)
    )
    inner: dict[str, tuple[int, ...]] = {
        "ffn_gate": (128, 64),
        "ffn_up": (128, 64),
        "ffn_down": (64, 128),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (130, 64), "output": (130, 64), "output_norm": (64,),
    }  # fmt: skip
    block = attention | inner | {"attn_norm": (64,), "ffn_norm": (64,)}
    for layer in range(2):
        shapes |= {f"blk.{layer}.{leaf}": shape for leaf, shape in block.items()}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = random.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(shape, dtype=np.float32))
        else:
            packed = gguf.quants.quantize(values, Kind.Q8_0)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=Kind.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_is_planned_by_its_header_and_quantized_as_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "in" / "tiny.gguf"
    tiny_gguf(file)
    source, plan = planned(file)
    assert not (tmp_path / "cache").exists()
    assert any("tiny.gguf (Q8_0, F32): quantize dequantizes" in note for note in plan.notes)
    free = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: free._replace(free=1_000))
        with pytest.raises(InputError) as caught:
            resolve_model(str(file))
    assert caught.value.code == "gguf.no_space"
    out = tmp_path / "out"
    request = Request(model=str(file), recipe=load_recipe("rtn_fp8_dynamic"), out=out)
    outcome = quantize(request, Mock())
    assert outcome.plan.layers == plan.layers
    assert outcome.plan.kept.keys() == plan.kept.keys()
    assert any("tiny.gguf (Q8_0, F32; SHA-256" in note for note in outcome.plan.notes)
    made = resolve_model(str(file.parent))
    shapes = {name: info.shape for name, info in open_checkpoint(made).tensors.items()}
    assert shapes == {name: info.shape for name, info in source.tensors.items()}
    held = open_gguf(file.parent).tensors["blk.1.ffn_down.weight"].values()
    read = open_checkpoint(made).tensor("model.layers.1.mlp.down_proj.weight")
    assert torch.equal(read, torch.from_numpy(held).bfloat16())
    assert verify(out, made).ok
    assert verify(out).ok
