"""Which files of a model directory are its weights, as Transformers and the engines choose them."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.headers import broken, read_header, read_json
from quantkit.errors import InputError

INDEX_SUFFIX = ".safetensors.index.json"
WEIGHTS = "model.safetensors"
DEQUANTIZED = "dequantized.json"
"""Says of which GGUF file, or quantized checkpoint, a cached directory was made."""
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTERS = ("adapter_model", "adapters.", "adapter.")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
_UNMERGED = re.compile(
    r"^base_model\.model\.|\.(lora_([AB]|down|up)|lora_embedding_[AB]|lora_magnitude_vector|base_layer"
    r"|modules_to_save|ia3_l|hada_w[12]_[ab])(\.|$)"
)

MERGE = (
    "import sys; from peft import AutoPeftModelForCausalLM as M; "
    "from transformers import AutoTokenizer as T; a, t, out = sys.argv[1:]; "
    'M.from_pretrained(a, torch_dtype="auto").merge_and_unload().save_pretrained(out); '
    "T.from_pretrained(t).save_pretrained(out)"
)
"""Arguments: the adapter, where its tokenizer is, the merged model's directory."""


def index_of(path: Path) -> Path | None:
    """The index of a directory's shards: the one of the usual name, or the only one.

    As the engines have it; Mistral's `consolidated` copy and an adapter's do not count. Raises
    InputError (`checkpoint.second_index`) when there are several and none has the usual name.
    """
    usual = path / f"model{INDEX_SUFFIX}"
    if os.path.lexists(usual):
        return usual
    found = [file for file in sorted(path.glob(f"*{INDEX_SUFFIX}")) if not _foreign(file.name)]
    if len(found) > 1:
        raise InputError(
            f"{path} has {len(found)} indices, {found[0].name} and {found[1].name}; "
            "engines read one.",
            hint="remove the index that does not belong to these weights",
            code="checkpoint.second_index",
        )
    return found[0] if found else None


def unindexed(path: Path) -> list[Path]:
    """The weight files of a directory without an index: model.safetensors alone where there is
    one, else its one set of numbered shards, else every file that is no adapter, no copy in
    Mistral's names and not hidden.

    Raises InputError: `checkpoint.adapter` where an adapter is all there is,
    `checkpoint.no_weights`, `checkpoint.two_sets` of shards, and `checkpoint.missing_shard` where
    a number is missing among shards.
    """
    if os.path.lexists(path / WEIGHTS):
        return [path / WEIGHTS]
    found = [file for file in sorted(path.glob("*.safetensors")) if not _foreign(file.name)]
    if not found:
        raise _none(path)
    shards = [(m[1], m[3], file) for file in found if (m := _NUMBERED.fullmatch(file.name))]
    sets = sorted({(stem, count) for stem, count, _ in shards})
    if len(sets) > 1:
        named = " and ".join(f"{stem}-…-of-{count}.safetensors" for stem, count in sets[:2])
        raise InputError(
            f"{path} holds {len(sets)} sets of shards, {named}, and no index says which is the "
            "model.",
            hint="move the set aside that does not belong to this config.json",
            code="checkpoint.two_sets",
        )
    for stem, count in sets:
        whole = {f"{stem}-{n + 1:05d}-of-{count}.safetensors" for n in range(int(count))}
        absent = sorted(whole - {file.name for file in found}) if len(count) == 5 else []
        if absent:
            raise broken(path / absent[0], "is absent, its neighbours are not", _MISSING)
    return [file for _, _, file in shards] or found


def missing_shard(path: Path, index_file: Path, weight_map: Mapping[str, str]) -> InputError:
    """The refusal of an index that names absent shards, and what it says of the others there."""
    named = sorted(set(weight_map.values()))
    absent = [file for file in named if not os.path.lexists(path / file)]
    others = strangers(path, weight_map)
    if not others:
        return broken(index_file, f"lists the shard {absent[0]}, which is absent", _MISSING)
    held = {name for file in others for name in read_header(path / file)}
    whole = set(weight_map) <= held
    told = "hold every tensor that it names" if whole else "hold other tensors"
    return InputError(
        f"{index_file} names {len(named)} shards, of which {len(absent)} are absent (the first is "
        f"{absent[0]}), while others lie beside it and {told}: {', '.join(others[:3])}"
        f"{' …' if len(others) > 3 else ''}.",
        hint=f"the index is of another model: remove it ({shlex.join(['rm', str(index_file)])}), "
        "the shards are read without"
        if whole
        else "download the shards that it names again, or give the directory of another copy",
        code=_MISSING,
    )


def strangers(path: Path, weight_map: Mapping[str, str]) -> list[str]:
    """Files that an index does not name and that would be read as the model without it."""
    listed = set(weight_map.values())
    found = (file.name for file in path.glob("*.safetensors"))
    return sorted(name for name in found if name not in listed and not _foreign(name))


_MISSING = "checkpoint.missing_shard"


