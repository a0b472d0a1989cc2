"""What a quantization library is to quantkit: a description, without the library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from quantkit.checkpoint.schemes import Placement

if TYPE_CHECKING:
    from quantkit.recipe.model import Recipe

Way = Literal["process", "streaming"]
"""How a backend runs: its adapter in a child process, or the built-in shard by shard
(`quantkit/pipeline/ways.py` has what each does)."""

Resumes = Literal["stage", "layer", "shard"]
"""After what a stopped run goes on with `--resume`: the library's finished work, or each finished
layer or shard of it."""

Folding = Literal["none", "multiplier", "norms"]
"""Whether a method rewrites weights that it keeps: not, only through an input multiplier that is
stored beside the codes, or also by folding scales into norms and neighbouring layers."""


class Options(BaseModel):
    """The `options` of a recipe; every backend that has some makes a subclass."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Method:
    """What a scheme becomes in a library.

    algorithm: the library's own name of it (shown to users, stamped in the card).
    layout: the on-disk layout that is written.
    calibrated: whether it needs calibration tokens.
    folding: how it rewrites tensors that it keeps.
    accelerator: whether it cannot run on a CPU.
    """

    algorithm: str
    layout: str
    calibrated: bool = True
    folding: Folding = "none"
    accelerator: bool = False


@dataclass(frozen=True)
class Footprint:
    """Peak host memory of a job on a CPU, and what it writes beside its output, as a formula of
    the model's size.

    library: bytes of the worker with its libraries, before a model.
    weights: how often what stays in memory is held (all weights, or those outside of the decoder
        blocks), as a multiple of its bytes in 16 bit.
    block: what work on a decoder block takes, as a multiple of the largest one's bytes in 16 bit.
    done_blocks: what stays in memory of blocks that are done, as a multiple of the bytes of all
        blocks in 16 bit.
    accelerator_block: `block` in the memory of an accelerator, where the model is held once (None:
        the same), as one run of 8 B parameters had it (`benchmarks/gpu_placement.py`).
    blocks_on_host: whether an accelerator holds the block at work alone, wherever the others lie.
    activations: copies of a hidden state a calibration token, in 16 bit.
    blocks_on_disk: offloaded or finished blocks that are written, as a multiple of the bytes of all
        blocks in 16 bit.
    activations_on_disk: as `activations`, in checkpoints of finished layers.
    measured: schemes for which that was measured on a CPU (`benchmarks/placement.py`); for others
        it is a rule of thumb, which refuses nothing.
    """

    library: int
    weights: float
    block: float
    activations: float
    blocks_on_disk: float = 0
    activations_on_disk: float = 0
    measured: tuple[str, ...] = ()
    done_blocks: float = 0
    accelerator_block: float | None = None
    blocks_on_host: bool = False


@dataclass(frozen=True)
class Backend:
    """One quantization library, described.

    adapter: `"module:attr"` of the worker-side `run(job, report, result)`; "" for a `way` without.
    way: how it runs.
    library: the import name that must exist in the interpreter; distribution: its name on PyPI.
    extra: quantkit's optional dependency that installs it ("" when there is none).
    environment: the managed environment that holds it, for a library that cannot share quantkit's.
    methods: scheme name → what it becomes.
    chosen: the method as a recipe's options change it.
    overrides: whether single layers may have schemes of their own.
    dense_only: whether models with experts and with towers are beyond it, but for those families
        that `mixtures.yaml` and `towers.yaml` name.
    pictures: whether it calibrates with pictures too.
    mixed_pictures: why this recipe cannot be calibrated with samples of which only some have
        pictures, or None.
    reads_fp8_blocks: whether a source in FP8 blocks (DeepSeek) is dequantized on the way.
    placements: where the library can keep the weights, the first choice first, and what it takes.
    ranks: whether each device of `spread` has a process of its own with its share of the samples,
        and one decoder block at a time, instead of its share of the weights.
    resumes: after what `--resume` goes on; a job that the library's layer checkpoints do not cover
        goes on after its stage.
    unsupported: a reason why this recipe cannot run in this backend, or None.
    """

    name: str
    adapter: str
    library: str
    distribution: str
    extra: str
    methods: Mapping[str, Method]
    way: Way = "process"
    chosen: Callable[[Recipe, Method], Method] | None = None
    options: type[BaseModel] = Options
    kv_caches: tuple[str, ...] = ("none",)
    environment: str | None = None
    overrides: bool = True
    dense_only: bool = False
    pictures: bool = False
    mixed_pictures: Callable[[Recipe], str | None] | None = None
    reads_fp8_blocks: bool = False
    saves_state: bool = False
    placements: Mapping[Placement, Footprint] = field(
        default_factory=lambda: {"resident": Footprint(1_000_000_000, 1.33, 1, 1)}
    )
    ranks: bool = False
    resumes: Resumes = "stage"
    unsupported: Callable[[Recipe], str | None] | None = None

    def method(self, recipe: Recipe) -> Method:
        """What a recipe, whose scheme must be one of `methods`, becomes."""
        method = self.methods[recipe.scheme]
        return self.chosen(recipe, method) if self.chosen else method
