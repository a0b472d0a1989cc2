"""Every library for real: each output verifies, says what made it, and is told when damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.backends.environments.managed import ready
from quantkit.checkpoint.directory import open_checkpoint
from quantkit.formats import ascend
from quantkit.formats.dequantize import dequantize
from quantkit.verification import verify
from tests.support.backends import LIBRARIES, VLLM_LOADS, engine_alarms, make
from tests.support.cli import QUICK, Run, quantkit, refused
from tests.support.helpers import cut_layers, edit_json

pytestmark = pytest.mark.library

NAMES = [(library, name) for library, methods in LIBRARIES.items() for name in methods]
SIDECARS = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.fixture(scope="session")
def two_layers(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut_layers(demo_model, tmp_path_factory.mktemp("models") / "two", 2)


@pytest.fixture(scope="session")
def made(two_layers: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The output of a library, made with all its others on first use."""
    runs: dict[str, dict[str, Run]] = {}
    roots: dict[str, Path] = {}

    def get(library: str, name: str) -> Path:
        if library not in runs:
            if library == "msmodelslim":
                created = quantkit("env", "create", "msmodelslim")
                assert created.code == 0, created.err
            roots[library] = tmp_path_factory.mktemp(library)
            runs[library] = make(library, two_layers, roots[library])
        assert runs[library][name].code == 0, runs[library][name].err
        return roots[library] / name

    return get


def bare_copy(out: Path, target: Path) -> Path:
    shutil.copytree(out, target)
    (target / "quantkit.json").unlink()
    return target


@pytest.mark.parametrize(("library", "name"), NAMES)
def test_the_output_is_flat_and_verifies_without_its_provenance(
    made: Callable[[str, str], Path], two_layers: Path, library: str, name: str, tmp_path: Path
) -> None:
    out = made(library, name)
    files = {path.name for path in out.iterdir()}
    assert all(path.is_file() for path in out.iterdir())
    assert {"README.md", "quantkit.json", "quantkit.log"} <= files
    if name == "autoround_gguf_q4_k_m":
        assert len(files) == 4
    else:
        assert {"config.json", *SIDECARS} <= files
    report = verify(bare_copy(out, tmp_path / "bare"), two_layers)
    assert report.ok, report.errors
    assert report.layers[0].sqnr_db > 0


@pytest.mark.parametrize(("library", "name"), [n for n in NAMES if "gguf" not in n[1]])
def test_the_engines_find_their_names_in_its_lists(
    made: Callable[[str, str], Path], library: str, name: str
) -> None:
    out = made(library, name)
    assert not engine_alarms(out, "vllm", "sglang")
    if name in VLLM_LOADS:
        assert not engine_alarms(out, "vllm", names_only=False)


@pytest.mark.parametrize(("library", "name"), NAMES)
def test_the_provenance_says_which_tokens_and_versions(
    made: Callable[[str, str], Path], library: str, name: str
) -> None:
    note: dict[str, Any] = json.loads((made(library, name) / "quantkit.json").read_text())
    method, _ = LIBRARIES[library][name]
    assert note["method"] == method
    assert note["versions"]["torch"]
    calibration = note["calibration"]
    if calibration is None:
        return
    assert calibration["tokens"] == calibration["samples"] * 128
    assert calibration["modules"] > 0
    if calibration["samples"] != 8:
        return
    other = json.loads((made("gptqmodel", "gptqmodel_w8a16") / "quantkit.json").read_text())
    assert calibration["digest"] == other["calibration"]["digest"]


def test_layers_that_do_not_fit_are_kept_or_given_a_group_that_does(
    made: Callable[[str, str], Path],
) -> None:
    kept = json.loads((made("gptqmodel", "gptqmodel_w3a16") / "quantkit.json").read_text())["plan"]
    assert set(kept["quantized"]) == {f"model.layers.{n}.mlp.down_proj" for n in (0, 1)}
    assert any("does not divide 576" in why for why in kept["kept"].values())
    fitted = json.loads((made("gptqmodel", "gptqmodel_w4a16") / "quantkit.json").read_text())
    assert any("group size 64 instead of 128" in text for text in fitted["notes"])
    tensors = open_checkpoint(made("gptqmodel", "gptqmodel_w4a16")).tensors
    assert tensors["model.layers.0.mlp.down_proj.scales"].shape[0] == 1536 // 128
    assert tensors["model.layers.0.mlp.up_proj.scales"].shape[0] == 576 // 64


def test_what_the_library_did_otherwise_is_in_the_notes(
    made: Callable[[str, str], Path],
) -> None:
    note = json.loads((made("autoround", "autoround_gguf_q4_k_m") / "quantkit.json").read_text())
    assert any("q_proj to gguf:q5_0" in text for text in note["notes"])


def test_the_gguf_file_has_the_tokenizer_of_its_source(
    made: Callable[[str, str], Path], two_layers: Path
) -> None:
    from quantkit.checkpoint.gguf import open_gguf

    held = open_gguf(made("autoround", "autoround_gguf_q4_k_m"))
    assert held.metadata["tokenizer.ggml.model"] == "gpt2"
    config = json.loads((two_layers / "config.json").read_text())
    assert held.metadata["tokenizer.ggml.eos_token_id"] == config["eos_token_id"]


