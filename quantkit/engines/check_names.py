"""What an engine takes its layers for, against what the checkpoint holds for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quantkit.checkpoint.schemes import Scheme, described
from quantkit.engines.loadable import LayerPart, Loadable
from quantkit.engines.names import EngineLayer
from quantkit.engines.readers import reader
from quantkit.engines.readers.base import Reading, SettingsReader
from quantkit.engines.reasons import Reason
from quantkit.engines.rules import EngineFamily, EngineRules


def check_names(
    engine: EngineRules, family: EngineFamily, candidate: Loadable, layers: Sequence[EngineLayer]
) -> Iterator[Reason]:
    """Reasons of codes `engine.mixed_group`, `engine.ignore_unmatched`, `engine.ignore_overreach`,
    `engine.target_mismatch`, `engine.quantized_router` and `engine.expert_names`."""
    read = reader(engine, family, candidate)
    for layer in layers:
        kinds = _kinds(layer)
        if layer.experts:
            yield from _unread(engine, family, layer)
        if len(kinds) > 1:
            yield _mixed(engine, layer)
        elif _built_plain(family, layer):
            if kinds != {None}:
                yield Reason(
                    "engine.quantized_router",
                    f"{engine.name} builds {layer.name} in 16 bit; the checkpoint holds it as "
                    f"{described(layer.parts[0].scheme)}",
                    "keep it in 16 bit (ignore: @routers)",
                    layer.name,
                )
        elif read is not None:
            yield from _compare(engine, candidate.layout, layer, kinds != {None}, read)


def _unread(engine: EngineRules, family: EngineFamily, layer: EngineLayer) -> Iterator[Reason]:
    """Against experts that are stored one by one under names that the loader does not know."""
    leaves = dict.fromkeys(_leaf(part) for part in layer.parts if len(part.shape) == 2)
    other = [leaf for leaf in leaves if leaf not in family.reads]
    if other:
        yield Reason(
            "engine.expert_names",
            f"{engine.name} reads the experts of {layer.name} as {', '.join(family.reads)}; they "
            f"are stored as {', '.join(other)}",
            "keep the names of the original checkpoint",
            layer.name,
        )


_NAMED_IN = {
    "compressed-tensors": "the targets of its config group",
    "modelopt": "quantized_layers",
    "gptq": 'the quantized layers ("lm_head": true)',
    "awq": 'the quantized layers ("lm_head": true)',
    "auto-round": "extra_config, with its bits",
    "ascend": "quant_model_description.json, with its type",
}
"""Layout → where its settings name what is quantized."""


def _compare(
    engine: EngineRules, layout: str, layer: EngineLayer, held: bool, read: SettingsReader
) -> Iterator[Reason]:
    belief = read(layer)
    if belief.mixed:
        yield Reason(
            "engine.ignore_partial",
            f"{engine.name} finds an ignore entry for some members of {layer.name} "
            f"({_leaves(layer)}) and none for others",
            "list all members, or none",
            layer.name,
        )
    elif belief.quantized and not held:
        yield Reason(
            "engine.ignore_unmatched",
            f"{engine.name} takes {layer.name} for quantized, since no ignore entry matches that "
            f"name; its weights are 16 bit",
            f"add {layer.name!r} to the ignore list (quantize writes every engine's names)",
            layer.name,
        )
    elif held and not belief.quantized:
        because, fix = _why_plain(layout, layer, belief)
        yield Reason(
            "engine.ignore_overreach",
            f"{engine.name} takes {layer.name} for 16 bit, since {because}; the checkpoint "
            f"holds it as {described(layer.parts[0].scheme)}",
            fix,
            layer.name,
        )
    elif held and len(layer.parts) > 1 and not layer.experts:
        alone = [
            read(EngineLayer(part.name, (part,), layer.split)).settings for part in layer.parts
        ]
        if belief.settings not in alone and None not in alone:
            yield Reason(
                "engine.target_mismatch",
                f"{engine.name} gives {layer.name} the settings {_shown(belief.settings)}; its "
                f"members are stored with {', '.join(sorted(set(map(_shown, alone))))}",
                f"name {layer.name!r} beside its members, with the same settings",
                layer.name,
            )


def _why_plain(layout: str, layer: EngineLayer, belief: Reading) -> tuple[str, str]:
    """What made a quantized layer 16 bit for the engine, and the fix."""
    if belief.entry:
        fix = "write the entry as the whole name of the module that it means"
        return f"the entry {belief.entry!r} names it", fix
    if belief.because:
        return belief.because, f"keep it in 16 bit: --set 'ignore+=re:.*{layer.leaf}'"
    return "no target names it", f"add {layer.name!r} to {_NAMED_IN.get(layout, 'the targets')}"


def _built_plain(family: EngineFamily, layer: EngineLayer) -> bool:
    tower = family.plain_towers and layer.parts[0].kind == "tower"
    return layer.leaf in family.plain or tower


def _kinds(layer: EngineLayer) -> set[Scheme | None]:
    return {part.scheme for part in layer.parts}


def _mixed(engine: EngineRules, layer: EngineLayer) -> Reason:
    if layer.experts:
        shown: Mapping[Any, str] = {part.scheme: part.name for part in layer.parts}
        listed = ", ".join(f"{name} {described(scheme)}" for scheme, name in shown.items())
        return Reason(
            "engine.mixed_experts",
            f"{engine.name} holds all experts of {layer.name} in one scheme: {listed}",
            "give all experts of a block the same scheme",
            layer.name,
        )
    listed = ", ".join(f"{_leaf(part)} {described(part.scheme)}" for part in layer.parts)
    return Reason(
        "engine.mixed_group",
        f"{engine.name} merges {_leaves(layer)} into {layer.name}, one layer of one scheme: "
        f"{listed}",
        "give all of them the same scheme and group size, or keep all of them in 16 bit",
        layer.name,
    )


def _leaf(part: LayerPart) -> str:
    return part.name.rpartition(".")[2]


def _leaves(layer: EngineLayer) -> str:
    return ", ".join(_leaf(part) for part in layer.parts)


def _shown(settings: object) -> str:
    return ", ".join(map(str, settings)) if isinstance(settings, tuple) else str(settings)
