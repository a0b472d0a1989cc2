"""`analyze`: what every scheme would do to every fusable group of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import __version__
from quantkit.backends.environments.device import resolve_device
from quantkit.backends.process.job import Reporter
from quantkit.calibration.tokenizer import read_tokenizer_info
from quantkit.checkpoint.directory import Checkpoint, open_checkpoint
from quantkit.checkpoint.hub import resolve_model
from quantkit.checkpoint.network.config import positions
from quantkit.checkpoint.network.language import text_config
from quantkit.checkpoint.schemes import Scheme
from quantkit.errors import InputError
from quantkit.formats.registry import is_quantized
from quantkit.validation.ask.data import EvalText, eval_text
from quantkit.validation.memory import (
    available_bytes,
    explained,
    needed_bytes,
    refuse_too_large,
)
from quantkit.validation.preflight import refuse_missing_rows, tokenizer_of
from quantkit.validation.search.cost import affordable, limit
from quantkit.validation.search.groups import Group, fusable_groups, schemes_named

if TYPE_CHECKING:
    from quantkit.validation.search.sensitivity import Cell, Measured

SCHEMA_VERSION = 1
KIND = "quantkit.sensitivity"


@dataclass(frozen=True)
class Sensitivity:
    """What `analyze` measured.

    cells: one a group and scheme that fits it. text: what was read; cost: how many forward passes
    over all windows asked for the whole took, counted and by the clock, the limit of the former,
    and seconds of the whole and of one such pass.
    """

    model: str
    engine: str
    schemes: Mapping[str, Scheme]
    groups: Sequence[Group]
    cells: Sequence[Cell]
    text: Mapping[str, Any]
    cost: Mapping[str, float]
    notes: Sequence[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The document of `quantkit analyze --json`."""
        by_group: dict[str, dict[str, Any]] = {group.name: {} for group in self.groups}
        sizes = {group.name: group.weights for group in self.groups}
        for cell in self.cells:
            by_group[cell.group][cell.scheme] = {
                "kl": cell.kl,
                "output_error": cell.error,
                "bytes_saved": round(2 * sizes[cell.group] - cell.bits / 8),
                "bits_per_weight": cell.bits / sizes[cell.group],
            }
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "quantkit_version": __version__,
            "model": self.model,
            "engine": self.engine,
            "text": dict(self.text),
            "schemes": {title: asdict(scheme) for title, scheme in self.schemes.items()},
            "groups": [
                {
                    "name": group.name,
                    "layer": group.layer,
                    "experts": group.experts,
                    "modules": [module.name for module in group.modules],
                    "weights": group.weights,
                    "schemes": by_group[group.name],
                }
                for group in self.groups
            ],
            "whole": {
                title: {
                    "kl": sum(found[title]["kl"] for found in by_group.values() if title in found),
                    "bytes_saved": sum(
                        found[title]["bytes_saved"] for found in by_group.values() if title in found
                    ),
                    "groups": sum(title in found for found in by_group.values()),
                }
                for title in self.schemes
            },
            "cost": dict(self.cost),
            "notes": list(self.notes),
        }


def analyze(
    model: str,
    schemes: Sequence[str],
    ui: Reporter,
    *,
    engine: str = "vllm",
    data: Path | None = None,
    samples: int = 32,
    device: str = "auto",
    seed: int = 0,
) -> Sensitivity:
    """Estimate the KL divergence and measure the output error of every fusable group × scheme.

    Raises InputError for schemes that are none, a model that is quantized or cannot be computed
    here, and for too little text.
    """
    named = schemes_named(schemes)
    if not named:
        raise InputError(
            "No scheme is named.", hint="--schemes w4a16,fp8_dynamic", code="search.no_scheme"
        )
    source = open_checkpoint(resolve_model(model))
    if found := is_quantized(source):
        raise InputError(
            f"{source.path} is quantized already ({found}).",
            hint="analyze its 16-bit original",
            code="search.quantized",
        )
    groups = fusable_groups(source, engine)
    text = read_text(source, data, samples)
    fits = {group.name: fitting(group, named) for group in groups}
    return sensitivity(source, model, groups, named, fits, text, engine, device, seed, ui)


