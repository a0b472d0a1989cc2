"""What quantkit adds to an output directory, and quantkit.json: how a checkpoint was made.

The file is untrusted input: `read` checks every field that is there and refuses by its name. Fields
may be absent, since earlier releases did not write all of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from quantkit.checkpoint.headers import read_json
from quantkit.checkpoint.json_fields import Fields
from quantkit.errors import command

PROVENANCE = "quantkit.json"
CARD = "README.md"
LOG = "quantkit.log"
RESUME_FOLDER = ".stream"
"""In `DIR.partial`: what a run that can be resumed remembers, until the output is complete."""

SCHEMA_VERSION = 1
NOT_SEALED = frozenset({PROVENANCE, CARD})
"""Files that `Provenance.files` has no digest of: what a validation measured is added to them."""


@dataclass(frozen=True)
class Source:
    """The model that a checkpoint was made from: its name on the Hub, or its directory's last part.

    `fingerprint` is `Checkpoint.fingerprint`; `faults` are code and place of what it lacked itself.
    """

    name: str = ""
    fingerprint: str = ""
    faults: tuple[tuple[str, str | None], ...] = ()


@dataclass(frozen=True)
class Calibration:
    """The mixture by name and what of it reached the model (`digest` by `token_digest`).

    `digest` is None for a state that was calibrated elsewhere.
    """

    samples: int | None = None
    tokens: int | None = None
    digest: str | None = None
    passes: int | None = None
    modules: int | None = None
    name: str | None = None
    sequence_length: int | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Calibration | None:
        """The parts that are known here; None where nothing was calibrated."""
        names = {entry.name for entry in fields(cls)} & values.keys()
        return cls(**{name: values[name] for name in names}) if values else None


@dataclass(frozen=True)
class ExpertCoverage:
    """Calibration tokens that each expert of a mixture saw, counted at the experts themselves.

    `routed` and `seen` map the block of a layer's experts to the tokens of each: those that its
    router sent, and those that each was computed for (all of them with `calibrated` "all"); a block
    whose router the library did not run is not in `routed`. `min` and `median` are of `seen`;
    `under_floor` maps experts that saw fewer than `floor` to their tokens, and `decided` says what
    became of them ("keep16", "rtn").
    """

    calibrated: str
    floor: int
    min: int
    median: float
    routed: Mapping[str, list[int]]
    seen: Mapping[str, list[int]]
    under_floor: Mapping[str, int] = field(default_factory=dict)
    decided: str | None = None


@dataclass(frozen=True)
class Layers:
    """Module → the name of its scheme, and module → why it stays in 16 bit."""

    quantized: Mapping[str, str]
    kept: Mapping[str, str]


@dataclass(frozen=True)
class Stage:
    """A part of the run; `cpu_seconds` over all threads, where it was measured."""

    name: str
    seconds: float
    cpu_seconds: float | None = None
    peak_rss_bytes: int | None = None


@dataclass(frozen=True)
class WeightSqnr:
    """Weight SQNR in dB against the source, over the quantized layers."""

    mean: float
    min: float
    worst_layer: str


@dataclass(frozen=True)
class Results:
    """What came out; `bits_per_weight` of the quantized layers; `validation` is the report of
    `quantkit validate` without its raw material."""

    source_bytes: int = 0
    weight_bytes: int = 0
    bits_per_weight: float = 0.0
    weight_sqnr_db: WeightSqnr | None = None
    validation: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Provenance:
    """The content of quantkit.json: what was asked for, what did it, and what came out.

    `recipe` is the recipe as resolved; `versions` of Python and the libraries by distribution;
    `placement` says where the weights lay, why, and what was expected to be needed;
    `compute` says how bfloat16 was computed where that is not the CPU's own; `folds` names the
    modules that the method rewrote; `tensors` and `files` hold SHA-256 by name.
    """

    schema_version: int | None = None
    quantkit_version: str | None = None
    method: str | None = None
    recipe: Mapping[str, Any] | None = None
    source: Source | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    compute: str = ""
    placement: Mapping[str, Any] | None = None
    seed: int | None = None
    calibration: Calibration | None = None
    experts: ExpertCoverage | None = None
    plan: Layers | None = None
    folds: Mapping[str, Any] | None = None
    stages: tuple[Stage, ...] = ()
    peak_rss_bytes: int | None = None
    notes: tuple[str, ...] = ()
    results: Results = field(default_factory=Results)
    tensors: Mapping[str, str] | None = None
    files: Mapping[str, str] | None = None

    @property
    def gates(self) -> tuple[str, ...]:
        """The gates of the recipe, as they are written there."""
        return tuple((self.recipe or {}).get("gates") or ())

    def to_json(self) -> dict[str, Any]:
        """The document as it is written: plain JSON values."""
        document = {key: value for key, value in asdict(self).items() if value is not None}
        if not self.compute:
            del document["compute"]
        if self.source:
            faults = [{"code": code, "where": where} for code, where in self.source.faults]
            document["source"]["faults"] = faults
            if not faults:
                del document["source"]["faults"]
        document["calibration"] = _stated(self.calibration, "digest")
        document["stages"] = [_stated(stage) for stage in self.stages]
        document["notes"] = list(self.notes)
        document["results"] = _stated(self.results)
        return document


def read(directory: Path) -> Provenance | None:
    """The directory's quantkit.json, None where there is none.

    Raises InputError for a file that is no JSON object (`checkpoint.bad_json`), or that holds
    something else than this package writes (`validate.provenance`).
    """
    file = directory / PROVENANCE
    return _parse(file, read_json(file)) if file.exists() else None


def write(directory: Path, provenance: Provenance) -> None:
    """Write the directory's quantkit.json."""
    (directory / PROVENANCE).write_text(_text(provenance.to_json()), encoding="utf-8")


