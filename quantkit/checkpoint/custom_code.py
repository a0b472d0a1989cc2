"""The Python code that a checkpoint brings: what `--trust-remote-code` would run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SETTINGS = (
    "config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
    "image_processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
_MODULES = (
    "configuration_*.py", "modeling_*.py", "tokenization_*.py", "processing_*.py",
    "image_processing_*.py", "video_processing_*.py", "feature_extraction_*.py",
)  # fmt: skip
"""What Transformers calls the files of a model's own code."""


def brought_code(path: Path) -> list[str]:
    """What code a directory brings: its modules' files, and those that an `auto_map` names, also
    in another repository ("owner/name--module")."""
    files = {file.name for pattern in _MODULES for file in path.glob(pattern)}
    for name in _SETTINGS:
        for reference in _references(_auto_map(path / name)):
            files.add(f"{reference.partition('.')[0]}.py")
    return sorted(files)


def _auto_map(file: Path) -> Any:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent, or reported where it is needed
        return None
    return settings.get("auto_map") if isinstance(settings, dict) else None


def _references(stated: Any) -> list[str]:
    """The strings anywhere in an `auto_map`."""
    if isinstance(stated, str):
        return [stated]
    if isinstance(stated, dict):
        stated = list(stated.values())
    return [r for part in stated for r in _references(part)] if isinstance(stated, list) else []
