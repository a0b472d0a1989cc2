"""Settings of single layers, as GPTQModel and AutoRound state them, by the names of the checkpoint.

The libraries write the names that layers have in memory, some as expressions
(`.*model\\.layers\\.0\\.mlp\\.gate.*`), and list of what stays in 16 bit only layers of the class
that they quantize: an engine would look for the codes of every other router.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.backends.adapters.kept_lists import complete_lists
from quantkit.backends.adapters.separate_layers import SeparateLayers
from quantkit.checkpoint.network.modules import block_names, layer_index

_FILES = ("config.json", "quantization_config.json", "quantize_config.json")
_KEPT = {"bits": 16, "data_type": "float"}
_BLOCKS = {"block_name_to_quantize", "to_quant_block_names"}
_BLOCK = re.compile(r"^.*?\.\d+\.")


def name_settings(out: Path, layers: SeparateLayers) -> None:
    """Rewrite the settings of the mixture in `out`, or of a model that has other names in memory;
    those of others stay as they are."""
    if not layers.mixture and not layers.renamed:
        return
    kept = [n for n in (layers.names[name] for name in layers.kept) if layer_index(n) is not None]
    for file in (out / name for name in _FILES):
        if file.is_file():
            document = json.loads(file.read_text(encoding="utf-8"))
            settings = document.get("quantization_config", document)
            _rewrite(settings, layers.names, kept)
            for key in _BLOCKS & settings.keys():
                settings[key] = ",".join(block_names(layers.written))
            file.write_text(json.dumps(document, indent=2), encoding="utf-8")
    complete_lists(out, kept, layers.names)


def _rewrite(settings: dict[str, Any], names: Mapping[str, str], kept: list[str]) -> None:
    method = settings.get("quant_method")
    if method == "auto-round":
        extra = {_named(entry, names): own for entry, own in _table(settings, "extra_config")}
        settings["extra_config"] = dict.fromkeys(kept, _KEPT) | extra
    if method == "gptq":
        rules = {
            f"{entry[:2]}^{re.escape(_named(entry[2:], names))}$": own
            for entry, own in _table(settings, "dynamic")
        }
        settings["dynamic"] = rules | {f"-:^{re.escape(name)}$": {} for name in kept}
    if method == "awq":
        listed = settings.get("modules_to_not_convert") or []
        single = {_named(name, names) for name in listed if not _is_block(name, names)}
        settings["modules_to_not_convert"] = sorted(single | set(kept))
    if listed := settings.get("modules_in_block_to_quantize"):
        inside = {_BLOCK.sub("", name): _BLOCK.sub("", own) for name, own in names.items()}
        settings["modules_in_block_to_quantize"] = [
            sorted(inside.get(name, name) for name in group) for group in listed
        ]


def _is_block(entry: str, names: Mapping[str, str]) -> bool:
    """Whether an entry is what layers lie in: AutoRound takes the language model's blocks, where
    their name in memory is not the one that it wrote, for others than those that it quantized."""
    return any(name.startswith(f"{entry}.") for name in names)


def _table(settings: dict[str, Any], key: str) -> list[tuple[str, Any]]:
    return list((settings.get(key) or {}).items())


def _named(entry: str, names: Mapping[str, str]) -> str:
    """The checkpoint's name of the module that an entry, by name or expression, spells."""
    bare = entry.removeprefix(".*").removesuffix(".*").removeprefix("^").removesuffix("$")
    name = re.sub(r"\\(.)", r"\1", bare)
    return names.get(name, name)
