"""The pass that tells what each scheme does to each group: forward once, then back layer by layer.

Every decoder layer's input is kept, and the gradient of the log-likelihood of drawn tokens (see
`watched.py`) goes back from the last layer to the first. Each layer is computed once more from its
kept input, so that no more than one layer's activations and rounded weights are held at a time, and
no model is copied or replayed for a trial.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from quantkit.backends.process.job import Reporter
from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.schemes import Scheme
from quantkit.runtime.load import check_kernel, pick_device, pick_dtype, read_config
from quantkit.runtime.loading.hosted import build_hosted
from quantkit.runtime.loading.source import open_source
from quantkit.validation.search.groups import Group
from quantkit.validation.search.watched import Notes, Watched, WatchingMaker, find_largest

BATCH_TOKENS = 2048
"""Tokens a step, as in `subjects.builtin`."""

_DECODER_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d+$")


@dataclass(frozen=True)
class Cell:
    """One group in one scheme: `kl`, the estimate of the model's mean KL divergence with only that
    group quantized, in nats a token; `error`, |d|²/|y|² of its output; bits, those stored."""

    group: str
    scheme: str
    kl: float
    error: float
    bits: float


@dataclass(frozen=True)
class Measured:
    """All cells, and what they cost: seconds of the whole, and of its plain forward pass alone;
    likewise multiply-adds of linear layers."""

    cells: list[Cell]
    seconds: float
    forward_seconds: float
    products: int
    forward_products: int


def measure(
    source: Checkpoint,
    groups: Sequence[Group],
    schemes: Mapping[str, Mapping[str, Scheme]],
    windows: NDArray[np.int64],
    *,
    device: str,
    seed: int,
    ui: Reporter,
    streamed: bool = False,
) -> Measured:
    """Estimate every group × scheme on windows [n, length] of token ids.

    `schemes`: group → title → scheme. `streamed`: the linear layers of one decoder layer at a time
    are in memory, read anew for every batch. Raises InputError for a model that cannot be computed.
    """
    asked = {
        module.name: (group.name, schemes[group.name])
        for group in groups
        for module in group.modules
    }
    notes = Notes(asked, frozenset(group.name for group in groups if group.experts))
    model = _load(source, notes, device, streamed, ui)
    find_largest(model, notes)
    _count_others(model, notes)
    start = time.perf_counter()
    batches = _batches(windows, pick_device(device))
    dice = torch.Generator().manual_seed(seed)
    kept, forward, products = _forward(model, batches, notes, dice, ui)
    _backward(kept, notes, ui)
    seconds = time.perf_counter() - start
    tokens = windows.size
    cells = [
        Cell(
            group.name,
            title,
            notes.sums[group.name, title].moved / (2 * tokens),
            notes.sums[group.name, title].error / max(notes.signal[group.name], 1e-30),
            group.bits(scheme),
        )
        for group in groups
        for title, scheme in schemes[group.name].items()
        if (group.name, title) in notes.sums
    ]
    return Measured(cells, seconds, forward, notes.products, products)


def _load(source: Checkpoint, notes: Notes, device: str, streamed: bool, ui: Reporter) -> nn.Module:
    reader = open_source(source)
    check_kernel(reader, "auto")
    config, place = read_config(reader), pick_device(device)
    maker = WatchingMaker(reader, place, pick_dtype(config, "auto"), [], "engine", notes=notes,
                          streamed=streamed)  # fmt: skip
    begun = False

    def progress(done: int, total: int) -> None:
        nonlocal begun
        if not begun:
            ui.stage("load", total)
            begun = True
        ui.advance(done)

    with torch.no_grad():
        model: nn.Module = build_hosted(config, maker, progress).model
    return model.requires_grad_(False)


def _count_others(model: nn.Module, notes: Notes) -> None:
    """Count the products of linear layers that are not watched. Routers that are modules of another
    kind stay uncounted: a thousandth of a pass."""

    def after(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(module, nn.Linear)
        notes.counted(args[0], module.weight, output)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(after)


def _batches(windows: NDArray[np.int64], device: torch.device) -> list[torch.Tensor]:
    step = max(1, BATCH_TOKENS // windows.shape[1])
    parts = (windows[at : at + step] for at in range(0, len(windows), step))
    return [torch.from_numpy(part).to(device) for part in parts]


@dataclass
class _Call:
    """What a decoder layer was called with in one batch."""

    module: nn.Module
    args: tuple[Any, ...]
    named: dict[str, Any]


@dataclass
class _Kept:
    """One batch: the calls of its decoder layers in order, and the gradient behind the last."""

    calls: list[_Call]
    gradient: torch.Tensor


def _forward(
    model: nn.Module,
    batches: Sequence[torch.Tensor],
    notes: Notes,
    dice: torch.Generator,
    ui: Reporter,
) -> tuple[list[_Kept], float, int]:
    """Every batch through the model, tokens drawn from what it predicts; the seconds and the
    products without the part that goes back from the logits to the last layer."""
    found, seconds, products = [], 0.0, 0
    ui.stage("forward", len(batches))
    for number, ids in enumerate(batches):
        start, before = time.perf_counter(), notes.products
        with _capturing(model) as (calls, leaf), torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        seconds += time.perf_counter() - start
        products += notes.products - before
        with torch.enable_grad():
            _draw(logits, dice).backward()  # type: ignore[no-untyped-call]
        assert leaf[0].grad is not None
        found.append(_Kept(calls, leaf[0].grad))
        ui.advance(number + 1)
    return found, seconds, products


def _draw(logits: torch.Tensor, dice: torch.Generator) -> torch.Tensor:
    """The log-likelihood, summed, of one token drawn at every position."""
    total = logits.new_zeros((), dtype=torch.float32)
    for row in logits:
        scores = row.float().log_softmax(-1)
        with torch.no_grad():
            cumulated = scores.exp().cumsum(-1)
            place = torch.rand(len(scores), 1, generator=dice).to(scores.device)
            drawn = torch.searchsorted(cumulated, place * cumulated[:, -1:])
            drawn.clamp_(max=scores.shape[-1] - 1)
        total = total + scores.gather(-1, drawn).sum()
    return total


@contextmanager
def _capturing(model: nn.Module) -> Iterator[tuple[list[_Call], list[torch.Tensor]]]:
    """Keep what every decoder layer is called with; the last layer's output becomes the leaf that
    gradients end at."""
    layers = [module for name, module in model.named_modules() if _DECODER_LAYER.search(name)]
    calls: list[_Call] = []
    leaf: list[torch.Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append(_Call(module, args, named))

    def after(module: nn.Module, _args: Any, output: Any) -> Any:
        for part in module.modules():
            if isinstance(part, Watched):
                part.forget()
        if module is not layers[-1]:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        leaf.append(hidden.detach().requires_grad_())
        return (leaf[0], *output[1:]) if isinstance(output, tuple) else leaf[0]

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield calls, leaf
    finally:
        for hook in hooks:
            hook.remove()


def _backward(kept: Sequence[_Kept], notes: Notes, ui: Reporter) -> None:
    count = len(kept[0].calls)
    ui.stage("schemes", count)
    for index in reversed(range(count)):
        layer = kept[0].calls[index].module
        watched = [module for module in layer.modules() if isinstance(module, Watched)]
        for module in watched:
            module.watching = True
        for batch in kept:
            batch.gradient = _through(batch.calls.pop(), batch.gradient)
            notes.close()
        for module in watched:
            module.watching = False
            module.forget()
        ui.advance(count - index)


def _through(call: _Call, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient at a layer's input, from that at its output."""
    args, named = list(call.args), dict(call.named)
    hidden = (args[0] if args else named["hidden_states"]).detach().requires_grad_()
    if args:
        args[0] = hidden
    else:
        named["hidden_states"] = hidden
    with torch.enable_grad():
        output = call.module(*args, **named)
    output = output[0] if isinstance(output, tuple) else output
    output.backward(gradient)
    back: torch.Tensor | None = hidden.grad
    assert back is not None
    return back
