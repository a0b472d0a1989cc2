"""A streamed checkpoint: what is in it, what it measured, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quantkit.backends.streaming.crew import hands
from quantkit.backends.streaming.job import Piece, ShardTask, Slice, StreamOptions, Work
from quantkit.backends.streaming.resources import worker_count
from quantkit.checkpoint.directory import Checkpoint, TensorInfo, open_checkpoint
from quantkit.errors import BackendError, InputError
from quantkit.formats import awq, compressed_tensors, compressed_tensors_config
from quantkit.formats.base import LayerSpec
from quantkit.formats.dequantize import dequantize
from tests.support.helpers import copy_checkpoint, edit_tensors
from tests.support.processes import DAEMON, is_alive, wait_until_gone
from tests.support.rtn import tiny_moe
from tests.support.streaming import (
    plain_layers,
    scheme_named,
    sharded,
    stream,
    tensors_of,
    write_model,
)
from tests.support.written import WRITERS

pytestmark = pytest.mark.broad

SCHEMES = (
    "fp8_dynamic", "fp8_block", "w8a8_dynamic", "w8a16", "w8a16::asymmetric", "w4a16:64",
    "w4a16:32:asymmetric", "nvfp4a16", "mxfp4a16", "mxfp8",
)  # fmt: skip


def shape_of(checkpoint: Checkpoint, module: str) -> tuple[int, int]:
    rows, columns = checkpoint.tensors[f"{module}.weight"].shape
    return rows, columns


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_written_is_what_the_result_says(
    scheme: str, small_model: Path, tmp_path: Path
) -> None:
    result = stream(small_model, tmp_path, scheme)
    source, written = open_checkpoint(small_model), open_checkpoint(tmp_path)
    assert written.digests() == result.digests
    assert source.digests() == result.source_digests
    layers = plain_layers(source, scheme_named(scheme))
    packing = compressed_tensors_config.packing_of(scheme_named(scheme))
    for name in list(layers)[:7]:
        weight = source.tensor(f"{name}.weight").float()
        spec = LayerSpec(scheme_named(scheme), packing, shape_of(source, name))
        parts = {
            suffix: written.tensor(f"{name}.{suffix}")
            for suffix in compressed_tensors.expected(spec)
            if f"{name}.{suffix}" in written.tensors
        }
        error = weight - dequantize(compressed_tensors.read(parts, spec))
        measured = float(error.norm() / weight.norm())
        sampled = scheme in ("fp8_dynamic", "fp8_block")
        assert result.relative_error[name] == pytest.approx(measured, rel=0.03 if sampled else 1e-3)
        assert result.sqnr_db[name] > scheme_named(scheme).sqnr_floor_db
    kept = [name for name in source.tensors if name.removesuffix(".weight") not in layers]
    assert kept
    assert all(result.digests[name] == result.source_digests[name] for name in kept)


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_gptq_and_awq_layouts(layout: str, small_model: Path, tmp_path: Path) -> None:
    scheme = "w4a16:64" if layout == "gptq" else "w4a16:64:asymmetric"
    result = stream(small_model, tmp_path / layout, scheme, layout=layout)
    stream(small_model, tmp_path / "plain", scheme)
    ours, plain = tensors_of(tmp_path / layout), tensors_of(tmp_path / "plain")
    for name in ("model.layers.0.mlp.down_proj", "model.layers.2.self_attn.k_proj"):
        shape = shape_of(open_checkpoint(small_model), name)
        spec = LayerSpec(scheme_named(scheme), "pack-quantized", shape)
        suffixes = compressed_tensors.expected(spec)
        parts = {s: plain[f"{name}.{s}"] for s in suffixes if f"{name}.{s}" in plain}
        weight = compressed_tensors.read(parts, spec)
        packing = "gptq" if layout == "gptq" else awq.PACKING
        expected = WRITERS[layout](
            weight, LayerSpec(spec.scheme, packing, shape), torch.bfloat16
        )  # fmt: skip
        for suffix, tensor in expected.items():
            assert torch.equal(ours[f"{name}.{suffix}"], tensor), suffix
    assert result.digests == open_checkpoint(tmp_path / layout).digests()


def test_shards_threads_and_blocks_change_no_byte(small_model: Path, tmp_path: Path) -> None:
    """FP4 global scales are shared over fused groups whose members lie in other shards."""
    torn = sharded(small_model, tmp_path / "torn", 5)
    whole = stream(small_model, tmp_path / "whole", "nvfp4a16", jobs=1)
    parts = stream(torn, tmp_path / "parts", "nvfp4a16", jobs=3)
    small = stream(torn, tmp_path / "small", "nvfp4a16", shard_size=4_000_000)
    assert whole.digests == parts.digests == small.digests
    assert whole.source_digests == parts.source_digests
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) == 5
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 5
    written = open_checkpoint(tmp_path / "small")
    layer = "model.layers.1.self_attn"
    scales = {
        float(written.tensor(f"{layer}.{leaf}.weight_global_scale"))
        for leaf in ("q_proj", "k_proj", "v_proj")
    }
    largest = max(
        float(open_checkpoint(small_model).tensor(f"{layer}.{leaf}.weight").abs().max())
        for leaf in ("q_proj", "k_proj", "v_proj")
    )
    assert len(scales) == 1
    assert scales.pop() == pytest.approx(448 * 6 / largest, rel=0.01)


def test_files_are_plain_safetensors(small_model: Path, tmp_path: Path) -> None:
    stream(small_model, tmp_path, "fp8_dynamic")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(open_checkpoint(tmp_path).tensors)
    assert not list(tmp_path.glob("*.writing"))


def test_clipping_helps_the_whole_model(small_model: Path, tmp_path: Path) -> None:
    plain = stream(small_model, tmp_path / "plain", "w4a16:64")
    clipped = stream(small_model, tmp_path / "clipped", "w4a16:64", clip="mse")
    assert all(clipped.relative_error[n] < plain.relative_error[n] for n in plain.relative_error)


def spoil(directory: Path, name: str, value: float = float("nan")) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[[3, 700]] = value

    edit_tensors(directory, change)


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.k_proj.weight", "model.embed_tokens.weight"]
)
def test_nan_is_named_and_refused(name: str, small_model: Path, tmp_path: Path) -> None:
    model = copy_checkpoint(small_model, tmp_path / "model")
    spoil(model, name)
    with pytest.raises(InputError, match="2 NaN or infinite") as caught:
        stream(model, tmp_path / "out", "nvfp4a16")
    assert name in caught.value.message
    assert "on_nan=keep16" in caught.value.hint
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert not list((tmp_path / "out").glob("*.writing"))


def test_nan_layers_stay_in_16_bit_with_what_is_fused_with_them(
    small_model: Path, tmp_path: Path
) -> None:
    model = copy_checkpoint(small_model, tmp_path / "model")
    spoil(model, "model.layers.1.self_attn.k_proj.weight")
    spoil(model, "model.embed_tokens.weight")
    result = stream(model, tmp_path / "out", "nvfp4a16", on_nan="keep16")
    layer = "model.layers.1.self_attn"
    assert set(result.kept) == {f"{layer}.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")}
    assert "k_proj" in result.kept[f"{layer}.q_proj"]
    for name in result.kept:
        assert result.digests[f"{name}.weight"] == result.source_digests[f"{name}.weight"]
    assert any("model.embed_tokens.weight" in note for note in result.notes)
    assert f"{layer}.o_proj" in result.relative_error


def test_a_nan_expert_keeps_the_experts_beside_it_in_16_bit(tmp_path: Path) -> None:
    model = tiny_moe(tmp_path / "moe")
    spoil(model, "model.layers.0.mlp.experts.2.down_proj.weight")
    result = stream(model, tmp_path / "out", "mxfp8", on_nan="keep16")
    layers = plain_layers(open_checkpoint(model), scheme_named("mxfp8"))
    assert set(result.kept) == {
        name for name in layers if name.startswith("model.layers.0.mlp.experts")
    }
    assert any(name.startswith("model.layers.1.mlp.experts") for name in result.relative_error)


@pytest.mark.parametrize(
    ("scheme", "more", "told"),
    [
        ("w4a16", {}, "group size 128 does not divide its 576 inputs"),
        ("fp8_dynamic", {"layout": "gptq"}, "w4a16 only"),
        ("w4a16:64:asymmetric", {"layout": "gptq"}, "without zero points"),
        ("w4a16:64", {"layout": "awq"}, "symmetric=false"),
        ("w8a8", {}, "calibration"),
        ("w2a16:64", {}, "int2"),
    ],
)
def test_what_a_scheme_cannot_hold_is_refused_before_any_work(
    scheme: str, more: dict[str, Any], told: str, small_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=told) as caught:
        stream(small_model, tmp_path / "out", scheme, **more)
    assert "model.layers.0." in caught.value.message
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_two_names_for_the_same_bytes_are_refused(small_model: Path, tmp_path: Path) -> None:
    model = copy_checkpoint(small_model, tmp_path / "model")
    file = model / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["lm_head.weight"] = header["model.embed_tokens.weight"]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(InputError, match=r"lm_head.weight") as caught:
        stream(model, tmp_path / "out", "fp8_dynamic")
    assert caught.value.code == "checkpoint.bad_header"


def test_two_tensors_that_would_get_one_name_are_refused(tmp_path: Path) -> None:
    parent = "model.layers.0.mlp.experts"
    tensors = {
        f"{parent}.down_proj": torch.ones(2, 64, 32),
        f"{parent}.1.down_proj.weight": torch.ones(64, 32),
    }
    model = write_model(tmp_path / "m", [tensors], {"hidden_size": 64, "num_hidden_layers": 1})
    with pytest.raises(InputError, match="Both") as caught:
        stream(model, tmp_path / "out", "fp8_dynamic")
    assert caught.value.code == "stream.duplicate_name"


def test_a_file_that_shrinks_under_the_run(small_model: Path, tmp_path: Path) -> None:
    """The header was read when the file was whole; the end is missed when it is needed."""
    model = sharded(small_model, tmp_path / "model", 3)
    checkpoint = open_checkpoint(model)
    from quantkit.backends.streaming.run import stream_quantize

    victim = checkpoint.files[2]
    with victim.open("r+b") as file:
        file.truncate(victim.stat().st_size - 1000)
    out = tmp_path / "out"
    out.mkdir()
    layers = plain_layers(checkpoint, scheme_named("fp8_dynamic"))
    with pytest.raises(InputError, match="ends inside tensor") as caught:
        stream_quantize(checkpoint, layers, out, options=StreamOptions(), shard_size=10**9)
    assert victim.name in caught.value.message


def test_progress_counts_all_source_bytes(small_model: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    stream(small_model, tmp_path, "fp8_dynamic", on_progress=lambda *at: seen.append(at))
    total = open_checkpoint(small_model).weight_bytes
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_memory_limits_the_threads(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is too little") as caught:
        stream(small_model, tmp_path / "a", "fp8_dynamic", memory=50_000_000)
    assert "--memory" in caught.value.hint
    stream(small_model, tmp_path / "b", "fp8_dynamic", memory=10**10)


def test_without_a_limit_memory_does_not_grow_with_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))

    def workers(columns: int, rows: int, jobs: int | None = None) -> int:
        info = TensorInfo("a.weight", "BF16", (rows, columns), Path("a"), 0, 2 * rows * columns)
        scheme = scheme_named("fp8_block")
        part = Slice(info, 0, rows, columns)
        works = (Work(info, (Piece("a", "a", scheme, part),), None, {}),)
        return worker_count([ShardTask("a", works)], "compressed-tensors", jobs, None)

    assert workers(4096, 4096) == 1
    assert workers(4096, 16384) == 8
    assert workers(8192, 28672) == 10
    assert workers(28672, 8192) == 4
    assert workers(28672, 8192, jobs=32) == 32
    assert workers(576, 1536) == 1
    assert workers(576, 1536, jobs=4) == 4


def test_workers_share_the_session_of_the_command_but_not_its_group() -> None:
    """So Ctrl-C is the command's alone, and a priority by session is theirs too."""
    with hands(2, "cpu", StreamOptions()) as crew:
        crew.start()
        workers = [process.pid for process in psutil.Process().children(recursive=True)]
        assert len(workers) >= 3
        assert {os.getsid(pid) for pid in workers} == {os.getsid(0)}
        assert os.getpgid(0) not in {os.getpgid(pid) for pid in workers}