def add_validation(directory: Path, report: Mapping[str, Any]) -> Provenance:
    """Put what a validation measured into quantkit.json, the rest as it stands; what is in it now.

    The file is replaced at once. Raises InputError as `read` does, and OSError.
    """
    file = directory / PROVENANCE
    document = read_json(file)
    document["results"] = {**(document.get("results") or {}), "validation": dict(report)}
    replace_text(file, _text(document))
    return _parse(file, document)


def replace_text(file: Path, text: str) -> None:
    """Give a file another content, with its mode, so that no reader sees half of it."""
    staged = file.with_name(f".{file.name}.{os.getpid()}")
    staged.write_text(text, encoding="utf-8")
    staged.chmod(file.stat().st_mode & 0o777)
    staged.replace(file)


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _stated(value: Any, *always: str) -> dict[str, Any] | None:
    """The fields of a dataclass that are not None, and those of `always`."""
    if value is None:
        return None
    return {k: v for k, v in asdict(value).items() if v is not None or k in always}


def _parse(file: Path, document: Mapping[str, Any]) -> Provenance:
    hint = "put the file back that quantkit wrote, or remove it; " + command("verify", file.parent)
    stated = Fields(file, document, hint, "validate.provenance")
    version = stated.whole("schema_version")
    if version not in (None, SCHEMA_VERSION):
        raise stated.wrong("schema_version", version, f"{SCHEMA_VERSION}, which this version reads")
    if recipe := stated.inside("recipe"):
        recipe.every("gates", str, "a list of words")
    return Provenance(
        schema_version=version,
        quantkit_version=stated.text("quantkit_version"),
        method=stated.text("method"),
        recipe=stated.table("recipe"),
        source=_source(stated.inside("source")),
        versions=stated.texts("versions", "an object of texts") or {},
        compute=stated.text("compute") or "",
        placement=stated.table("placement"),
        seed=stated.whole("seed"),
        calibration=_calibration(stated.inside("calibration")),
        experts=_experts(stated.inside("experts")),
        plan=_layers(stated.inside("plan")),
        folds=stated.table("folds"),
        stages=tuple(_stage(stated, entry) for entry in stated.every("stages", dict, "a list")),
        peak_rss_bytes=stated.whole("peak_rss_bytes"),
        notes=tuple(stated.every("notes", str, "a list of texts")),
        results=_results(stated.inside("results")),
        tensors=_digests(stated, "tensors"),
        files=_digests(stated, "files"),
    )


