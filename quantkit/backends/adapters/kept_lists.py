"""The lists of layers that stay in 16 bit, in the words of the checkpoint, whole.

A library lists what it met: modules of the class that it quantizes, by their names in memory.
Engines look for the names in the file, and quantize what is not listed, a router too.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import safe_open

_FILES = ("config.json", "hf_quant_config.json")
_LISTS = ("ignore", "exclude_modules")


def complete_lists(out: Path, kept: Iterable[str], renamed: Mapping[str, str]) -> None:
    """In every list of `out`: module names of the model become the checkpoint's (`renamed`), and
    each of `kept`, the checkpoint's names, is covered; names of nothing are taken out. The targets
    of groups of layers are renamed alike."""
    names = list(kept)
    present = {*names, *_prefixes(out)}
    for file in (out / name for name in _FILES):
        if not file.is_file():
            continue
        document = json.loads(file.read_text(encoding="utf-8"))
        settings = document.get("quantization_config" if file.name == "config.json" else
                                "quantization")  # fmt: skip
        if isinstance(settings, dict) and _complete(settings, names, renamed, present):
            file.write_text(json.dumps(document, indent=2), encoding="utf-8")


def _prefixes(out: Path) -> Iterator[str]:
    """Every module of the checkpoint in `out`, and those that hold it."""
    for file in out.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                while name := name.rpartition(".")[0]:
                    yield name


def _complete(
    settings: dict[str, Any], kept: list[str], renamed: Mapping[str, str], present: Collection[str]
) -> bool:
    changed = False
    for group in (settings.get("config_groups") or {}).values():
        targets = group.get("targets") or []
        group["targets"] = [renamed.get(target, target) for target in targets]
        changed |= group["targets"] != targets
    for key in _LISTS:
        entries = settings.get(key)
        if isinstance(entries, list):
            # ModelOpt 0.47 leaves a marker in names when it renames a model's prefix.
            entries = [str(entry).partition(".\0")[0] for entry in entries]
            new = dict.fromkeys(renamed.get(entry, entry) for entry in entries)
            globs = [entry for entry in new if any(c in entry for c in "*?[")]
            known = [
                entry
                for entry in new
                if entry in present or entry in globs or entry.startswith("re:")
                or entry.endswith("lm_head")
            ]  # fmt: skip
            settings[key] = [*known, *(name for name in kept if not _covered(name, new, globs))]
            changed = True
    return changed


def _covered(name: str, entries: Collection[str], globs: Iterable[str]) -> bool:
    return name in entries or any(fnmatchcase(name, pattern) for pattern in globs)
