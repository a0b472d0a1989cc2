"""Where a job's weights will lie, by what each placement needs and what this machine has free.

The estimate of memory is this file's formula with the coefficients of the backend's registry entry
(`Footprint`); docs/large.md says which of them were measured (`benchmarks/placement.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.backends.environments.room import device_room, host_room
from quantkit.backends.registry.backend import Backend
from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.network.config import expert_count
from quantkit.checkpoint.network.language import text_config
from quantkit.checkpoint.network.modules import layer_index
from quantkit.checkpoint.network.multimodal import is_multimodal
from quantkit.checkpoint.schemes import Placement
from quantkit.errors import InputError
from quantkit.recipe.model import Recipe

DEVICE_BASE = 600_000_000
"""A CUDA context and its libraries' workspaces, bytes."""


@dataclass(frozen=True)
class Need:
    """Peak bytes of a job on the fullest accelerator (0 on a CPU) and in host memory.

    measured: whether the formula was held against such a job's real peak.
    """

    accelerator: int
    host: int
    measured: bool


@dataclass(frozen=True)
class Placed:
    """The placement of a job, why it was taken, and what every placement that can be had needs.

    short: what is missing where, "" when it fits (or nobody knows what is free).
    disk: bytes on the output's disk that a library writes beside the output: offloaded weights, and
        its checkpoints of finished layers.
    """

    placement: Placement
    why: str
    needs: Mapping[Placement, Need]
    short: str = ""
    disk: int = 0

    @property
    def need(self) -> Need:
        return self.needs[self.placement]

    @property
    def doubt(self) -> str:
        """What may not fit by an estimate that was not measured; "" otherwise."""
        if not self.short or self.need.measured:
            return ""
        return f"placement={self.placement} {self.short} (estimated, not measured)"

    def to_json(self) -> dict[str, Any]:
        return {
            "placement": self.placement,
            "why": self.why,
            "short": self.short,
            "disk": self.disk,
            "needs": {name: vars(need) for name, need in self.needs.items()},
        }


def place(
    source: Checkpoint,
    recipe: Recipe,
    backend: Backend,
    devices: tuple[str, ...],
    *,
    state: bool = False,
    room: Callable[[str], int | None] | None = None,
) -> Placed:
    """The placement that the recipe asks for, or the first of the backend's that fits.

    `state` says that the fake-quantized state is to be kept. `room` tells the free bytes of a
    device or of the "host"; None is this machine's.
    Raises InputError for a placement that the library, or these devices, do not have.
    """
    plain = not (state or expert_count(source.config) or is_multimodal(source.config))
    possible = _possible(backend, devices, plain=plain)
    if reason := _refusal(backend, recipe, devices, possible):
        raise InputError(
            f"{recipe.name}: {reason}.",
            hint="--set placement=auto, or another --device",
            code="plan.placement",
        )
    if len(devices) > 1:
        possible = ("spread",)
    free = room or _room
    needs = {name: _need(source, recipe, backend, name, devices) for name in possible}
    lacks = {name: _short(need, devices, free) for name, need in needs.items()}
    name, why = _chosen(recipe, needs, lacks)
    return Placed(name, why, needs, lacks[name], _disk(source, recipe, backend, name))


def refuse_too_large(placed: Placed | None, recipe: Recipe, devices: tuple[str, ...]) -> None:
    """InputError for a job that would run out of memory by a measured estimate, with what would
    fit."""
    if placed is None or not placed.short or placed.doubt:
        return
    ways = [] if placed.placement == "layerwise" else ["--set placement=layerwise"]
    if devices[0] != "cpu" and "spread" in placed.needs:
        ways.append("more GPUs (--device cuda:0,1)")
    ways.append("free memory" if recipe.backend == "rtn" else "an rtn_* method: it holds no model")
    raise InputError(
        f"{recipe.name} with placement={placed.placement} {placed.short}.",
        hint=", or ".join(ways),
        code="plan.memory",
    )


def _refusal(
    backend: Backend, recipe: Recipe, devices: tuple[str, ...], possible: tuple[Placement, ...]
) -> str | None:
    """Why the placement that the recipe asks for cannot be had whatever is free, or None."""
    asked = recipe.placement
    if len(devices) > 1:
        named = ", ".join(devices)
        if asked not in ("auto", "spread"):
            return f"placement={asked} works on one device, not on {named}"
        if backend.ranks and not devices[0].startswith("cuda"):
            return f"{backend.name} shares samples among CUDA devices, not among {named}"
        if backend.ranks and 0 < (few := _calibration(recipe, backend)[0]) < len(devices):
            return f"{few} calibration samples are fewer than the devices that share them ({named})"
        return None if "spread" in possible else f"{backend.name} does not spread a model here"
    if asked == "auto" or asked in possible:
        return None
    if asked not in backend.placements:
        return f"{backend.name} has no placement {asked} (it has {', '.join(backend.placements)})"
    if asked == "spread" and devices == ("cpu",):
        return "placement=spread is over accelerators, and the device is cpu"
    return f"placement={asked} is not for mixtures of experts, towers, nor with --checkpoint-save"


