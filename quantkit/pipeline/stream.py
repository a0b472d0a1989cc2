"""The way of the built-in streaming backend: no worker and no calibration; it can be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

from quantkit import __version__
from quantkit.backends.process.job import Reporter, Result
from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.provenance import CARD, PROVENANCE
from quantkit.formats.base import LayerSpec
from quantkit.formats.registry import packing, writer_named
from quantkit.pipeline.engine_view import ignore_list
from quantkit.pipeline.finish import finish
from quantkit.pipeline.plan import Plan
from quantkit.pipeline.publish import check_space, staged
from quantkit.pipeline.request import Outcome, Request
from quantkit.pipeline.seal import write_json
from quantkit.verification import Written

if TYPE_CHECKING:
    from quantkit.backends.streaming.job import Layout, ShardTask, StreamResult


def run(request: Request, source: Checkpoint, plan: Plan, ui: Reporter) -> Outcome:
    """Quantize shard by shard, then seal, verify and publish.

    A run that stops for any reason, up to the end of verification, leaves its finished shards in
    `DIR.partial` for `--resume`.
    Raises InputError (`stream.*`, `source.*`, `resume.*`, `output.*`) and CheckError.
    """
    from quantkit.backends.streaming.job import StreamOptions
    from quantkit.backends.streaming.run import clear_state, stream_quantize

    options = StreamOptions(**plan.recipe.options, on_nan=plan.recipe.on_nan)
    with staged(
        request.out, overwrite=request.overwrite, resumable=True, resume=request.resume
    ) as partial:
        if not request.resume:
            check_space(request.out, plan.estimate.disk, "the checkpoint")
        ui.stage("stream", source.weight_bytes, "bytes")
        done = stream_quantize(
            source,
            plan.layers,
            partial,
            options=options,
            shard_size=plan.recipe.shard_bytes(),
            jobs=request.jobs,
            memory=request.memory,
            executor=request.executor,
            resume=request.resume,
            device=request.device,
            on_progress=lambda read, _total: ui.advance(read),
        )
        plan = _without(plan, done.kept)
        layers = _written_layers(source, plan)
        config = quantization_config(source, plan, layers)
        write_json(partial / "config.json", {"quantization_config": config})
        plan = replace(plan, layers={name: spec.scheme for name, spec in layers.items()})
        for name in (PROVENANCE, CARD):
            (partial / name).unlink(missing_ok=True)
        outcome = finish(
            partial,
            request.out,
            request.model,
            plan,
            source,
            source.fingerprint(done.source_digests),
            None,
            _result(done),
            ui,
            Written(done.digests, done.source_digests, done.sqnr_db),
            trust_remote_code=request.trust_remote_code,
        )
        clear_state(partial)
        return outcome


def check(source: Checkpoint, plan: Plan) -> None:
    """Raise InputError for a layer whose shape, dtype or bias the streaming writer refuses."""
    _tasks(source, plan)


def _tasks(source: Checkpoint, plan: Plan) -> list[ShardTask]:
    from quantkit.backends.streaming.tasks import plan_shards

    layout = cast("Layout", plan.method.layout)
    return plan_shards(source, plan.layers, layout, plan.recipe.shard_bytes())


def _written_layers(source: Checkpoint, plan: Plan) -> dict[str, LayerSpec]:
    """The streamed layers; a fused expert tensor became a layer an expert, with names of theirs."""
    layout = plan.method.layout
    works = (work for task in _tasks(source, plan) for work in task.works)
    pieces = (piece for work in works for piece in work.pieces)
    return {
        piece.module: LayerSpec(
            piece.scheme, packing(piece.scheme, layout), (piece.source.rows, piece.source.columns)
        )
        for piece in pieces
    }


def quantization_config(
    source: Checkpoint, plan: Plan, layers: Mapping[str, LayerSpec]
) -> dict[str, Any]:
    """What config.json says of the streamed layers, in the layout that the recipe chose."""
    ignore = ignore_list(source, plan.kept)
    return writer_named(plan.method.layout).quantization_config(layers, ignore)


def _without(plan: Plan, kept: Mapping[str, str]) -> Plan:
    """The plan with layers that turned out to hold NaN left in 16 bit."""
    layers = {name: scheme for name, scheme in plan.layers.items() if name not in kept}
    return replace(plan, layers=layers, kept={**plan.kept, **kept})


def _result(done: StreamResult) -> Result:
    stages = [
        {"name": name, "seconds": seconds, "peak_rss_bytes": done.peak_memory}
        for name, seconds in done.seconds.items()
    ]
    notes = [*done.notes, *(f"{name} stays in 16 bit: {why}" for name, why in done.kept.items())]
    return Result(
        ok=True,
        stages=stages,
        versions={"quantkit": __version__, "torch": version("torch")},
        notes=notes,
        peak_rss_bytes=done.peak_memory,
    )
