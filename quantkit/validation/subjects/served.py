"""A real engine as a subject: vLLM, SGLang or Transformers in a process of its own."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantkit.backends.environments.device import devices_named, resolve_devices
from quantkit.backends.environments.room import refuse_absent_gpus
from quantkit.checkpoint.directory import Checkpoint, open_checkpoint
from quantkit.checkpoint.network.config import positions, stop_tokens
from quantkit.checkpoint.network.language import text_config
from quantkit.checkpoint.network.multimodal import is_multimodal
from quantkit.checkpoint.progress import Progress
from quantkit.engines import SILENT_GARBAGE
from quantkit.errors import InputError
from quantkit.formats.registry import detect, is_quantized
from quantkit.runtime.serving.drivers.base import EngineOrder
from quantkit.runtime.serving.environments import ENGINES, EngineProcessSpec, find_interpreter
from quantkit.runtime.serving.launch import SERVERS, flags_of
from quantkit.runtime.serving.process import EngineProcess
from quantkit.validation.subjects.base import TOP, Opening, Throughput, TopLogprobs

if TYPE_CHECKING:
    from quantkit.validation.subjects.base import Opener

LONGEST = 4096
"""No text or prompt of a validation is longer, with what is generated."""

_SEED = 0
_WEIGHT_ONLY = ("Marlin", "WNA16", "Wna16")
"""Parts of the names of kernels that compute with 16-bit activations."""


class Served:
    """A checkpoint in an engine process.

    What the engine leaves out on this GPU it leaves out when it serves there: gates are held.
    """

    weights_only = False

    def __init__(self, checkpoint: Checkpoint, process: EngineProcess, order: EngineOrder) -> None:
        self.name = process.engine.name
        self.version = process.version
        self._process = process
        self._order = order
        self._longest = _longest(checkpoint)
        self._positions = positions(checkpoint.config)
        self._vocabulary = int(text_config(checkpoint.config)["vocab_size"])
        left = [name for name in process.kernels if any(part in name for part in _WEIGHT_ONLY)]
        self.notes: Sequence[str] = ()
        if left and _quantizes_activations(checkpoint):
            self.notes = [
                f"{process.engine.title} leaves activations in 16 bit on this GPU: "
                f"{', '.join(left)}"
            ]

    def logprobs(
        self, windows: NDArray[np.int64], progress: Progress | None = None
    ) -> NDArray[np.float32]:
        return np.array(self._process.logprobs(windows.tolist(), progress), dtype=np.float32)

    def top_logprobs(
        self, windows: NDArray[np.int64], progress: Progress | None = None
    ) -> TopLogprobs:
        found = self._process.top_logprobs(windows.tolist(), self._order.likeliest, progress)
        return TopLogprobs(**found)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        return self._process.generate(prompts, new_tokens)

    def throughput(self, progress: Progress | None = None) -> Throughput:
        """As `throughput.measure`; the first token is timed by runs of one token."""
        from quantkit.validation.subjects.throughput import (
            BATCHES,
            NEW_TOKENS,
            PROMPT_TOKENS,
            REPEATS,
            fitting,
            row,
        )

        prompt_tokens, new_tokens = fitting(PROMPT_TOKENS, NEW_TOKENS, self._longest)

        total = len(BATCHES) * (REPEATS + 1)
        draw = random.Random(_SEED)  # noqa: S311
        rows = []
        for number, batch in enumerate(BATCHES):
            prompts = [draw.choices(range(self._vocabulary), k=prompt_tokens) for _ in range(batch)]
            first, rest = [], []
            for repeat in range(REPEATS + 1):
                one = self._process.seconds(prompts, 1)
                whole = self._process.seconds(prompts, new_tokens)
                if repeat:
                    first.append(one)
                    rest.append(max(whole - one, 1e-9))
                if progress:
                    progress(number * (REPEATS + 1) + repeat + 1, total)
            rows.append(row(batch, prompt_tokens, new_tokens, first, rest))
        return Throughput(self._process.load_seconds, self._process.memory_bytes, rows)

    def harness(self, asked: Mapping[str, Any]) -> dict[str, Any] | None:
        """What lm-eval's own backend for this engine finds; None where there is none.

        The engine makes room for the backend's: nothing can be asked of this subject afterwards.
        """
        engine = self._process.engine
        if not engine.harness:
            return None
        self._process.close()
        found = find_spec("lm_eval")
        assert found is not None
        assert found.origin is not None
        packages = str(Path(found.origin).parents[1])
        longest = max(asked["room"], self._order.length)
        length = min(longest, self._positions or longest)
        order = replace(
            self._order,
            driver=engine.harness,
            packages=packages,
            length=length,
            cache_bytes=self._order.cache_bytes * length // self._order.length,
        )
        process = EngineProcess(engine, find_interpreter(engine), order)
        try:
            return process.tasks(asked)
        finally:
            process.close()

    def kernels(self) -> dict[str, int]:
        return self._process.kernels

    def close(self) -> None:
        self._process.close()


def served(engine: EngineProcessSpec) -> Opener:
    """How an engine opens a checkpoint directory."""

    def open_served(path: Path, opening: Opening) -> Served:
        """Start the engine. Raises InputError for a checkpoint that it would load wrongly, and
        BackendError when its environment is not there or it fails."""
        refuse_served(engine, path, opening)
        checkpoint, python = open_checkpoint(path), find_interpreter(engine)
        order = engine_order(path, engine, opening)
        return Served(checkpoint, EngineProcess(engine, python, order), order)

    return open_served


def refuse_served(engine: EngineProcessSpec, path: Path, opening: Opening) -> None:
    """Raise what opening would raise, as far as it is known without starting the engine."""
    checkpoint = open_checkpoint(path)
    if opening.kernel != "auto":
        raise InputError(
            f"--kernel {opening.kernel} is of the builtin runtime; {engine.title} chooses its own.",
            hint="leave --kernel out, or validate with --engine builtin",
            code="validate.kernel",
        )
    if opening.as_on:
        raise InputError(
            f"--as-on {opening.as_on} is of the builtin runtime; {engine.title} computes as it "
            "does on the GPU that is here.",
            hint="leave --as-on out, or validate with --engine builtin",
            code="validate.as_on",
        )
    if opening.online is not None and opening.online.engine != engine.name:
        raise InputError(
            f"{opening.online.name} is a method of {opening.online.engine}, and {engine.title} is "
            "asked.",
            hint="--engine builtin, which emulates it",
            code="validate.online",
        )
    _refuse_garbage(checkpoint, engine)
    devices = resolve_devices(opening.device)
    if len(devices) > 1:
        _refuse_devices(engine, devices)
    if engine.name in SERVERS:
        flags_of(checkpoint, engine.name, len(devices))
    find_interpreter(engine)


OPENERS: dict[str, Opener] = {name: served(engine) for name, engine in ENGINES.items()}


def engine_order(path: Path, engine: EngineProcessSpec, opening: Opening) -> EngineOrder:
    """What an engine is told to start with for a checkpoint directory."""
    checkpoint = open_checkpoint(path)
    flags: dict[str, Any] = {}
    if engine.name in SERVERS:
        flags |= flags_of(checkpoint, engine.name, len(resolve_devices(opening.device)))
    if opening.online is not None:
        flags |= opening.online.flags
    config = text_config(checkpoint.config)
    length = _longest(checkpoint)
    heads = int(config["num_attention_heads"])
    size = int(config.get("head_dim") or config["hidden_size"] // heads)
    kept = int(config.get("num_key_value_heads") or heads)
    per_token = 2 * int(config["num_hidden_layers"]) * kept * size * 2
    return EngineOrder(
        driver=engine.driver,
        model=str(checkpoint.path.resolve()),
        device=opening.device,
        stop=tuple(stop_tokens(checkpoint.path, config)),
        length=length,
        cache_bytes=2 * length * per_token,
        flags=flags,
        towers=is_multimodal(checkpoint.config),
        likeliest=min(TOP, int(config["vocab_size"])),
    )


def _longest(checkpoint: Checkpoint) -> int:
    return min(LONGEST, positions(checkpoint.config) or LONGEST)


def _quantizes_activations(checkpoint: Checkpoint) -> bool:
    if is_quantized(checkpoint) is None:
        return False
    layers = detect(checkpoint).declare(checkpoint).layers.values()
    return any(spec.scheme.input is not None for spec in layers)


def _refuse_devices(engine: EngineProcessSpec, devices: Sequence[str]) -> None:
    """InputError for several devices that are no GPUs of this machine."""
    asked = devices_named(devices)
    if not asked.startswith("cuda"):
        raise InputError(
            f"{engine.title} is divided over NVIDIA GPUs here, not over {asked}.",
            hint="--device cuda:0,1, or one device",
            code="validate.devices",
        )
    refuse_absent_gpus(devices)


def _refuse_garbage(checkpoint: Checkpoint, engine: EngineProcessSpec) -> None:
    layout = detect(checkpoint).NAME if is_quantized(checkpoint) is not None else ""
    if engine.name == "transformers" and layout in SILENT_GARBAGE:
        raise InputError(
            SILENT_GARBAGE[layout],
            hint="validate with --engine vllm, sglang or builtin",
            code="validate.silent_garbage",
        )
