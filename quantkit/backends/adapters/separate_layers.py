"""The layers of a plan where a library makes every expert a module of its own, and their names in
what it writes.

Libraries save experts by the names that these have in memory, and engines look for those that the
family's own checkpoints have (`w1`, not `gate_proj`).
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from quantkit.backends.adapters.places import expert_blocks, kept_layers, locate, separated
from quantkit.backends.process.job import Job, JobInputError

_INDEX = "model.safetensors.index.json"


class SeparateLayers:
    """Made of the model before the library changes it.

    planned: linear layer of the model → its scheme; kept: its linear layers that stay in 16 bit, by
    name; names: each of these → its name in the checkpoint that is written; blocks: module that
    holds planned experts of a layer → its name in the checkpoint; mixture: whether there are
    experts, planned or not.

    Raises JobInputError for layers of the plan that the model has not.
    """

    def __init__(self, model: Any, job: Job) -> None:
        found, kept = locate(model, job), kept_layers(model, job)
        apart = separated(model, {**kept, **found})
        self.blocks = expert_blocks(found)
        self.mixture = bool(expert_blocks({**kept, **found}))
        self.planned = {name: job.layers[layer] for layer in found for name in apart[layer]}
        self.kept = [name for layer in kept for name in apart[layer] if name not in self.planned]
        self.names = {name: layer for each in apart.values() for name, layer in each.items()}
        self._renaming = [
            c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)
        ]
        self._source = {name: self._in_model(name) for name in tensor_names(Path(job.model))}
        self._tensors = {name: stored for stored, name in self._source.items()}

    @property
    def written(self) -> set[str]:
        """The planned layers by their names in the checkpoint that is written."""
        return {self.names[name] for name in self.planned}

    @property
    def renamed(self) -> bool:
        """Whether layers have other names in memory than in the checkpoint."""
        return any(name != stored for name, stored in self.names.items())

    def check_linear(self, model: torch.nn.Module, job: Job) -> None:
        """Raise JobInputError for experts that the library did not take apart."""
        modules = dict(model.named_modules())
        experts = [n for n in self.planned if any(n.startswith(f"{b}.") for b in self.blocks)]
        absent = [name for name in experts if not isinstance(modules.get(name), torch.nn.Linear)]
        if absent:
            raise JobInputError(
                f"{job.backend} makes no linear layer of {absent[0]} ({len(absent)} in all).",
                hint="keep the experts in 16 bit: --set ignore+=@experts",
                code=f"{job.backend}.experts",
            )

    def rename(self, out: Path) -> None:
        """Give the tensors in `out` the names of the checkpoint."""
        for file in out.glob("*.safetensors"):
            rename_tensors(file, self.tensor)
        index = out / _INDEX
        if index.is_file():
            document = json.loads(index.read_text(encoding="utf-8"))
            shards = document["weight_map"]
            document["weight_map"] = {self.tensor(name): shards[name] for name in shards}
            index.write_text(json.dumps(document, indent=2), encoding="utf-8")

    def tensor(self, name: str) -> str:
        """The checkpoint's name of a tensor; Transformers' own renaming may have been undone in
        it, which leaves that of the experts."""
        if name in self._source:
            return name
        inside = self._in_model(name)
        for known in (name, inside):
            module, _, leaf = known.rpartition(".")
            if module in self.names:
                return f"{self.names[module]}.{leaf}"
        return self._tensors.get(name, name)

    def _in_model(self, name: str) -> str:
        return rename_source_key(name, self._renaming, [])[0]


def tensor_names(folder: Path) -> Iterator[str]:
    """The names of all tensors in the safetensors files of a folder."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            yield from shard.keys()


def rename_tensors(file: Path, renamed: Callable[[str], str]) -> None:
    """Give the tensors of a safetensors file other names; their bytes are copied as they are."""
    with file.open("rb") as source:
        (size,) = struct.unpack("<Q", source.read(8))
        header = json.loads(source.read(size))
        new = {k if k == "__metadata__" else renamed(k): value for k, value in header.items()}
        if new.keys() == header.keys():
            return
        text = json.dumps(new, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        staged = file.with_name(f"{file.name}.renamed")
        with staged.open("wb") as target:
            target.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(source, target, 1 << 24)
    staged.replace(file)
