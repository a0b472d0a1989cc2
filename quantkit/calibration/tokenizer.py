"""What a model directory says about text: tokenizer, chat template, end-of-text id, limits.

Read from the files themselves: `tokenizer.json` through the library tokenizers, which loads in
a tenth of a second, and only a model without that file through Transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantkit.checkpoint.directory import is_sidecar, read_json
from quantkit.errors import InputError

NOT_TOKENIZER = ("generation_config.json", "processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class TokenizerInfo:
    """A model's tokenizer before it is loaded; `digest` covers its files and the ids below."""

    model: Path
    digest: str
    library: str
    chat_template: str | None
    special_tokens: Mapping[str, str]
    eos: int | None
    pad: int
    vocab_size: int | None
    max_length: int | None


@dataclass(frozen=True)
class Tokenizer:
    """`encode(text, special)` gives ids, with the ids that the tokenizer puts around a document
    when `special`; `decode(ids)` gives text in which special tokens are visible."""

    encode: Callable[[str, bool], list[int]]
    decode: Callable[[Sequence[int]], str]


def read_tokenizer_info(model: Path, trust_remote_code: bool = False) -> TokenizerInfo:
    """Describe the tokenizer of a model directory.

    Raises InputError when there is none, or when it needs code that is not allowed to run.
    """
    config = read_json(model / "config.json") if (model / "config.json").is_file() else {}
    text_config = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    config = {**config, **(text_config or {})}
    generation = _optional(model / "generation_config.json")
    settings = _optional(model / "tokenizer_config.json")
    files = [
        path
        for path in sorted(model.iterdir() if model.is_dir() else [])
        if path.is_file() and is_sidecar(path.name) and not path.name.endswith(NOT_TOKENIZER)
    ]
    fast = (model / "tokenizer.json").is_file()
    names = {path.name for path in files} - {"tokenizer_config.json"}
    if not any(not name.startswith("chat_template") for name in names):
        raise InputError(
            f"{model} has no tokenizer, so no text can be made into calibration tokens.",
            hint="copy tokenizer.json and tokenizer_config.json of the base model into it",
            code="calibration.no_tokenizer",
        )
    if not fast and "AutoTokenizer" in settings.get("auto_map", {}):
        if not trust_remote_code:
            raise InputError(
                f"The tokenizer of {model} is Python code of its own.",
                hint="read that code, then add --trust-remote-code",
                code="calibration.remote_code",
            )
        files += sorted(model.glob("*.py"))
    special = _special_tokens(model, settings)
    eos = _first_id(generation.get("eos_token_id"), config.get("eos_token_id"))
    if eos is None:
        eos = _id_of(special.get("eos_token"), model, settings)
    pad = _first_id(generation.get("pad_token_id"), config.get("pad_token_id"), eos, 0)
    total = hashlib.sha256(json.dumps([eos, pad]).encode())
    for path in files:
        total.update(path.name.encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    library = "tokenizers" if fast else "transformers"
    assert pad is not None
    return TokenizerInfo(
        model=model,
        digest=total.hexdigest(),
        library=f"{library} {version(library)}",
        chat_template=_chat_template(model, settings),
        special_tokens=special,
        eos=eos,
        pad=pad,
        vocab_size=_positive(config.get("vocab_size")),
        max_length=_positive(config.get("max_position_embeddings")),
    )


def load_tokenizer(info: TokenizerInfo, trust_remote_code: bool = False) -> Tokenizer:
    """Load it. Raises InputError when its files cannot be read."""
    try:
        if info.library.startswith("tokenizers"):
            return _load_fast(info.model / "tokenizer.json")
        return _load_slow(info.model, trust_remote_code)
    except Exception as error:  # the libraries raise plain Exception, OSError, ValueError, ...
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"The tokenizer of {info.model} cannot be read: {first}",
            hint="copy the tokenizer files of the base model into it again",
            code="calibration.bad_tokenizer",
        ) from error


def _load_fast(file: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Fast

    fast = Fast.from_file(str(file))
    fast.no_truncation()
    fast.no_padding()
    return Tokenizer(
        encode=lambda text, special: list(fast.encode(text, add_special_tokens=special).ids),
        decode=lambda ids: str(fast.decode(list(ids), skip_special_tokens=False)),
    )


def _load_slow(model: Path, trust_remote_code: bool) -> Tokenizer:
    from transformers import AutoTokenizer

    slow = AutoTokenizer.from_pretrained(
        model, trust_remote_code=trust_remote_code, local_files_only=True
    )
    return Tokenizer(
        encode=lambda text, special: list(
            slow(text, add_special_tokens=special, verbose=False)["input_ids"]
        ),
        decode=lambda ids: str(slow.decode(list(ids))),
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _chat_template(model: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja, chat_template.json, or the (default) one in tokenizer_config.json."""
    file = model / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = _optional(model / "chat_template.json").get("chat_template")
    found = found or settings.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _special_tokens(model: Path, settings: dict[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and the like, as a chat template may use them."""
    found = {}
    for name, value in {**_optional(model / "special_tokens_map.json"), **settings}.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _id_of(token: str | None, model: Path, settings: dict[str, Any]) -> int | None:
    """The id of an added token by its text, from the tokenizer's own files."""
    listed = _optional(model / "tokenizer.json").get("added_tokens", [])
    decoder = settings.get("added_tokens_decoder", {})
    ids = {entry.get("content"): entry.get("id") for entry in listed}
    ids |= {entry.get("content"): int(number) for number, entry in decoder.items()}
    return ids.get(token) if token else None


def _first_id(*candidates: Any) -> int | None:
    for value in candidates:
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
    return None


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