def _chosen(
    recipe: Recipe, needs: Mapping[Placement, Need], lacks: Mapping[Placement, str]
) -> tuple[Placement, str]:
    """The placement and why; `lacks` says of each what is missing for it."""
    if recipe.placement != "auto":
        return recipe.placement, "as the recipe asks"
    before: list[str] = []
    for name, lack in lacks.items():
        if not lack:
            return name, "; ".join(before) or "the first that fits"
        before.append(f"{name} {lack}")
    least = min(needs, key=lambda name: needs[name].host + needs[name].accelerator)
    return least, "none fits; it needs least"


def _possible(backend: Backend, devices: tuple[str, ...], *, plain: bool) -> tuple[Placement, ...]:
    """The backend's placements on such devices, the first choice first; what is not `plain` (a
    dense model without towers, no state to keep) has the first alone."""
    names = tuple(backend.placements)
    if not plain:
        return names[:1]
    return tuple(name for name in names if name != "spread" or devices[0] != "cpu")


def _need(
    source: Checkpoint,
    recipe: Recipe,
    backend: Backend,
    placement: Placement,
    devices: tuple[str, ...],
) -> Need:
    foot = backend.placements[placement]
    blocks, outside = _sizes(source)
    block, model = max(blocks.values(), default=0), sum(blocks.values()) + outside
    done = round(foot.done_blocks * sum(blocks.values()))
    ranks = backend.ranks and placement == "spread"
    held = outside if placement == "layerwise" or ranks else model
    cached = round(foot.activations * _activations(source, recipe, backend))
    if devices[0] == "cpu":
        working = round(foot.block * block + foot.weights * held) + done
        return Need(0, foot.library + working + cached, recipe.scheme in foot.measured)
    factor = foot.block if foot.accelerator_block is None else foot.accelerator_block
    working = round(factor * block + (outside if foot.blocks_on_host else held))
    share = working // len(devices) if placement == "spread" and not ranks else working
    largest = max((info.bytes for info in source.tensors.values()), default=0)
    processes = len(devices) if ranks else 1
    at_work = model if foot.blocks_on_host and placement == "resident" else max(block, largest)
    host = processes * (foot.library + at_work) + done + cached
    return Need(DEVICE_BASE + share, host, measured=False)


def _disk(source: Checkpoint, recipe: Recipe, backend: Backend, placement: Placement) -> int:
    foot = backend.placements[placement]
    blocks = foot.blocks_on_disk * sum(_sizes(source)[0].values())
    return round(blocks + foot.activations_on_disk * _activations(source, recipe, backend))


def _activations(source: Checkpoint, recipe: Recipe, backend: Backend) -> int:
    """Bytes in 16 bit of one hidden state of every calibration token."""
    return 2 * _tokens(recipe, backend) * int(text_config(source.config).get("hidden_size") or 0)


def _sizes(source: Checkpoint) -> tuple[dict[int, int], int]:
    """Bytes in 16 bit of each decoder block by its number, and of all that is in none."""
    blocks: dict[int, int] = {}
    outside = 0
    for info in source.tensors.values():
        number = layer_index(info.name)
        size = 2 * info.elements
        if number is None:
            outside += size
        else:
            blocks[number] = blocks.get(number, 0) + size
    return blocks, outside


def _tokens(recipe: Recipe, backend: Backend) -> int:
    """Calibration tokens, padding included."""
    samples, length = _calibration(recipe, backend)
    return samples * length


def _calibration(recipe: Recipe, backend: Backend) -> tuple[int, int]:
    """Samples and their length in tokens, 0 for a method that needs none."""
    choice = recipe.calibration
    if choice is None or not backend.method(recipe).calibrated:
        return 0, 0
    from quantkit.calibration import load_calibration

    config = load_calibration(choice.name, choice.overrides())
    return config.samples, config.sequence_length


def _short(need: Need, devices: tuple[str, ...], room: Callable[[str], int | None]) -> str:
    """What is missing, in words; "" when all fits or nothing tells."""
    wanted = [("host", need.host)]
    if devices[0] != "cpu":
        wanted = [*((device, need.accelerator) for device in devices), *wanted]
    for where, size in wanted:
        free = room(where)
        if free is not None and size > free:
            name = "host memory" if where == "host" else where
            return f"needs about {size / 1e9:.1f} GB of {name}, where {free / 1e9:.1f} GB are free"
    return ""


def _room(where: str) -> int | None:
    return host_room() if where == "host" else device_room(where)
