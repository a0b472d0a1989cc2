"""ModelOpt's checkpoints of calibrated layers, so that going on from them gives the same tensors.

The library (`layerwise.checkpoint_dir`, `utils/layerwise_calib.py`) keeps each layer's quantizers,
and beside them the next layer's inputs for every layer, though it goes on from the last alone; it
does not look whether a file is whole. The calibration tokens are shown to the model for all but the
last layer, so a run goes on two layers before the end at the latest: it then sees them once.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from quantkit.backends.process.job import Job, JobInputError

_MANIFEST = "manifest.json"
_LAST_LAYERS = 2
"""Layers that are calibrated again when all, or all but one, were."""


def prepare(job: Job) -> None:
    """Leave checkpoints in `job.resume_folder` that the library can go on from, or none, and
    nothing in `job.out`.

    Raises JobInputError (`resume.damaged`) when a file that it would read is not whole.
    """
    assert job.resume_folder is not None
    out, folder = Path(job.out), Path(job.resume_folder)
    _empty(out)
    manifest = _read(folder)
    done = min(manifest["last_completed_layer"] + 1, manifest["num_layers"] - _LAST_LAYERS)
    if done <= 0:
        _empty(folder)
        return
    files = [
        _layer(folder, number) / name
        for number in range(done)
        for name in ("output_meta.pt", "quantizer_state.pt", "quantizer_buffers.pt")
    ]
    for file in (*files, _inputs(folder, done - 1)):
        _refuse_damaged(file)
    (folder / _MANIFEST).write_text(json.dumps({**manifest, "last_completed_layer": done - 1}))


def forget(job: Job) -> None:
    """Remove the inputs of layers that no run will go on from any more."""
    folder = Path(job.resume_folder or job.out)
    for number in range(_read(folder)["last_completed_layer"] - _LAST_LAYERS):
        _inputs(folder, number).unlink(missing_ok=True)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _read(folder: Path) -> dict[str, Any]:
    """The library's record of what is finished; of nothing where there is none."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return {**manifest, "last_completed_layer": int(manifest["last_completed_layer"]),
                "num_layers": int(manifest["num_layers"])}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return {"last_completed_layer": -1, "num_layers": 0}


def _layer(folder: Path, number: int) -> Path:
    return folder / f"layer_{number:04d}"


def _inputs(folder: Path, number: int) -> Path:
    """What the layer after that one is shown."""
    return _layer(folder, number) / "next_inputs.pt"


def _refuse_damaged(file: Path) -> None:
    """By the check sums of the archive that torch writes."""
    try:
        with ZipFile(file) as archive:
            if archive.testzip() is None:
                return
    except (OSError, BadZipFile):
        pass
    raise JobInputError(
        f"ModelOpt's checkpoint of a finished layer is damaged ({file.parent.name}/{file.name}).",
        hint="start anew without --resume",
        code="resume.damaged",
    )
