"""The engines as data: one YAML file an engine and range of versions, read into these classes.

`docs/engines.md` says what every key means and how to add a version. An unknown key is an error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from quantkit.checkpoint.schemes import Granularity

DATA = Path(__file__).parent / "versions"

Merges = Mapping[str, tuple[str, ...]]
"""Last part of a merged layer's name → those of its members, in the order they are stacked."""

Renaming = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class EngineFamily:
    """How an engine builds the models of some `model_type`s.

    merges: what becomes one layer. told: the part of it that the quantization settings know of
    (an ignore list that names the members of an untold merge is not understood).
    stored: layers that the checkpoint holds merged already → "qkv" or "pair" (two equal parts).
    plain: last name parts of layers that are built in 16 bit whatever the settings say.
    scale_names: names of FP8 scales that its loader renames besides the engine's own.
    misread: last name part of a layer → layouts and packings that the model class's own code, which
    takes the stored weight apart, does not know.
    rename: checkpoint name → engine name; maps: the same for the entries of the settings.
    plain_towers: whether vision and audio towers are built in 16 bit.
    experts: last name parts by which settings are asked about an expert: gate, up and down.
    reads: last name parts of experts that its loader knows. refused: why no quantized checkpoint of
    the family loads ("": it does).
    """

    types: tuple[str, ...]
    merges: Merges
    told: Merges
    stored: Mapping[str, str] = field(default_factory=dict)
    plain: frozenset[str] = frozenset()
    misread: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rename: Renaming = ()
    maps: Renaming = ()
    plain_towers: bool = False
    scale_names: tuple[str, ...] = ()
    experts: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    reads: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
    refused: str = ""
    known: bool = True


@dataclass(frozen=True)
class Served:
    """What an engine's kernels on some GPU make of a scheme, which changes the answers.

    note: what is done and what it costs. scales: the format to which those of blocks and of the
    input are rounded. outputs, inputs: of which the sides of a layer are multiples where it is done
    so. unless: the variable, with its value, under which it is not done.
    """

    note: str
    scales: Literal["e8m0"]
    outputs: int
    inputs: int
    unless: Mapping[str, str]

    @property
    def switched_off(self) -> bool:
        """Whether this process's environment says so."""
        return any(os.environ.get(name) == value for name, value in self.unless.items())


@dataclass(frozen=True)
class SchemeRule:
    """What an engine asks of a scheme.

    sm: the least compute capability; native: the one from which no weight-only detour is taken.
    moe: whether experts have a kernel ("only": nothing else has). groups: group sizes with one.
    symmetric: whether only symmetric weights load ("gptq": in that packing). block: what blocks of
    128 × 128 must divide besides every part of a shard ("merged": of an uncut layer all parts but
    the last, and an input that is cut; "input": the input also where it is not cut).
    tiles: whether a shard must fit Marlin's tiles as it is, 64 × 128 or 128 × 64 (output × input).
    multiple_of: what the input dimension of a shard must be divisible by. since, moe_since: the
    version that brought it, and its experts, where that lies within the range of the file;
    detour_since: that which brought the detour of GPUs below `native`. moe_dtype: the only dtype of
    a model whose experts its kernel takes.
    served: compute capability → what its kernels there do to layers that are no experts.
    """

    sm: int = 0
    native: int = 0
    moe: bool | Literal["only"] = False
    groups: tuple[int, ...] | None = None
    symmetric: bool | Literal["gptq"] = False
    block: Literal["merged", "input"] | None = None
    tiles: bool | Literal["gptq"] = False
    multiple_of: int = 1
    amd: bool | tuple[str, ...] | None = None
    npu: bool | None = None
    since: str = ""
    moe_since: str = ""
    detour_since: str = ""
    moe_dtype: str = ""
    served: Mapping[int, Served] = field(default_factory=dict)


@dataclass(frozen=True)
class OnlineRule:
    """What an engine's flag makes of a 16-bit checkpoint while it loads.

    scheme: that of the layers, "" where nothing here computes it, for the reason in `note`.
    granularity: of the weight's scales, where it is not the scheme's. experts_alone: whether dense
    layers stay in 16 bit. sm: the least compute capability.
    """

    scheme: str = ""
    sm: int = 0
    granularity: Granularity | None = None
    experts_alone: bool = False
    note: str = ""


