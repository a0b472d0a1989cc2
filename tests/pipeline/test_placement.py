"""Where the weights lie: what `auto` takes in how much memory, what is refused, and that every
placement gives the same tensors with every library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantkit.backends.environments import room
from quantkit.backends.environments.device import has_nvidia_gpu, resolve_devices
from quantkit.backends.registry import backend_named, load_recipe
from quantkit.checkpoint.directory import open_checkpoint
from quantkit.errors import InputError
from quantkit.pipeline.placement import Placed, place, refuse_too_large
from tests.support.cli import QUICK, quantkit, refused, said
from tests.support.families import model

G64 = ("--set", "group_size=64")
METHODS: dict[str, tuple[str, ...]] = {"llmcompressor_w4a16": G64, "modelopt_fp8": ()}
MORE: dict[str, tuple[str, ...]] = {
    "llmcompressor_fp8_dynamic": (),
    "modelopt_mxfp8": (),
    "autoround_w4a16": (*G64, "--set", "options.iters=1"),
    "gptqmodel_w4a16": G64,
}
Placing = Callable[..., Placed]


@pytest.fixture
def placing(small_model: Path) -> Placing:
    source = open_checkpoint(small_model)

    def decide(
        method: str, *sets: str, devices: tuple[str, ...] = ("cpu",), state: bool = False,
        **rooms: int | None,
    ) -> Placed:  # fmt: skip
        recipe = load_recipe(method, sets)
        backend = backend_named(recipe.backend)
        free = {name.replace("cuda", "cuda:"): size for name, size in rooms.items()}
        return place(source, recipe, backend, devices, state=state, room=free.get)

    return decide


def test_auto_takes_the_first_that_fits(placing: Placing) -> None:
    needs = placing("llmcompressor_w4a16", *G64[1:]).needs
    assert needs["layerwise"].host < needs["resident"].host
    roomy = placing("llmcompressor_w4a16", *G64[1:], host=needs["resident"].host)
    assert (roomy.placement, roomy.short) == ("resident", "")
    tight = placing("llmcompressor_w4a16", *G64[1:], host=needs["resident"].host - 1)
    assert (tight.placement, tight.short) == ("layerwise", "")
    assert tight.why.startswith("resident needs about")
    assert "host memory" in tight.why
    none = placing("llmcompressor_w4a16", *G64[1:], host=needs["layerwise"].host - 1)
    assert none.short
    unknown = placing("llmcompressor_w4a16", *G64[1:], host=None)
    assert (unknown.placement, unknown.short) == ("resident", "")


def test_what_is_written_beside_the_output_is_counted(placing: Placing) -> None:
    def disk(method: str, placement: str, samples: int) -> int:
        sets = (f"placement={placement}", f"calibration.samples={samples}")
        return placing(method, *sets, *G64[1:]).disk

    assert disk("llmcompressor_w4a16", "resident", 8) == 0
    offloaded = disk("llmcompressor_w4a16", "layerwise", 8)
    assert offloaded == round(0.6 * 3 * 2 * 3_540_096)  # three blocks in 16 bit
    finished = disk("autoround_w4a16", "resident", 16) - disk("autoround_w4a16", "resident", 8)
    assert finished == 4 * 8 * 512 * 576 * 2


def test_a_small_gpu_holds_a_block_at_a_time(placing: Placing) -> None:
    gpu = ("cuda:0",)
    needs = placing("modelopt_fp8", devices=gpu).needs
    size = needs["layerwise"].accelerator
    assert size < needs["resident"].accelerator
    taken = placing("modelopt_fp8", devices=gpu, cuda0=size)
    assert taken.placement == "layerwise"
    assert "cuda:0" in taken.why


def test_several_devices_are_spread_over(placing: Placing) -> None:
    two = ("cuda:0", "cuda:1")
    assert placing("modelopt_fp8", devices=two).placement == "spread"
    one = placing("modelopt_fp8", "placement=spread", devices=two[:1]).need.accelerator
    assert placing("modelopt_fp8", devices=two).need.accelerator < one
    shared = placing("llmcompressor_w4a16", *G64[1:], devices=two).need
    alone = placing("llmcompressor_w4a16", *G64[1:], "placement=layerwise", devices=two[:1]).need
    assert (shared.accelerator, shared.host > alone.host) == (alone.accelerator, True)
    full = placing("modelopt_fp8", devices=two, cuda0=1 << 40, cuda1=1)
    assert "cuda:1" in full.short


@pytest.fixture(scope="module")
def headers_of_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 8 B parameters, all zeros in a sparse file."""
    folder = tmp_path_factory.mktemp("models") / "8b"
    folder.mkdir()
    hidden, inner, layers, kv, vocabulary = 4096, 14336, 32, 1024, 128256
    shapes = {"model.embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden)}
    for n in range(layers):
        for leaf, shape in {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
                            "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
                            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
                            "mlp.down_proj": (hidden, inner)}.items():  # fmt: skip
            shapes[f"model.layers.{n}.{leaf}"] = shape
    entries, at = {}, 0
    for name, (rows, columns) in shapes.items():
        end = at + 2 * rows * columns
        entries[f"{name}.weight"] = {
            "dtype": "BF16", "shape": [rows, columns], "data_offsets": [at, end]
        }  # fmt: skip
        at = end
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + at)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16",
              "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
              "num_attention_heads": 32, "num_key_value_heads": 8,
              "vocab_size": vocabulary}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("method", "placement", "gpus", "measured"),
    [
        ("modelopt_fp8", "resident", 1, 16.4 + 0.5),
        ("modelopt_fp8", "layerwise", 1, 3.9),
        ("modelopt_fp8", "spread", 2, 9.1),
        ("llmcompressor_w4a16", "resident", 1, 21.6 + 0.5),
        ("llmcompressor_w4a16", "layerwise", 1, 8.7),
        ("llmcompressor_w4a16", "spread", 2, 8.7),
        ("gptqmodel_w4a16", "resident", 1, 5.8 + 0.5),
        ("gptqmodel_w4a16", "layerwise", 1, 5.7 + 0.5),
        ("autoround_w4a16", "resident", 1, 16.1 + 0.5),
        ("autoround_w4a16", "layerwise", 1, 5.2 + 0.5),
    ],
)
def test_the_estimate_of_8b_on_a_gpu_is_near_the_measured_peak(
    method: str, placement: str, gpus: int, measured: float, headers_of_8b: Path
) -> None:
    """docs/gpu.md; what torch alone reserved there, and 0.5 GB of CUDA's own where NVML did not
    tell."""
    devices = tuple(f"cuda:{n}" for n in range(gpus))
    recipe = load_recipe(method, (f"placement={placement}",))
    placed = place(
        open_checkpoint(headers_of_8b), recipe, backend_named(recipe.backend), devices,
        room=lambda _: None,
    )  # fmt: skip
    assert placed.need.accelerator == pytest.approx(measured * 1e9, rel=0.15)


