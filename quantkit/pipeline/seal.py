"""From what a library wrote to a checkpoint that stands on its own: config, sidecars, digests.

The library's tensors are not touched. Its `config.json` gives the `quantization_config`; all other
keys, and every sidecar, come from the source model, so that nothing a library normalises, drops or
adds (temporary paths, times, rewritten tokenizers) reaches the user. Lists of modules get the names
by which the engines look for them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantkit.checkpoint.directory import INDEX_SUFFIX, Checkpoint, read_json
from quantkit.checkpoint.gguf import gguf_in
from quantkit.checkpoint.provenance import LOG, NOT_SEALED, RESUME_FOLDER
from quantkit.checkpoint.whole_files import remove, sha256_of
from quantkit.engines.complete_settings import completed
from quantkit.errors import BackendError

_QUANTIZATION_FILES = frozenset(
    {"hf_quant_config.json", "quantize_config.json", "quant_config.json", "recipe.yaml",
     "quant_model_description.json", "quantization_config.json"}
)  # fmt: skip
_VOLATILE = frozenset({"offload_to_disk_path", "timestamp", "created_at", "export_time"})


def seal(out: Path, source: Checkpoint, *, trust_remote_code: bool) -> list[str]:
    """Complete the library's output in `out`; returns what was done besides copying, in words.

    Raises BackendError when the library left no `quantization_config`, nor a description in
    Ascend's layout, whose config.json says nothing.
    """
    if gguf_in(out):
        # One file has everything inside; only the log may stay beside it.
        return _cleaned(out, lambda path: path.suffix == ".gguf" or path.name == LOG)
    notes = []
    raw = read_json(out / "config.json") if (out / "config.json").is_file() else {}
    quantization = raw.get("quantization_config")
    described = (out / "quant_model_description.json").is_file()
    if not isinstance(quantization, dict) and not described:
        raise BackendError(
            f"The library wrote no quantization_config into {out.name}/config.json.",
            hint="see the log; report this with it",
            code="seal.no_quantization_config",
        )
    config = dict(source.config)
    if isinstance(quantization, dict):
        settings = completed(without_volatile(quantization), source.config)
        config["quantization_config"] = settings
    custom_code = sorted(p.name for p in source.path.glob("*.py"))
    if custom_code and not trust_remote_code and config.pop("auto_map", None):
        notes.append(f"custom code left out ({', '.join(custom_code)}); auto_map removed")
    write_json(out / "config.json", config)
    sidecars = [path.name for path in source.sidecars()]
    for name in [*sidecars, *(custom_code if trust_remote_code else [])]:
        shutil.copyfile(source.path / name, out / name)
    notes += _cleaned(out, lambda path: _belongs(path, sidecars, custom_code))
    for name in sorted(_QUANTIZATION_FILES & {p.name for p in out.glob("*.json")}):
        document = without_volatile(read_json(out / name))
        write_json(out / name, completed(document, source.config))
    return notes


def _cleaned(out: Path, belongs: Callable[[Path], bool]) -> list[str]:
    """Make readable what belongs into `out` and remove the rest; what was removed, in words."""
    notes = []
    for path in sorted(out.iterdir()):
        if path.name == RESUME_FOLDER:
            continue
        if belongs(path):
            path.chmod(0o644)
        else:
            notes.append(f"removed {path.name}, which the library left behind")
            remove(path)
    return notes


def file_digests(out: Path) -> dict[str, str]:
    """SHA-256 of every file beside the weights, the card and the provenance itself."""
    return {
        path.name: sha256_of(path)
        for path in sorted(out.iterdir())
        if path.is_file()
        and path.suffix not in (".safetensors", ".gguf")
        and path.name not in NOT_SEALED
    }


def without_volatile(value: Any) -> Any:
    """The JSON value without keys that change from run to run."""
    if isinstance(value, dict):
        return {k: without_volatile(v) for k, v in value.items() if k not in _VOLATILE}
    if isinstance(value, list):
        return [without_volatile(item) for item in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _belongs(path: Path, sidecars: list[str], custom_code: list[str]) -> bool:
    name = path.name
    return path.is_file() and (
        name in ("config.json", LOG)
        or name.endswith((".safetensors", INDEX_SUFFIX))
        or name in _QUANTIZATION_FILES
        or name in sidecars
        or name in custom_code
    )
