"""What several tests need: cutting, copying and damaging real checkpoints."""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.directory import is_sidecar
from quantkit.checkpoint.network.modules import layer_index
from quantkit.formats.base import LayerSpec


@contextmanager
def alone(what: str) -> Iterator[None]:
    """Keep tests of several test processes apart whose effect the whole machine sees."""
    with Path(tempfile.gettempdir(), f"quantkit-test-{what}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cut_layers(source: Path, target: Path, layers: int) -> Path:
    """A copy of a one-file model that keeps its first `layers` decoder layers."""
    target.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    config["num_hidden_layers"] = layers
    (target / "config.json").write_text(json.dumps(config, indent=2))
    tensors = load_file(source / "model.safetensors")
    kept = {
        name: tensor for name, tensor in tensors.items() if (layer_index(name) or 0) < layers
    }  # fmt: skip
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    for path in source.iterdir():
        if is_sidecar(path.name) or path.name == "README.md":
            shutil.copy(path, target / path.name)
    return target


def copy_checkpoint(source: Path, target: Path) -> Path:
    """A writable copy of a checkpoint directory."""
    shutil.copytree(source, target)
    return target


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=2))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a one-file checkpoint in place."""
    file = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        file,
        metadata={"format": "pt"},
    )


def merge_shards(directory: Path) -> Path:
    """Put all tensors of a checkpoint into one file, which needs no index."""
    files = sorted(directory.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for file in (*files, directory / "model.safetensors.index.json"):
        file.unlink(missing_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def tensor_name(module: str, suffix: str, spec: LayerSpec) -> str:
    """The full name of a declared layer's tensor (the inverse of `inventory.take`)."""
    if spec.experts:
        return module if suffix == "weight" else f"{module}_{suffix}"
    return f"{module}.{suffix}"