def _source(stated: Fields | None) -> Source | None:
    if stated is None:
        return None
    faults = stated.every("faults", dict, "a list of findings")
    if not all(isinstance(entry.get("code"), str) for entry in faults):
        raise stated.wrong("faults", faults, "a list of findings")
    places = [None if (at := entry.get("where")) is None else str(at) for entry in faults]
    return Source(
        name=stated.text("name") or "",
        fingerprint=stated.text("fingerprint") or "",
        faults=tuple((entry["code"], at) for entry, at in zip(faults, places, strict=True)),
    )


def _calibration(stated: Fields | None) -> Calibration | None:
    if stated is None:
        return None
    counts = ("samples", "tokens", "passes", "modules", "sequence_length")
    return Calibration(
        name=stated.text("name"),
        digest=stated.text("digest"),
        **{key: stated.whole(key) for key in counts},
    )


def _experts(stated: Fields | None) -> ExpertCoverage | None:
    if stated is None:
        return None
    tables = {key: stated.table(key) or {} for key in ("routed", "seen", "under_floor")}
    for key in ("routed", "seen"):
        for block, counts in tables[key].items():
            if not isinstance(counts, list) or not all(isinstance(n, int) for n in counts):
                raise stated.wrong(f"{key}[{block!r}]", counts, "a list of whole numbers")
    return ExpertCoverage(
        calibrated=stated.text("calibrated") or "",
        floor=stated.whole("floor") or 0,
        min=stated.whole("min") or 0,
        median=stated.number("median") or 0.0,
        decided=stated.text("decided"),
        **tables,
    )


def _layers(stated: Fields | None) -> Layers | None:
    if stated is None:
        return None
    quantized = stated.texts("quantized", "an object of scheme names")
    kept = stated.take("kept", (dict, list), "an object or a list")
    if quantized is None or kept is None:
        raise stated.wrong("quantized" if quantized is None else "kept", None, "an object")
    reasons = kept if isinstance(kept, dict) else dict.fromkeys(map(str, kept), "")
    return Layers(quantized, {str(name): str(why) for name, why in reasons.items()})


def _stage(stated: Fields, entry: dict[str, Any]) -> Stage:
    stage = stated.of(entry, "stages.")
    return Stage(
        name=stage.text("name") or "",
        seconds=stage.number("seconds") or 0.0,
        cpu_seconds=stage.number("cpu_seconds"),
        peak_rss_bytes=stage.whole("peak_rss_bytes"),
    )


def _results(stated: Fields | None) -> Results:
    if stated is None:
        return Results()
    sqnr = stated.inside("weight_sqnr_db")
    return Results(
        source_bytes=stated.whole("source_bytes") or 0,
        weight_bytes=stated.whole("weight_bytes") or 0,
        bits_per_weight=stated.number("bits_per_weight") or 0.0,
        weight_sqnr_db=None if sqnr is None else _sqnr(sqnr),
        validation=stated.table("validation"),
    )


def _sqnr(stated: Fields) -> WeightSqnr:
    return WeightSqnr(
        mean=stated.number("mean") or 0.0,
        min=stated.number("min") or 0.0,
        worst_layer=stated.text("worst_layer") or "",
    )


def _digests(stated: Fields, key: str) -> dict[str, str] | None:
    found = stated.texts(key, "an object of SHA-256 digests")
    for name, digest in (found or {}).items():
        if len(digest) != 64:
            raise stated.wrong(f"{key}[{name!r}]", digest, "a SHA-256 digest")
        if key == "files" and Path(name).name != name:
            raise stated.wrong(key, name, "a name in the directory")
    return found
