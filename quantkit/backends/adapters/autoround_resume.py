"""AutoRound's checkpoints of tuned blocks, so that going on from them gives the same tensors.

The library (`AR_RESUME_DIR`, `auto_round/utils/resume.py`) records each tuned block, but not the
state of the random generators, and it overwrites what it would go on from. Here each block has
files of its own, with the generators and the shards that were complete at its end.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import auto_round.utils.resume as library
import numpy as np
import torch

from quantkit.backends.adapters.experts_seen import ExpertsSeen
from quantkit.backends.process.job import Job, JobInputError

_SHARDS = "model-shard-*"


def go_on(job: Job, model: torch.nn.Module, experts: ExpertsSeen) -> None:
    """Let the library keep its finished blocks in `job.resume_folder`, and find those there.

    With them is kept what `experts` has counted. What `job.out` holds beside the shards of finished
    blocks is removed.
    """
    assert job.resume_folder is not None
    out, folder = Path(job.out), Path(job.resume_folder)
    if not _only_finished(out, folder):
        for place in (out, folder):
            shutil.rmtree(place)
            place.mkdir()
    os.environ["AR_RESUME_DIR"] = str(folder)

    class Blocks(library.ResumeState):  # type: ignore[misc]
        """The library's record of one group of blocks, each block with files of its own."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self._at(len(self.completed_blocks))

        def _at(self, count: int) -> None:
            self.q_input_path = self.dir / f"q_input-{count}.pt"
            self.input_ids_path = self.dir / f"input_ids-{count}.pt"
            self.end_path = _end(self.dir, count)

        def mark_block_done(self, *arguments: Any) -> None:
            if len(self.completed_blocks) + 1 == len(self.block_names):
                return  # the library cannot go on after the last block
            before = (self.q_input_path, self.input_ids_path, self.end_path)
            self._at(len(self.completed_blocks) + 1)
            end = {"shards": _shards(out), "generators": _generators()}
            torch.save(end | {"experts": experts.summary()}, self.end_path)
            super().mark_block_done(*arguments)
            for path in before:
                path.unlink(missing_ok=True)

        def _load_tensor(self, path: Path) -> Any:
            loaded = super()._load_tensor(path)
            if loaded is None and (path.exists() or path == self.input_ids_path):
                raise JobInputError(
                    f"AutoRound's checkpoint of a finished block is damaged ({path.name}).",
                    hint="start anew without --resume",
                    code="resume.damaged",
                )
            return loaded

        def load_input_ids(self) -> Any:
            for name in self.completed_blocks:  # as the library leaves what it has written
                model.get_submodule(name).to("meta")
            end = torch.load(self.end_path, weights_only=True)
            experts.go_on(end["experts"])
            _restore(end["generators"])
            return super().load_input_ids()

    library.ResumeState = Blocks


def _only_finished(out: Path, folder: Path) -> bool:
    """Leave the shards of finished blocks alone in `out`; False where they are not all there.

    Only a model of one group of blocks is gone on with: shards tell nothing of their group.
    """
    groups = sorted(folder.glob("group_*"))
    if len(groups) != 1:
        return False
    try:
        manifest = json.loads((groups[0] / "resume_manifest.json").read_text(encoding="utf-8"))
        count = len(manifest["completed_blocks"])
        shards = torch.load(_end(groups[0], count), weights_only=True)["shards"]
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, UnpicklingError):
        return False
    found = _shards(out)
    if shards.items() - found.items():
        return False
    for path in out.rglob("*"):
        if path.is_file() and str(path.relative_to(out)) not in shards:
            path.unlink()
    return True


def _end(folder: Path, count: int) -> Path:
    return folder / f"end-{count}.pt"


def _shards(out: Path) -> dict[str, int]:
    """Size in bytes by path in `out` of the shards that are there."""
    return {str(path.relative_to(out)): path.stat().st_size for path in out.rglob(_SHARDS)}


def _generators() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, in what torch loads as data."""
    kind, keys, *rest = cast("tuple[str, np.ndarray[Any, Any], int, int, float]",
                             np.random.get_state())  # fmt: skip
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.copy().astype("int64")), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore(states: dict[str, Any]) -> None:
    kind, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