@pytest.mark.parametrize(
    ("practice", "telling"),
    [
        ("qwen3/qwen3-32b-dense-w8a8", "apiversion is 'modelslim_v0'"),
        ("qwen3/nosuch", "no practice 'qwen3/nosuch'"),
    ],
)
def test_a_practice_that_cannot_run_is_refused(
    made: Callable[[str, str], Path], two_layers: Path, tmp_path: Path, practice: str, telling: str
) -> None:
    made("msmodelslim", "msmodelslim_practice")  # its environment is there
    run = quantkit(
        "quantize", two_layers, "--method", "msmodelslim_w8a16", "--out", tmp_path / "out",
        "--device", "cpu", "--set", f"options.practice={practice}", *QUICK,
    )  # fmt: skip
    refused(run, 1, telling)
    assert not (tmp_path / "out").exists()


DEQUANTIZE = """
import sys
from msmodelslim.core.quant_service.modelslim_v1.save.utils.pack import w4a8_pack_int4
from msmodelslim.ir.api import dequantize
from msmodelslim.ir.qal import QDType, QParam, QScheme, QScope, QStorage
from safetensors.torch import load_file, save_file
stored, found = load_file(sys.argv[1]), {}
for name in [key[:-6] for key in stored if key.endswith(".codes")]:
    codes, scale = stored[name + ".codes"], stored[name + ".scale"]
    kind = QDType.INT4 if "W4" in sys.argv[3] else QDType.INT8
    scheme = QScheme(scope=QScope.PER_CHANNEL, dtype=kind, symmetric=False)
    param = QParam(scheme, ext={"scale": scale, "offset": stored[name + ".offset"]})
    found[name] = dequantize(QStorage(kind, codes).T, param).T.value.contiguous()
    if sys.argv[3] == "W4A8_DYNAMIC":
        found[name + ".packed"] = w4a8_pack_int4(codes).contiguous()
save_file(found, sys.argv[2])
"""
"""msModelSlim's own dequantization of codes, scales and offsets, and its packing."""


@pytest.mark.parametrize("kind", ["w8a16", "w8a8", "w8a8_dynamic", "w4a8_dynamic", "w4a4_dynamic"])
def test_ascend_weights_are_what_msmodelslim_dequantizes(
    made: Callable[[str, str], Path], tmp_path: Path, kind: str
) -> None:
    checkpoint = open_checkpoint(made("msmodelslim", f"msmodelslim_{kind}"))
    layers = {}
    stored: dict[str, torch.Tensor] = {}
    for name, spec in ascend.declare(checkpoint).layers.items():
        tensors = {
            suffix: checkpoint.tensor(f"{name}.{suffix}")
            for suffix in ascend.expected(spec)
            if f"{name}.{suffix}" in checkpoint.tensors
        }
        weight = layers[name] = ascend.read(tensors, spec)
        scale = tensors.get("weight_scale")
        if scale is None:
            scale = tensors["deq_scale"] / tensors["input_scale"]
        codes = weight.q if kind == "w4a8_dynamic" else tensors["weight"]
        offset = tensors.get("weight_offset", torch.zeros_like(scale))
        stored[f"{name}.codes"] = codes.contiguous()
        stored[f"{name}.scale"] = scale.float().reshape(-1)
        stored[f"{name}.offset"] = offset.float().reshape(-1)
    save_file(stored, tmp_path / "stored")
    python = ready("msmodelslim")
    assert python
    command = [str(python), "-c", DEQUANTIZE, str(tmp_path / "stored"), str(tmp_path / "found")]
    subprocess.run([*command, kind.upper()], check=True, capture_output=True)
    found = load_file(tmp_path / "found")
    assert len(layers) == 14
    for name, weight in layers.items():
        assert torch.equal(dequantize(weight), found[name]), name
        if kind == "w4a8_dynamic":
            assert torch.equal(checkpoint.tensor(f"{name}.weight"), found[f"{name}.packed"])


SCALES = ("weight_scale", "scales", "deq_scale")
CODES = ("weight_packed", "qweight", "weight")


def damage_first(out: Path, suffixes: tuple[str, ...], change: Callable[[bytes], bytes]) -> None:
    """Change the bytes of the first tensor of a layer 0 module with one of these suffixes."""
    checkpoint = open_checkpoint(out)
    suffix = next(s for s in suffixes if any(n.endswith(f"proj.{s}") for n in checkpoint.tensors))
    name = sorted(n for n in checkpoint.tensors if n.endswith(f"proj.{suffix}"))[0]
    info = checkpoint.tensors[name]
    with info.file.open("r+b") as handle:
        handle.seek(info.start)
        old = handle.read(info.bytes)
        handle.seek(info.start)
        handle.write(change(old))


def reversed_bytes(old: bytes) -> bytes:
    return old[::-1]


def zeros(old: bytes) -> bytes:
    return bytes(len(old))


