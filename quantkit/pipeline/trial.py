"""How long a job will take, from a real trial: the same recipe on the model's first layers.

The trial runs twice, with one and with two decoder layers; what the second one adds is the price of
a layer, the rest is paid once (imports, embeddings, calibration tokens).
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.backends.process.job import Reporter
from quantkit.checkpoint.directory import Checkpoint, TensorInfo
from quantkit.checkpoint.headers import header_bytes
from quantkit.checkpoint.network.language import text_config
from quantkit.checkpoint.network.modules import layer_index
from quantkit.checkpoint.tensors import pieces
from quantkit.errors import InputError
from quantkit.pipeline.plan import Plan
from quantkit.pipeline.quantize import quantize
from quantkit.pipeline.request import Request

_TRIALS = (1, 2)


def measured_seconds(
    request: Request, source: Checkpoint, plan: Plan, ui: Reporter
) -> dict[str, float]:
    """Seconds of the whole job, extrapolated: `once`, `per_layer` and `total`.

    Raises InputError (`plan.measure`) without weights, and whatever the trial itself raises.
    """
    layers = int(text_config(source.config).get("num_hidden_layers") or 0)
    if source.derived or layers < len(_TRIALS):
        raise InputError(
            f"--measure times real layers, and of {source.path.name} "
            + ("no weights can be read yet." if source.derived else f"there are {layers}."),
            hint="leave out --measure, or give a directory with the weights",
            code="plan.measure",
        )
    seconds = []
    with tempfile.TemporaryDirectory(prefix="quantkit-measure-") as folder:
        for count in _TRIALS:
            ui.stage(f"trial with {count} of {layers} layers")
            model = _cut(source, count, Path(folder) / f"model{count}")
            start = time.monotonic()
            trial = replace(request, model=str(model), out=Path(folder) / f"out{count}")
            quantize(replace(trial, recipe=_lenient(plan)), ui)
            seconds.append(time.monotonic() - start)
    per_layer = max(seconds[1] - seconds[0], 0.0)
    once = max(seconds[0] - per_layer, 0.0)
    return {
        "once": round(once, 2),
        "per_layer": round(per_layer, 2),
        "total": round(once + per_layer * layers, 1),
    }


def _lenient(plan: Plan) -> Any:
    """The recipe without what may name layers that the trial has not got."""
    ignore = [entry for entry in plan.recipe.ignore if entry.startswith("@")]
    return plan.recipe.model_copy(update={"overrides": [], "ignore": ignore})


def _cut(source: Checkpoint, layers: int, target: Path) -> Path:
    """A copy of the model with its first decoder layers, in one shard."""
    target.mkdir()
    config = json.loads(json.dumps(source.config))
    text_config(config)["num_hidden_layers"] = layers  # type: ignore[index]
    for level in (config, text_config(config)):
        if isinstance(level.get("layer_types"), list):
            level["layer_types"] = level["layer_types"][:layers]  # type: ignore[index]
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in source.sidecars():
        shutil.copy(path, target / path.name)
    kept = [info for info in source.tensors.values() if (layer_index(info.name) or 0) < layers]
    _write_shard(target / "model.safetensors", kept)
    return target


def _write_shard(file: Path, tensors: list[TensorInfo]) -> None:
    head, places = header_bytes({info.name: (info.dtype, info.shape) for info in tensors})
    with file.open("wb") as out:
        out.write(head)
        for info in sorted(tensors, key=lambda info: places[info.name]):
            for piece in pieces(info):
                out.write(piece.data)