@dataclass(frozen=True)
class FormatRule:
    """What an engine takes of a layout; `schemes` by scheme, or by the library's algorithm for
    ModelOpt and Ascend. `packings`: None is all of them; `amd_packings`: the same on AMD.
    mixed: whether each layer may have an algorithm of its own, or those of which one must be there.
    act_order: whether it loads columns out of order. unread: scheme → what differs, where it has
    the scheme but is not known to read the layout's tensors of it. scale_names: what it calls the
    scales of a weight and its input where there is one a tensor (FP8)."""

    schemes: Mapping[str, SchemeRule]
    kv_cache: tuple[str, ...] = ()
    nvidia: bool = True
    amd: bool = False
    npu: bool = False
    act_order: bool = True
    mixed: bool | tuple[str, ...] = False
    packings: tuple[str, ...] | None = None
    amd_packings: tuple[str, ...] | None = None
    unread: Mapping[str, str] = field(default_factory=dict)
    scale_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class KVCacheRule:
    """What an engine does with a quantized KV cache.

    scales: regular expressions for the names of scales that it takes up; scales_of: more of them in
    a layout. dropped: `model_type`s whose class takes up none; dropped_before: version → those of
    which older ones took up none. gpus: format → compute capabilities with kernels for it (others
    run on all); added: format → what a version within the range brought beyond these.
    """

    scales: tuple[str, ...] = ()
    scales_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    dropped_before: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gpus: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    added: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineRules:
    """One engine in one range of versions; `read` is the version whose sources were read.

    architectures: those of its registry; it runs others through Transformers, but for those that
    are `incompatible` with that. spread_experts: its flag for whole experts a rank. online: name →
    what it does to a 16-bit checkpoint; online_gone: beginning of a name → why no more.
    """

    engine: str
    name: str
    distribution: tuple[str, ...]
    versions: str
    read: str
    families: tuple[EngineFamily, ...]
    otherwise: EngineFamily
    rows: frozenset[str]
    whole: frozenset[str]
    match: Mapping[str, str]
    formats: Mapping[str, FormatRule]
    kv_cache: KVCacheRule
    architectures: frozenset[str]
    incompatible: frozenset[str]
    spread_experts: str
    online: Mapping[str, OnlineRule] = field(default_factory=dict)
    online_gone: Mapping[str, str] = field(default_factory=dict)

    @property
    def minimum_version(self) -> str:
        return self.versions.removeprefix(">=").partition(",")[0]

    def family(self, config: Mapping[str, Any]) -> EngineFamily:
        """The family of a model's config.json: of its own type, else of its language model's."""
        for model_type in model_types(config):
            for family in self.families:
                if model_type in family.types:
                    return family
        return self.otherwise


def model_types(config: Mapping[str, Any]) -> list[str]:
    """The `model_type` of a config.json, then those of the models nested in it."""
    nested = (config.get(key) for key in ("text_config", "llm_config", "thinker_config"))
    inside = [c.get("model_type") for c in nested if isinstance(c, dict)]
    return [kind for kind in (config.get("model_type"), *inside) if isinstance(kind, str)]


@cache
def engines() -> dict[str, EngineRules]:
    """Every engine whose rules are known, by name: the newest file of each."""
    found: dict[str, EngineRules] = {}
    for file in sorted(DATA.glob("*-*.yaml"), key=lambda f: _numbers(f.stem.rpartition("-")[2])):
        engine = _engine(yaml.load(file.read_text(encoding="utf-8"), _LOADER))  # noqa: S506
        found[engine.engine] = engine
    return dict(sorted(found.items(), reverse=True))


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _engine(raw: dict[str, Any]) -> EngineRules:
    merges = {
        name: {fused: tuple(members) for fused, members in group.items()}
        for name, group in raw.pop("merges").items()
    }
    layers = raw.pop("layers")
    return EngineRules(
        families=tuple(_family(entry, merges) for entry in raw.pop("families")),
        otherwise=_family({"types": [], "known": False, **raw.pop("otherwise")}, merges),
        architectures=frozenset(raw.pop("architectures").split()),
        incompatible=frozenset(raw.pop("incompatible").split()),
        rows=frozenset(layers["rows"]),
        whole=frozenset(layers["whole"]),
        formats={name: _format(entry) for name, entry in raw.pop("formats").items()},
        kv_cache=_kv_cache(raw.pop("kv_cache")),
        online={name: OnlineRule(**entry) for name, entry in raw.pop("online").items()},
        distribution=tuple(raw.pop("distribution")),
        read=str(raw.pop("read")),
        **raw,
    )


_LISTS = ("scale_names", "experts", "reads")


def _family(raw: dict[str, Any], merges: Mapping[str, Merges]) -> EngineFamily:
    def union(names: list[str]) -> Merges:
        return {fused: members for name in names for fused, members in merges[name].items()}

    rename = _renaming(raw.pop("rename", ()))
    lists = {key: tuple(raw.pop(key)) for key in _LISTS if key in raw}
    merged = raw.pop("merges")
    return EngineFamily(
        types=tuple(raw.pop("types")),
        merges=union(merged),
        told=union(raw.pop("told", merged)),
        plain=frozenset(raw.pop("plain", ())),
        misread=_frozen(raw.pop("misread", {})),
        rename=rename,
        maps=_renaming(raw.pop("maps")) if "maps" in raw else rename,
        **{**raw, **lists},
    )


def _renaming(pairs: Any) -> Renaming:
    return tuple((str(old), str(new)) for old, new in pairs)


def _format(raw: dict[str, Any]) -> FormatRule:
    schemes = {name: _scheme(entry) for name, entry in raw.pop("schemes").items()}
    return FormatRule(schemes=schemes, **_frozen(raw))


def _scheme(raw: dict[str, Any]) -> SchemeRule:
    served = {sm: Served(**entry) for sm, entry in raw.get("served", {}).items()}
    return SchemeRule(**{**_frozen(raw), "served": served})


def _kv_cache(raw: dict[str, Any]) -> KVCacheRule:
    nested = {key: _frozen(value) for key, value in raw.items() if isinstance(value, dict)}
    return KVCacheRule(**{**_frozen(raw), **nested})


def _frozen(raw: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in raw.items()}


def later(one: str, other: str) -> str:
    """The later of two versions; "" comes before all."""
    return max(one, other, key=lambda version: _numbers(version) if version else ())


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