def wrong_bits(out: Path) -> None:
    file = out / "quant_model_description.json"
    if file.is_file():
        edit_json(file, lambda d: d.update({_first(d): "FLOAT"}))
        return

    def change(config: dict[str, Any]) -> None:
        declared = config["quantization_config"]
        groups = declared.get("config_groups")
        place, key = (groups["group_0"]["weights"], "num_bits") if groups else (declared, "bits")
        place[key] = 8 if place[key] == 4 else 4

    edit_json(out / "config.json", change)


def _first(described: dict[str, Any]) -> str:
    return next(n for n, kind in described.items() if n.endswith("weight") and kind != "FLOAT")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "scale": lambda out: damage_first(out, SCALES, zeros),
    "codes": lambda out: damage_first(out, CODES, reversed_bytes),
    "config": wrong_bits,
    "sidecar": lambda out: (out / "tokenizer.json").unlink(),
}
"""One class of bytes each."""

DAMAGED = [
    ("llmcompressor", "llmcompressor_w4a16"),
    ("llmcompressor", "llmcompressor_nvfp4"),
    ("gptqmodel", "gptqmodel_w4a16"),
    ("autoround", "autoround_w4a16"),
    ("autoround", "autoround_awq"),
    ("msmodelslim", "msmodelslim_w8a8"),
    ("msmodelslim", "msmodelslim_w4a8_dynamic"),
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("library", "name"), DAMAGED)
def test_a_damaged_output_does_not_verify(
    made: Callable[[str, str], Path],
    two_layers: Path,
    library: str,
    name: str,
    damage: str,
    tmp_path: Path,
) -> None:
    broken = bare_copy(made(library, name), tmp_path / "broken")
    DAMAGES[damage](broken)
    assert not verify(broken, two_layers).ok


@pytest.mark.parametrize(
    ("library", "name", "key"),
    [
        ("llmcompressor", "llmcompressor_nvfp4a16", "ignore"),
        ("gptqmodel", "gptqmodel_w3a16", "dynamic"),
    ],
)
def test_a_lost_ignore_list_is_told(
    made: Callable[[str, str], Path],
    two_layers: Path,
    library: str,
    name: str,
    key: str,
    tmp_path: Path,
) -> None:
    broken = bare_copy(made(library, name), tmp_path / "broken")
    edit_json(broken / "config.json", lambda c: c["quantization_config"].pop(key))
    assert not verify(broken, two_layers).ok


def test_a_damaged_gguf_file_does_not_verify(
    made: Callable[[str, str], Path], two_layers: Path, tmp_path: Path
) -> None:
    from quantkit.checkpoint.gguf import open_gguf

    good = made("autoround", "autoround_gguf_q4_k_m")
    held = open_gguf(good)
    name = held.file.name
    raw = held.file.read_bytes()
    stored = held.tensors["blk.0.ffn_down.weight"].raw.tobytes()
    start = raw.index(stored[:4096])
    changes = {
        "codes": raw[:start] + stored[::-1] + raw[start + len(stored) :],
        "truncated": raw[: len(raw) // 2],
        "metadata": raw.replace(b"llama.block_count", b"llama.block_cownt"),
        "magic": b"GGML" + raw[4:],
    }
    for number, (what, content) in enumerate(changes.items()):
        broken = bare_copy(good, tmp_path / str(number))
        (broken / name).write_bytes(content)
        assert not verify(broken, two_layers).ok, what


def test_the_runtime_computes_a_gguf_file_as_transformers_does(
    made: Callable[[str, str], Path], two_layers: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from quantkit.checkpoint.gguf import open_gguf
    from quantkit.errors import InputError
    from quantkit.runtime.load import load

    path = made("autoround", "autoround_gguf_q4_k_m")
    held = open_gguf(path)
    ours = load(path, dtype="float32")
    ids = torch.randint(3, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        path, gguf_file=held.file.name, dtype=torch.float32
    )
    with torch.inference_mode():
        assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-3)
    assert ours.layout == "gguf"
    assert not ours.weights_only
    assert {layer.scheme for layer in ours.layers} == {
        tensor.type for tensor in held.tensors.values() if tensor.quantized
    }
    asked = json.loads((two_layers / "config.json").read_text())
    for key in ("hidden_size", "num_key_value_heads", "vocab_size", "tie_word_embeddings"):
        assert getattr(ours.config, key) == asked[key]

    with pytest.raises(InputError, match="int4_cpu does not read"):
        load(path, kernel="int4_cpu")
    raw, at = held.file.read_bytes(), held.tensors["blk.1.ffn_down.weight"].raw.tobytes()
    changes = {
        "tensor.nonfinite": raw.replace(at[:256], b"\xff" * 256),
        "gguf.incomplete": raw.replace(b"llama.embedding_length", b"llama.embedding_lenght"),
        "runtime.missing_tensor": raw.replace(b"blk.1.ffn_norm.weight", b"blk.1.ffn_nrom.weight"),
    }
    for number, (code, content) in enumerate(changes.items()):
        broken = bare_copy(path, tmp_path / str(number))
        (broken / held.file.name).write_bytes(content)
        with pytest.raises(InputError) as caught:
            load(broken)
        assert caught.value.code == code