def test_a_daemon_that_outlives_its_parent_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "daemon"
    (tmp_path / "sitecustomize.py").write_text(f"{DAEMON}\nleave_daemon({str(note)!r})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with hands(2, "cpu", StreamOptions()) as crew:
        crew.start()
        daemon = int(note.read_text())
        assert is_alive(daemon)
    wait_until_gone([daemon])


def test_what_a_worker_did_not_expect_is_a_sentence_and_a_log(small_model: Path) -> None:
    """A device that torch knows and this machine lacks."""
    info = open_checkpoint(small_model).tensors["model.norm.weight"]
    with hands(2, "xpu", StreamOptions()) as crew:
        crew.start()
        with pytest.raises(BackendError) as caught:
            crew.do([Slice(info, 0, 1, info.shape[0])], lambda *_: None)
    assert caught.value.code == "stream.worker_failed"
    assert "Traceback" not in caught.value.message
    assert "\n" not in caught.value.message
    log = Path(caught.value.hint.removeprefix("read ").partition(";")[0])
    assert "Traceback" in log.read_text()
    log.unlink()


def test_scalars_integers_and_empty_tensors_are_copied(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.self_attn.q_proj.weight": torch.randn(64, 64).bfloat16(),
        "model.layers.0.self_attn.rotary.inv_freq": torch.arange(8, dtype=torch.float64),
        "model.counter": torch.tensor(7),
        "model.mask": torch.tensor([True, False]),
        "model.empty": torch.zeros(0, 4),
    }
    model = write_model(tmp_path / "m", [tensors], {"hidden_size": 64, "num_hidden_layers": 1})
    stream(model, tmp_path / "out", "fp8_dynamic")
    written = tensors_of(tmp_path / "out")
    for name in list(tensors)[1:]:
        assert torch.equal(written[name], tensors[name])
    save_file(written, tmp_path / "again.safetensors")