def reading_notes(path: Path, used: Iterable[Path]) -> tuple[str, ...]:
    """A sentence each on what the weights are made from, and on files that look like weights and
    are not read."""
    names = {file.name for file in used}
    visible = (file.name for file in path.glob("*.safetensors") if not file.name.startswith("."))
    others = sorted(name for name in visible if name not in names)
    adapters = [name for name in others if name.startswith(_ADAPTERS)]
    if (path / ADAPTER_CONFIG).is_file() and not adapters:
        adapters = [ADAPTER_CONFIG]
    rest = [name for name in others if name not in adapters]
    notes = []
    if (path / DEQUANTIZED).is_file():
        notes.append(_made_from(read_json(path / DEQUANTIZED)))
    notes += newer_tokenizer(path)
    if adapters:
        notes.append(
            f"{_listed(adapters)} left aside: an adapter that is not merged; the base beside it is "
            "what is read"
        )
    if rest:
        notes.append(f"{_listed(rest)} left aside: Transformers does not read it as this model")
    return tuple(notes)


def _made_from(record: dict[str, Any]) -> str:
    """What a dequantized copy says of its source, a GGUF file or a quantized checkpoint."""
    if "layout" in record:
        what = (
            f"quantized itself ({record['layout']}; fingerprint {record.get('fingerprint')!s:.16})"
        )
    else:
        kinds = ", ".join(record.get("types") or ())
        what = f"the GGUF file {record.get('file')} ({kinds}; SHA-256 {record.get('sha256')!s:.16})"
    return f"the source is {what}, dequantized to BF16: its rounding stays in it"


def newer_tokenizer(path: Path) -> list[str]:
    """Says that the tokenizer's class is one of Transformers 5, which earlier ones lack."""
    file = path / "tokenizer_config.json"
    name = read_json(file).get("tokenizer_class") if file.is_file() else None
    if name not in ("TokenizersBackend", "SentencePieceBackend", "PythonBackend"):
        return []
    return [
        f"tokenizer_config.json names the class {name} of Transformers 5: an engine on "
        "Transformers 4 cannot read it (PreTrainedTokenizerFast is its name there)"
    ]


def refuse_adapter(path: Path, tensors: Iterable[str] = ()) -> None:
    """InputError (`checkpoint.adapter`) for a directory that is an adapter without its base, or
    whose `tensors` are those of an adapter."""
    mixed = next((name for name in tensors if _UNMERGED.search(name)), None)
    if mixed is not None:
        raise _adapter(path, f"holds an adapter that is not merged (tensor {mixed})")
    if _is_adapter(path):
        raise _adapter(path, "is an adapter (LoRA or the like), not a model")


def _is_adapter(path: Path) -> bool:
    weights = [*path.glob("*.safetensors"), *(f for p in _PICKLED for f in path.glob(p))]
    if any(not _foreign(file.name) and file.name != "training_args.bin" for file in weights):
        return False
    if index_of(path) is not None:
        return False
    return (path / ADAPTER_CONFIG).is_file() or any(f.name.startswith(_ADAPTERS) for f in weights)


def _adapter(path: Path, what: str) -> InputError:
    file = path / ADAPTER_CONFIG
    base = read_json(file).get("base_model_name_or_path") if file.is_file() else None
    tokenizer = path if any(path.glob("token*")) or not base else base
    merged = path.resolve().with_name(f"{path.resolve().name}-merged")
    command = [sys.executable, "-c", MERGE, str(path), str(tokenizer), str(merged)]
    return InputError(
        f"{path} {what}; it is trained for {base or 'a base model'} and means nothing alone.",
        hint=f"merge first (needs peft), then give {merged}: {shlex.join(command)}",
        code="checkpoint.adapter",
    )


def _none(path: Path) -> InputError:
    refuse_adapter(path)
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if ggufs:
        return InputError(
            f"{path} holds GGUF ({_listed(ggufs)}) and no *.safetensors weights.",
            hint=f"give that file to quantize or plan as MODEL: {path / ggufs[0]}",
            code="checkpoint.gguf",
        )
    others = [
        f
        for pattern in ("*.bin", "*.pt*", "*.ckpt", "*.h5", "*.msgpack")
        for f in sorted(path.glob(pattern))
    ]
    found = ", ".join(file.name for file in others)
    copies = sorted(file.name for file in path.glob("consolidated*.safetensors"))
    told = f" (found {found}, which can run code when read)" if found else ""
    if copies:
        told += f" ({_listed(copies)} has Mistral's own names, which Transformers does not read)"
    return InputError(
        f"{path} has a config.json but no *.safetensors weights{told}.",
        hint="download or convert the weights to safetensors",
        code="checkpoint.no_weights",
    )


def snapshots(path: Path) -> list[Path]:
    """The snapshots of a folder of the Hugging Face cache, models--ORGANISATION--NAME (or of its
    `snapshots`); the one that refs/main names comes first."""
    inner = path if path.name == "snapshots" else path / "snapshots"
    if not inner.is_dir() or (path / "config.json").exists():
        return []
    main = inner.parent / "refs" / "main"
    first = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    found = sorted(entry for entry in inner.iterdir() if entry.is_dir())
    return sorted(found, key=lambda entry: entry.name != first)


def _foreign(name: str) -> bool:
    return name.startswith((".", "consolidated", *_ADAPTERS))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
