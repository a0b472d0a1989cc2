"""Saving and restoring ModelOpt's fake-quantized state, with what quantkit remembers of it."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import torch

from quantkit.backends.adapters.common import usual_scheme
from quantkit.backends.process.job import STATE_NOTE, Job, JobInputError, Result

NOTE_VERSION = 1
ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)


def save_state(model: torch.nn.Module, job: Job, result: Result) -> None:
    """Write `job.checkpoint_save`: what `mto.save` writes, and one more record, the note.

    torch reads its own records by name, so `torch.load` and `mto.restore` accept the file as any
    other. It appears under its name only when it is complete.
    """
    assert job.checkpoint_save is not None
    target = Path(job.checkpoint_save)
    partial = target.with_name(target.name + ".partial")
    mto.save(model, partial)
    note = {
        **job.checkpoint_note,
        "schema_version": NOTE_VERSION,
        "method": job.method,
        "scheme": asdict(usual_scheme(job)),
        "kv_cache": job.kv_cache,
        "options": job.options,
        "layers": {name: asdict(scheme) for name, scheme in job.layers.items()},
        "keep": job.keep,
        "versions": {name: version(name) for name in ("nvidia-modelopt", "torch", "transformers")},
        "calibration": result.calibration,
        "notes": result.notes,
    }
    with zipfile.ZipFile(partial, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        record = zipfile.ZipInfo(f"{folder}/{STATE_NOTE}", ZIP_EPOCH)
        archive.writestr(record, json.dumps(note, indent=2))
    os.replace(partial, target)  # noqa: PTH105


def restore_state(model: torch.nn.Module, job: Job) -> torch.nn.Module:
    """The base model with the state of `job.restore`: modelopt's structure, then its tensors.

    Nothing but tensors and plain values is unpickled. Raises JobInputError when the file holds
    something else, or tensors of another model.
    """
    assert job.restore is not None
    objects = torch.load(job.restore, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(objects, dict) or not {"modelopt_state", "model_state_dict"} <= set(objects):
        raise JobInputError(
            f"{job.restore} holds no modelopt_state beside its tensors, so it is not a quantized "
            "model that mto.save wrote.",
            hint="save the model with modelopt.torch.opt.save",
            code="state.not_modelopt",
        )
    saved = objects["model_state_dict"]
    differences = _differences(model.state_dict(), saved)
    if differences:
        raise JobInputError(
            f"{job.restore} was saved from another model than {job.model}: {len(differences)} "
            f"tensors differ, first {'; '.join(differences[:3])}.",
            hint="name the model that it was made from with --model",
            code="state.other_model",
        )
    restored = mto.restore_from_modelopt_state(model, objects["modelopt_state"])
    restored.load_state_dict(saved)
    assert isinstance(restored, torch.nn.Module)
    return restored


def _differences(base: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """Tensors of the 16-bit model that differ in name or shape, in words."""
    weights = {name: tensor for name, tensor in saved.items() if "_quantizer." not in name}
    found = []
    for name in sorted(base.keys() | weights.keys()):
        if name not in weights:
            found.append(f"{name} is not in the file")
        elif name not in base:
            found.append(f"{name} is not in the model")
        elif weights[name].shape != base[name].shape:
            found.append(
                f"{name} is {list(weights[name].shape)} in the file, {list(base[name].shape)} in "
                "the model"
            )
    return found
