"""What adapters of libraries that take a Transformers model have in common."""

from __future__ import annotations

import logging
import random
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import align_module_device
from safetensors import safe_open

from quantkit.backends.process.job import Job, JobError, Reporter
from quantkit.checkpoint.schemes import NumberFormat, Scheme

_TELLING = re.compile(
    r"skip|fall(s|ing)?[ -]?back|fallback|round-to-nearest|disabl|unsupported|not support|failed",
    re.IGNORECASE,
)
"""Words of warnings that say that something was not done as asked."""
_EXPECTED = re.compile(r"is expected|recommended usage", re.IGNORECASE)
"""Words of warnings that would match, and say that all is well."""


def seed_everything(job: Job) -> None:
    """Seed Python's, NumPy's and torch's generators with the job's seed."""
    random.seed(job.seed)
    np.random.seed(job.seed)
    torch.manual_seed(job.seed)


def usual_scheme(job: Job) -> Scheme:
    """The recipe's scheme, which a job that quantizes always has."""
    assert job.scheme is not None
    return job.scheme


def modules_by_scheme(layers: Mapping[str, Scheme]) -> dict[Scheme, list[str]]:
    """The modules that share a scheme, in the order of the plan."""
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in layers.items():
        groups.setdefault(scheme, []).append(name)
    return groups


def bits_and_group(number: NumberFormat) -> dict[str, Any]:
    """An integer format in the words of GPTQModel and AutoRound (group -1: the whole row)."""
    return {
        "bits": number.bits,
        "group_size": number.group_size or -1,
        "sym": number.symmetric,
    }


def unplanned(model: torch.nn.Module, job: Job) -> list[str]:
    """Linear modules of the model that the plan does not quantize, by name."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in job.layers
    ]


def norms(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the weights that are vectors (norms), by module name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.ndim == 1:
            with align_module_device(module):  # brings an offloaded weight in
                found[name] = module.weight.detach().clone()
    return found


def folded(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, list[str]]:
    """`Result.folds`: the norms that changed."""
    changed = [name for name, weight in before.items() if not weight.equal(after[name])]
    return {"norm": changed} if changed else {}


def check_followed(job: Job, quantized: set[str], planned: Collection[str] | None = None) -> None:
    """Raise JobError unless the library quantized exactly the modules of the plan.

    `planned` are their names in the model, where those are not the checkpoint's.
    """
    wanted = set(job.layers if planned is None else planned)
    missed, extra = sorted(wanted - quantized), sorted(quantized - wanted)
    if missed or extra:
        raise JobError(
            f"{job.backend} quantized {len(quantized)} modules where the plan names {len(wanted)}: "
            f"{len(missed)} left out {missed[:3]}, {len(extra)} too many {extra[:3]}.",
            hint="put the modules that the library leaves out on the recipe's ignore list",
            code=f"{job.backend}.plan_not_followed",
        )


def packed_modules(out: str, *suffixes: str) -> set[str]:
    """Modules that have a tensor of one of these last name parts in the checkpoint `out`."""
    found = set()
    for file in Path(out).glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            parts = (name.rpartition(".") for name in shard.keys())  # noqa: SIM118
            found |= {module for module, _, suffix in parts if suffix in suffixes}
    return found


def telling(text: str) -> bool:
    """Whether a warning says that something was not done as asked."""
    return bool(_TELLING.search(text)) and not _EXPECTED.search(text)


@contextmanager
def warnings_as_notes(report: Reporter, keep: Collection[str] = ()) -> Iterator[None]:
    """Pass on those Python warnings that tell of something left out; all go to the log too.

    One that names a module of `keep` says what was asked for.
    """
    with warnings.catch_warnings():
        show = warnings.showwarning

        def showwarning(message: Warning | str, *rest: Any) -> None:
            show(message, *rest)
            words = str(message).split()
            if telling(str(message)) and not any(word in keep for word in words):
                report.note(" ".join(words))

        warnings.showwarning = showwarning  # type: ignore[assignment]
        yield


@contextmanager
def logs_as_notes(name: str, report: Reporter) -> Iterator[None]:
    """Pass on warnings of the logger of this name that tell of something left out."""

    class Notes(logging.Handler):
        """Turns log records into notes."""

        def emit(self, record: logging.LogRecord) -> None:
            text = " ".join(record.getMessage().split())
            if telling(text):
                report.note(text)

    handler = Notes(logging.WARNING)
    logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger(name).removeHandler(handler)