@pytest.mark.parametrize(
    ("method", "sets", "devices", "state", "reason"),
    [
        ("gptqmodel_w4a16", ["placement=spread"], ("cuda:0",), False, "has no placement spread"),
        ("rtn_fp8_dynamic", ["placement=resident"], ("cpu",), False, "has no placement resident"),
        ("modelopt_fp8", ["placement=spread"], ("cpu",), False, "the device is cpu"),
        ("modelopt_fp8", ["placement=layerwise"], ("cpu",), True, "--checkpoint-save"),
        ("modelopt_fp8", ["placement=layerwise"], ("cuda:0", "cuda:1"), False, "on one device"),
        ("gptqmodel_w4a16", [], ("cuda:0", "cuda:1"), False, "does not spread"),
        ("llmcompressor_w4a16", [], ("xpu:0", "xpu:1"), False, "shares samples among CUDA devices"),
        (
            "llmcompressor_w4a16",
            ["calibration.samples=3"],
            ("cuda:0", "cuda:1", "cuda:2", "cuda:3"),
            False,
            "3 calibration samples are fewer than the devices",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(
    method: str,
    sets: list[str],
    devices: tuple[str, ...],
    state: bool,
    reason: str,
    placing: Placing,
) -> None:
    with pytest.raises(InputError, match=reason) as refusal:
        placing(method, *sets, devices=devices, state=state)
    assert refusal.value.code == "plan.placement"


def test_mixtures_stay_resident(tmp_path: Path) -> None:
    source = open_checkpoint(model("mixtral", tmp_path / "mixtral"))
    recipe = load_recipe("modelopt_fp8", ("placement=layerwise",))
    with pytest.raises(InputError, match="mixtures of experts"):
        place(source, recipe, backend_named("modelopt"), ("cpu",))


def test_what_cannot_fit_says_what_would(placing: Placing) -> None:
    recipe = load_recipe("modelopt_fp8", ("placement=resident",))
    with pytest.raises(InputError, match=r"needs about \d\.\d GB of host memory") as refusal:
        refuse_too_large(placing("modelopt_fp8", "placement=resident", host=1), recipe, ("cpu",))
    assert refusal.value.code == "plan.memory"
    assert "placement=layerwise" in refusal.value.hint
    assert "rtn_*" in refusal.value.hint


def test_an_estimate_that_was_not_measured_refuses_nothing(placing: Placing) -> None:
    scheme, gpu = "modelopt_int4_awq", ("cuda:0",)
    for method, devices, rooms in (
        (scheme, ("cpu",), {"host": 1}),
        ("modelopt_fp8", gpu, {"cuda0": 1}),
    ):
        placed = placing(method, devices=devices, **rooms)
        assert placed.short
        assert "estimated, not measured" in placed.doubt
        refuse_too_large(placed, load_recipe(method), devices)
    assert not placing("modelopt_fp8", host=1).doubt


def test_a_full_machine_is_refused_in_the_run_and_told_in_the_plan(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemAvailable: 200000 kB\n")
    monkeypatch.setattr(room, "MEMINFO", file)
    monkeypatch.setattr(room, "CGROUP", tmp_path)
    code, text = said("quantize", small_model, "--method", "modelopt_fp8", "--device", "cpu",
                      "--out", tmp_path / "out")  # fmt: skip
    assert code == 1
    assert "plan.memory" in text
    assert not (tmp_path / "out").exists()
    code, text = said("plan", small_model, "--method", "modelopt_fp8")
    assert code == 0
    assert "none fits" in text


def test_devices() -> None:
    assert resolve_devices("cuda:1,0") == ("cuda:1", "cuda:0")
    assert resolve_devices("cpu") == ("cpu",)
    with pytest.raises(InputError, match="twice"):
        resolve_devices("cuda:0,0")
    for wrong in ("cuda:0,", "cpu:0,1", "cuda0,1"):
        with pytest.raises(InputError, match="is no device"):
            resolve_devices(wrong)


@pytest.mark.library
@pytest.mark.parametrize(
    "method", [*METHODS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_every_placement_gives_the_same_tensors(
    method: str, small_model: Path, tmp_path: Path
) -> None:
    made = {}
    for placement in ("resident", "layerwise"):
        out = tmp_path / placement
        run = quantkit("quantize", small_model, "--method", method, "--out", out, *QUICK,
                       *(METHODS | MORE)[method], "--set", f"placement={placement}")  # fmt: skip
        assert run.code == 0, run.err
        recorded = json.loads((out / "quantkit.json").read_text())
        assert recorded["placement"]["placement"] == placement
        assert not [note for note in recorded["notes"] if "left behind" in note]
        made[placement] = tensors(out)
    first, second = made.values()
    assert first.keys() == second.keys()
    assert [name for name in first if not same(first[name], second[name])] == []


def test_two_gpus_for_a_library_that_takes_one(small_model: Path, tmp_path: Path) -> None:
    run = quantkit("quantize", small_model, "--method", "gptqmodel_w4a16", *G64,
                   "--device", "cuda:0,1", "--out", tmp_path / "out")  # fmt: skip
    refused(run, 1, "gptqmodel does not spread")


@pytest.mark.skipif(has_nvidia_gpu(), reason="this machine has a GPU")
@pytest.mark.parametrize("method", ["modelopt_fp8", "rtn_fp8_dynamic"])
def test_a_gpu_that_is_not_here_is_refused_before_any_work(
    method: str, small_model: Path, tmp_path: Path
) -> None:
    run = quantkit("quantize", small_model, "--method", method, "--device", "cuda:1",
                   "--out", tmp_path / "out")  # fmt: skip
    refused(run, 1, "cuda:1 of --device cuda:1 cannot be had", "--device cpu")
    assert "scan" not in run.err
    assert not list(tmp_path.iterdir())


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    files = directory.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return one.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8))