def fitting(group: Group, schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """Those of the schemes whose groups divide the columns of its modules, as they fit."""
    found = {title: group.fitted(scheme) for title, scheme in schemes.items()}
    return {title: scheme for title, scheme in found.items() if scheme is not None}


def read_text(source: Checkpoint, data: Path | None, samples: int) -> EvalText:
    """Windows of text in the model's own tokens."""
    info = read_tokenizer_info(source.path)
    limits = [most for most in (info.max_length, positions(source.config)) if most]
    text = eval_text(data, tokenizer_of(source.path), samples, min(limits, default=None))
    refuse_missing_rows(source, text.windows.tolist())
    return text


def sensitivity(
    source: Checkpoint,
    name: str,
    groups: Sequence[Group],
    schemes: Mapping[str, Scheme],
    fits: Mapping[str, Mapping[str, Scheme]],
    text: EvalText,
    engine: str,
    device: str,
    seed: int,
    ui: Reporter,
) -> Sensitivity:
    """The cells of these groups in the schemes that fit them (`fits`), on as many of the windows as
    the cost allows."""
    from quantkit.validation.search.sensitivity import measure

    place, windows = resolve_device(device), affordable(text.windows, len(schemes))
    need = needed_bytes(source, expanded=False) + _kept_bytes(source, windows.size)
    free = available_bytes(place)
    streamed = free is not None and need > free
    if streamed:
        need -= _streamed_bytes(groups)
        refuse_too_large(str(source.path), need, place)
    with explained(str(source.path), need):
        found = measure(
            source, groups, fits, windows, device=place, seed=seed, ui=ui, streamed=streamed
        )
    notes = [
        f"{title} does not fit {len(out)} of {len(groups)} groups, {out[0]} among them"
        for title in schemes
        if (out := [group.name for group in groups if title not in fits[group.name]])
    ]
    if streamed:
        notes.append("the model exceeds the memory that is free: its layers were read one by one")
    seen = {cell.group for cell in found.cells}
    if missing := [group.name for group in groups if group.name not in seen and fits[group.name]]:
        notes.append(f"{len(missing)} groups computed nothing, {missing[0]} among them")
    return Sensitivity(
        name if not Path(name).exists() else source.path.resolve().name,
        engine,
        schemes,
        groups,
        found.cells,
        {
            "name": text.name,
            "digest": text.digest,
            "windows": len(text.windows),
            "measured_windows": len(windows),
            "length": windows.shape[1],
        },
        _cost(found, text.windows.size / windows.size, len(schemes)),
        notes,
    )


def _cost(found: Measured, more: float, schemes: int) -> dict[str, float]:
    """`more`: the tokens asked for over those measured."""
    forward = found.forward_seconds * more
    return {
        "passes": round(found.products / (found.forward_products * more), 2),
        "limit": limit(schemes),
        "timed_passes": round(found.seconds / forward, 2),
        "seconds": round(found.seconds, 2),
        "forward_seconds": round(forward, 2),
    }


def _kept_bytes(source: Checkpoint, tokens: int) -> int:
    """The inputs of all decoder layers in 16 bit, masks and positions aside."""
    config = text_config(source.config)
    return (
        2
        * tokens
        * int(config.get("hidden_size") or 0)
        * (int(config.get("num_hidden_layers") or 0) + 1)
    )


def _streamed_bytes(groups: Sequence[Group]) -> int:
    """What reading the decoder layers one by one saves: all but the largest, in 16 bit."""
    layers: dict[int | None, int] = {}
    for group in groups:
        layers[group.layer] = layers.get(group.layer, 0) + 2 * group.weights
    return sum(layers.values()) - max(layers.values(), default=0)
