"""What really reaches the model: token ids at the embedding, and how far the layers have come.

Libraries shuffle, sort, cut or drop samples; a hook on the embedding sees what they make of the
token file. Samples may come in batches, with or without their padding, in several passes.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load_file

from quantkit.backends.process.job import Job, JobError, Reporter, token_digest

_PICTURE = re.compile(r"picture\.(\d+)\.(.+)")
_BLOCK = re.compile(r"(?:layers|h|blocks)\.(\d+)$")


def never_ran(what: str) -> JobError:
    """Calibration that the method needs did not happen."""
    return JobError(
        f"{what}.",
        hint="another mixture or more samples: quantkit calibration list",
        code="calibration.never_ran",
    )


class Tokens:
    """The job's token file: `ids` and `masks`, [samples, length] int64 each, and for samples with
    pictures the other arguments of the model's forward pass, by their number."""

    def __init__(self, job: Job) -> None:
        assert job.tokens is not None
        tensors = load_file(job.tokens)
        self.ids, self.masks = tensors["input_ids"], tensors["attention_mask"]
        self.pictures: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if found := _PICTURE.match(name):
                self.pictures.setdefault(int(found.group(1)), {})[found.group(2)] = tensor

    def __len__(self) -> int:
        return len(self.ids)

    def batches(self, size: int) -> list[dict[str, torch.Tensor]]:
        """All samples in order, as keyword arguments of a model: `size` at a time, and those with
        pictures one by one and without their padding.

        The tensors are copies: AutoRound writes into the masks that it is given.
        """
        batches, start = [], 0
        while start < len(self.ids):
            end = start + 1
            while end < min(start + size, len(self.ids)) and self.pictures.keys().isdisjoint(
                (start, end)
            ):
                end += 1
            seen = self.pictures.get(start, {})
            width = int(self.masks[start].sum()) if seen else self.ids.shape[1]
            rows = slice(start, end)
            batches.append(
                {
                    "input_ids": self.ids[rows, :width].clone(),
                    "attention_mask": self.masks[rows, :width].clone(),
                    **{name: tensor.clone() for name, tensor in seen.items()},
                }
            )
            start = end
        return batches

    def samples(self) -> list[list[int]]:
        """The ids of every sample without its padding."""
        pairs = zip(self.ids, self.masks, strict=True)
        return [ids[mask.bool()].tolist() for ids, mask in pairs]


class SeenTokens:
    """Collects what passes through a model's embedding while a library calibrates."""

    def __init__(self, tokens: Tokens | None, report: Reporter) -> None:
        self.tokens = tokens
        self.report = report
        self.seen: list[array[int]] = []
        self.reached: set[str] = set()

    @contextmanager
    def watch(self, model: Any, stage: str, layers: Collection[str] = ()) -> Iterator[None]:
        """Hook the model; `stage` is reported with the number of the decoder block at work.

        Every one of `layers` must have run at the end, or JobError is raised.
        """
        blocks = {
            int(found.group(1)): module
            for name, module in model.named_modules()
            if (found := _BLOCK.search(name))
        }
        self.block = -1
        self.report.stage(stage, len(blocks))
        hooks = (
            []
            if self.tokens is None
            else [model.get_input_embeddings().register_forward_pre_hook(self.embedded)]
        )
        hooks += [
            module.register_forward_pre_hook(self._at(index)) for index, module in blocks.items()
        ]
        hooks += [
            model.get_submodule(name).register_forward_pre_hook(self._ran(name)) for name in layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        missed = sorted(set(layers) - self.reached)
        if missed:
            raise never_ran(f"{len(missed)} modules saw no calibration data: {missed[:3]}")

    def summary(self, modules: int | None = None) -> dict[str, Any]:
        """`Result.calibration`; JobError when the library ran no, or not the same, samples.

        `modules` is how many were calibrated, where `watch` could not see them run.
        """
        assert self.tokens is not None
        count = len(self.tokens)
        if not self.seen:
            raise never_ran("No calibration token reached the model")
        passes = [self.seen[start : start + count] for start in range(0, len(self.seen), count)]
        digests = {token_digest(samples) for samples in passes}
        if len(digests) != 1:
            raise JobError(
                f"The library ran {len(self.seen)} samples, which is no number of passes over the "
                f"{count} calibration samples, or changed some of them.",
                hint="run it again; if it happens twice, report it with the log",
                code="calibration.unstable",
            )
        return {
            "samples": count,
            "tokens": sum(len(sample) for sample in passes[0]),
            "digest": digests.pop(),
            "passes": len(passes),
            "modules": len(self.reached) if modules is None else modules,
        }

    def embedded(self, _: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        """Forward pre-hook of the embedding: keep the ids that arrive, padding left out."""
        assert self.tokens is not None
        for ids in arguments[0].reshape(-1, arguments[0].shape[-1]).cpu():
            mask = self.tokens.masks[len(self.seen) % len(self.tokens)].bool()
            padded = len(ids) == len(mask)
            self.seen.append(array("q", (ids[mask] if padded else ids).tolist()))

    def _ran(self, name: str) -> Any:
        def ran(*_: Any) -> None:
            self.reached.add(name)

        return ran

    def _at(self, index: int) -> Any:
        def entered(*_: Any) -> None:
            if index > self.block:
                self.block = index
                self.report.advance(index)

        return entered
