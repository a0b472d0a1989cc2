"""A library's quantization settings with every engine's names in its lists."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from quantkit.engines.aliases import expanded, merged_aliases

_LISTS = ("ignore", "exclude_modules", "modules_to_not_convert")
_ESCAPED_NAME = re.compile(r"([-+]?:?)\^?((?:\w|\\?\.)+)\$?")


def completed(settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the settings, of any layout, with the aliases of the modules that they name.

    Lists of modules left in 16 bit get the engines' names; targets, `dynamic` rules and per-layer
    entries the names of merged layers whose members have the same settings. `config`: config.json.
    """
    result = dict(settings)
    if isinstance(result.get("quantization"), dict):  # hf_quant_config.json
        result["quantization"] = completed(result["quantization"], config)
    for key in _LISTS:
        if isinstance(result.get(key), list):
            result[key] = expanded(result[key], config)
    for key in ("extra_config", "quantized_layers"):
        if isinstance(result.get(key), dict):
            result[key] = _with_merged(result[key])
    if isinstance(result.get("config_groups"), dict):
        result["config_groups"] = {
            name: _with_merged_targets(group) for name, group in result["config_groups"].items()
        }
    if isinstance(result.get("dynamic"), dict):
        result["dynamic"] = _with_merged_rules(result["dynamic"])
    return result


def _with_merged(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Name → settings, with the merged name of members whose settings are equal."""
    added: dict[str, Any] = {}
    for names in _alike(entries):
        added |= dict.fromkeys(merged_aliases(names), entries[names[0]])
    return {**entries, **{name: value for name, value in added.items() if name not in entries}}


def _with_merged_targets(group: Any) -> Any:
    targets = group.get("targets") if isinstance(group, dict) else None
    if not isinstance(targets, list):
        return group
    return {**group, "targets": list(dict.fromkeys([*targets, *merged_aliases(targets)]))}


def _with_merged_rules(rules: Mapping[str, Any]) -> dict[str, Any]:
    """GPTQ's regular expressions, where they spell one name each."""
    spelled = {}
    for rule, changes in rules.items():
        found = _ESCAPED_NAME.fullmatch(rule)
        if found:
            name = found.group(2).replace("\\", "")
            spelled[name] = (found.group(1), changes)
    added: dict[str, Any] = {}
    for names in _alike(spelled):
        sign, changes = spelled[names[0]]
        added |= {f"{sign}{re.escape(name)}$": changes for name in merged_aliases(names)}
    return {**rules, **{rule: value for rule, value in added.items() if rule not in rules}}


def _alike(entries: Mapping[str, Any]) -> Collection[list[str]]:
    """Names with equal settings, together."""
    groups: dict[str, list[str]] = {}
    for name, value in entries.items():
        groups.setdefault(repr(value), []).append(name)
    return groups.values()
