"""A GGUF file as a source: dequantized to a BF16 Hugging Face directory, which is cached.

Transformers reads the file, so the architectures are those that it can read. The values lie on the
file's own lattice; every comparison is with this dequantized model.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.checkpoint.directory import is_sidecar
from quantkit.checkpoint.gguf import GgufFile, open_gguf
from quantkit.checkpoint.headers import read_json
from quantkit.checkpoint.paths import cache_dir, keep_first
from quantkit.checkpoint.weight_files import DEQUANTIZED
from quantkit.errors import InputError

_HEADER = b"GGUF"


def gguf_source(path: Path) -> Path | None:
    """The GGUF file that a model's path means: itself, or the only weights of a directory.

    Raises InputError (`gguf.several`) for a directory with several, `gguf.unreadable` for a file
    of that name that is none.
    """
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        other = [p for p in ("*.safetensors", "*.bin", "*.pt", "*.pth") if any(path.glob(p))]
        if not files or other or (path / "model.safetensors.index.json").exists():
            return None
        if len(files) > 1:
            raise InputError(
                f"{path} holds {len(files)} GGUF files: {', '.join(f.name for f in files[:4])}.",
                hint=f"give one of them as MODEL, such as {files[0]}; the parts of a split file "
                "are merged first: llama-gguf-split --merge FIRST OUT",
                code="gguf.several",
            )
        return files[0]
    if not path.is_file():
        return None
    with path.open("rb") as handle:
        named = handle.read(4) == _HEADER
    return path if named or path.suffix == ".gguf" else None


def dequantized(file: Path) -> Path:
    """The BF16 directory of a GGUF file; made first when it is not cached.

    Sidecars beside the file (its tokenizer, templates) replace those made from it. Raises
    InputError: `gguf.unreadable`, `gguf.architecture` where Transformers cannot read the model.
    """
    held = read_source(file)
    sidecars = [p for p in sorted(file.parent.iterdir()) if p.is_file() and is_sidecar(p.name)]
    key = _digest([file, *sidecars])
    target = cache_dir() / "gguf" / key[:16] / file.stem
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_space(file, target.parent, bf16_bytes(held))
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        staged = Path(work) / file.stem
        _in_child(held, staged)
        for path in sidecars:
            shutil.copyfile(path, staged / path.name)
        types = dict(_types(held))
        record = {"file": file.name, "sha256": _digest([file]), "types": types}
        (staged / DEQUANTIZED).write_text(json.dumps(record, indent=2) + "\n")
        keep_first(staged, target)
    return target


def config_of(held: GgufFile) -> dict[str, Any]:
    """The config.json that Transformers makes of the file's metadata; no tensor is read.

    Raises InputError (`gguf.architecture`) where it cannot.
    """
    with tempfile.TemporaryDirectory() as work:
        _in_child(held, Path(work) / "config.json")
        return read_json(Path(work) / "config.json")


def planning_note(held: GgufFile) -> str:
    """What a plan of a GGUF file says of the work before it."""
    kinds = ", ".join(kind for kind, _ in _types(held))
    return (
        f"the source is the GGUF file {held.file.name} ({kinds}): quantize dequantizes it to BF16 "
        f"first, {bf16_bytes(held) / 1e9:.2f} GB in {cache_dir()}; its rounding stays in it"
    )


def bf16_bytes(held: GgufFile) -> int:
    """Size of the dequantized weights."""
    return 2 * sum(tensor.elements for tensor in held.tensors.values())


def _types(held: GgufFile) -> list[tuple[str, int]]:
    """ggml type → how many tensors, the most frequent first."""
    return Counter(tensor.type for tensor in held.tensors.values()).most_common()


def _check_space(file: Path, place: Path, size: int) -> None:
    needed, free = round(size * 1.02) + 32_000_000, shutil.disk_usage(place).free
    if free < needed:
        raise InputError(
            f"{place} has {free / 1e9:.2f} GB free; {file.name} dequantized to BF16 needs about "
            f"{needed / 1e9:.2f} GB.",
            hint="free some space, or set QUANTKIT_CACHE to a directory on a larger disk",
            code="gguf.no_space",
        )


def read_source(file: Path) -> GgufFile:
    """Header and metadata of a GGUF file. Raises InputError (`gguf.unreadable`)."""
    with file.open("rb") as handle:
        if handle.read(4) != _HEADER:
            raise _unreadable(file, "it does not begin with GGUF")
    with tempfile.TemporaryDirectory() as alone:  # the directory may hold others
        (Path(alone) / file.name).symlink_to(file.resolve())
        try:
            held = open_gguf(Path(alone))
        except InputError as problem:
            said = problem.message.partition(": ")[2] or problem.message
            raise _unreadable(file, said) from problem
    if not held.tensors:
        raise _unreadable(file, "it holds no tensors")
    return replace(held, path=file.parent, file=file)


def _unreadable(file: Path, why: str) -> InputError:
    return InputError(
        f"{file} cannot be read as GGUF: {why}",
        hint=f"copy or download {file.name} again, or give the 16-bit original (safetensors)",
        code="gguf.unreadable",
    )


def _digest(files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()


def _in_child(held: GgufFile, target: Path) -> None:
    """Convert to the directory `target`, or write the config alone to `target` (*.json)."""
    file = held.file.name
    command = [
        sys.executable,
        "-m",
        "quantkit.checkpoint.gguf_source",
        str(held.path),
        file,
        str(target),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        raise InputError(
            f"{file} (GGUF, architecture {held.architecture or 'unnamed'}) cannot be read as a "
            f"source: {lines[-1][:300]}",
            hint="give the model's 16-bit original (safetensors) instead; a GGUF file is served as "
            "it is with llama.cpp",
            code="gguf.architecture",
        )


def load(source: Path, file: str) -> tuple[Any, Any]:
    """Model (BF16) and tokenizer of a GGUF file, as Transformers reads them; heavy imports."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=file,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    return model, AutoTokenizer.from_pretrained(source, gguf_file=file)


def save(model: Any, tokenizer: Any, target: Path) -> None:
    """Write both as a Hugging Face directory that does not tell where it was made."""
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    config_file = target / "config.json"
    config = json.loads(config_file.read_text())
    config.pop("_model_name_or_path", None)
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def _save_config(source: Path, file: str, target: Path) -> None:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = AutoConfig.from_pretrained(source, gguf_file=file)
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    target.write_text(json.dumps({"architectures": [architecture], **config.to_diff_dict()}))


if __name__ == "__main__":
    out = Path(sys.argv[3])
    if out.suffix == ".json":
        _save_config(Path(sys.argv[1]), sys.argv[2], out)
    else:
        save(*load(Path(sys.argv[1]), sys.argv[2]), out)
        for written in out.iterdir():
            written.chmod(0o644)
