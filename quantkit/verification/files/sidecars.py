"""Sidecars and config.json against the source's: what may be rewritten, and what may not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from math import isclose
from pathlib import Path
from typing import Any

from quantkit.checkpoint.directory import Checkpoint, read_json
from quantkit.checkpoint.lean_transformers import without_docstrings
from quantkit.checkpoint.network.config import is_tied
from quantkit.checkpoint.network.multimodal import is_multimodal
from quantkit.checkpoint.weight_files import newer_tokenizer
from quantkit.errors import InputError
from quantkit.verification.files.added_keys import judge_config, judge_generation
from quantkit.verification.files.tokenizer_files import check_extras
from quantkit.verification.findings import Finding, error, info, warning

FREE_CONFIG_KEYS = frozenset(
    {
        "quantization_config", "compression_config", "dtype", "torch_dtype", "_name_or_path",
        "transformers_version", "_model_name_or_path", "_attn_implementation_autoset",
        "_attn_implementation", "use_cache", "quantize",
    }
)  # fmt: skip
"""Keys of config.json (at any depth) that quantizing or saving again may change."""

_FREE_GENERATION_KEYS: frozenset[str] = frozenset(
    {"transformers_version", "_from_model_config", "do_sample"}
)
_FREE_TOKENIZER_KEYS = frozenset(
    {
        "chat_template", "name_or_path", "tokenizer_file", "special_tokens_map_file", "is_local",
        "local_files_only", "processor_class", "backend", "auto_map",
    }
)  # fmt: skip
_ENCODING_KEYS = frozenset(
    {"add_bos_token", "add_eos_token", "add_prefix_space", "bos_token", "eos_token", "legacy"}
)
_BATCHING_KEYS = frozenset(
    {"pad_token", "pad_token_id", "padding_side", "truncation_side", "model_max_length"}
)
_BUDGET_KEYS = ("truncation", "padding")
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_LEGACY_TOKENIZER = {
    "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
}  # fmt: skip
_ABSENT = object()


def check_alone(checkpoint: Checkpoint) -> list[Finding]:
    """What can be said of the sidecars without a source."""
    names = {path.name for path in checkpoint.sidecars()}
    findings: list[Finding] = []
    if not any("token" in n or n.startswith(("vocab", "spiece", "tekken")) for n in names):
        findings.append(
            warning(
                "sidecar.no_tokenizer",
                "it has no tokenizer; engines need one named apart",
                "copy the tokenizer files of the source here",
            )
        )
    if is_multimodal(checkpoint.config) and not any("processor" in name for name in names):
        findings.append(
            warning(
                "sidecar.no_processor",
                "it takes more than text and has no processor; engines cannot read pictures or "
                "sounds for it",
                "copy preprocessor_config.json and processor_config.json of the source here",
            )
        )
    findings += [
        warning(
            "sidecar.newer_tokenizer",
            said,
            "serve it with an engine on Transformers 5, or set tokenizer_class to "
            "PreTrainedTokenizerFast",
            "tokenizer_config.json",
        )
        for said in newer_tokenizer(checkpoint.path)
    ]
    for name in sorted(_own_code(checkpoint)):
        if not (checkpoint.path / name).is_file():
            findings.append(
                error(
                    "sidecar.missing",
                    f"config.json names the code {name}, which is absent",
                    f"copy {name} of the source here",
                    name,
                )
            )
    return findings


def check_against(checkpoint: Checkpoint, source: Checkpoint) -> list[Finding]:
    """Sidecars and config.json compared with the source's."""
    findings = list(_compare_config(checkpoint.config, source.config))
    ours = {path.name for path in checkpoint.sidecars()}
    for path in source.sidecars():
        if path.name in _TEMPLATE_FILES:
            continue
        if path.name in ours:
            findings += _compare_file(checkpoint.path / path.name, path, source.config)
        else:
            findings.append(_missing(path.name, ours))
    findings += _compare_template(checkpoint.path, source.path)
    extra = ours - {path.name for path in source.sidecars()}
    findings += check_extras(checkpoint.path, extra, _template(checkpoint.path))
    for path in sorted(source.path.glob("*.py")):
        mine = checkpoint.path / path.name
        if mine.is_file() and mine.read_bytes() != path.read_bytes():
            findings.append(_changed(path.name, "its code differs from the source's"))
    return findings


def _own_code(checkpoint: Checkpoint) -> set[str]:
    """Files that `auto_map` expects in the directory itself."""
    auto_map = checkpoint.config.get("auto_map")
    targets = auto_map.values() if isinstance(auto_map, dict) else ()
    references = [r for t in targets for r in (t if isinstance(t, list) else [t])]
    return {f"{r.split('.')[0]}.py" for r in references if isinstance(r, str) and "--" not in r}


def _missing(name: str, ours: set[str]) -> Finding:
    message = f"{name} of the source is absent"
    hint = f"copy {name} from the source"
    if name in _LEGACY_TOKENIZER and "tokenizer.json" in ours:
        return warning("sidecar.legacy_missing", f"{message}; tokenizer.json replaces it for "
                       "engines that use fast tokenizers", hint, name)  # fmt: skip
    return error("sidecar.missing", message, hint, name)


def _changed(name: str, what: str) -> Finding:
    return error("sidecar.changed", f"{name}: {what}", f"copy {name} from the source", name)


def _compare_file(ours: Path, theirs: Path, model: Mapping[str, Any]) -> Iterator[Finding]:
    if ours.read_bytes() == theirs.read_bytes():
        return
    name = ours.name
    if not name.endswith(".json"):
        yield _changed(name, "its content differs from the source's")
        return
    try:
        mine, original = read_json(ours), read_json(theirs)
    except InputError as problem:
        yield error("sidecar.unreadable", problem.message, problem.hint, name)
        return
    if name == "tokenizer.json":
        yield from _compare_tokenizer(mine, original)
        return
    if name == "tokenizer_config.json":
        yield from _compare_tokenizer_config(mine, original)
        return
    free = _FREE_GENERATION_KEYS if name == "generation_config.json" else frozenset()
    for key, (new, old) in _differences(mine, original).items():
        if old is _ABSENT and name == "generation_config.json":
            yield from judge_generation(key, new, model)
        if key.split(".")[0] in free or old is _ABSENT or (new is _ABSENT and not old):
            continue
        yield _changed(name, f"{key} is {_show(new)}, in the source {_show(old)}")


def _compare_tokenizer_config(mine: dict[str, Any], original: dict[str, Any]) -> Iterator[Finding]:
    """Keys that a library saved again differ often; those that change token ids are errors."""
    name = "tokenizer_config.json"
    for key, (new, old) in _differences(mine, original).items():
        top = key.split(".")[0]
        renamed = top == "tokenizer_class" and _same_class(str(new), str(old))
        saved_elsewhere = new is _ABSENT or (old is _ABSENT and top not in _ENCODING_KEYS)
        if top in _FREE_TOKENIZER_KEYS or renamed or saved_elsewhere:
            continue
        if top in _BATCHING_KEYS:
            yield warning(
                "sidecar.tokenizer_batching",
                f"{name}: {key} is {_show(new)}, in the source {_show(old)}; it shapes batches, "
                "not the ids of a text",
                f"copy {name} from the source",
                name,
            )
        else:
            yield _changed(name, f"{key} is {_show(new)}, in the source {_show(old)}")


def _same_class(one: str, other: str) -> bool:
    """Whether two tokenizer classes are one under the names of Transformers 4 and 5."""
    generic = {"PreTrainedTokenizer", "TokenizersBackend"}
    names = {one.removesuffix("Fast"), other.removesuffix("Fast")}
    return len(names) == 1 or names == generic


def _compare_tokenizer(mine: dict[str, Any], original: dict[str, Any]) -> Iterator[Finding]:
    for key in _BUDGET_KEYS:
        if mine.get(key) != original.get(key):
            yield warning(
                "sidecar.tokenizer_budget",
                f"tokenizer.json sets {key} to {_show(mine.get(key))}, in the source "
                f"{_show(original.get(key))}; left over from calibration",
                "copy tokenizer.json from the source",
                "tokenizer.json",
            )
    rest = {k: v for k, v in mine.items() if k not in _BUDGET_KEYS}
    wanted = {k: v for k, v in original.items() if k not in _BUDGET_KEYS}
    if rest != wanted:
        keys = [k for k in sorted(rest.keys() | wanted.keys()) if rest.get(k) != wanted.get(k)]
        yield _changed("tokenizer.json", f"{', '.join(keys)} differ from the source's")


def _template(directory: Path) -> str | None:
    """The chat template that Transformers would use."""
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8", errors="replace").strip()
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            try:
                found = read_json(directory / name).get("chat_template")
            except InputError:
                continue
            if found is not None:
                return str(found).strip()
    return None


def _compare_template(ours: Path, theirs: Path) -> Iterator[Finding]:
    mine, original = _template(ours), _template(theirs)
    if original is not None and mine is None:
        yield error(
            "sidecar.missing",
            "the source has a chat template, this checkpoint has none",
            "copy chat_template.jinja (or tokenizer_config.json) from the source",
            "chat_template.jinja",
        )
    elif original is not None and mine != original:
        yield _changed("chat_template.jinja", "the chat template differs from the source's")


def _compare_config(mine: Mapping[str, Any], original: Mapping[str, Any]) -> Iterator[Finding]:
    if is_tied(mine) != is_tied(original):
        yield error(
            "config.tie_flipped",
            f"tie_word_embeddings is {is_tied(mine)}, in the source {is_tied(original)}",
            "restore it in config.json; engines then load another output head",
            "config.json",
        )
    removed: list[str] = []
    added: dict[str, Any] = {}
    for key, (new, old) in _differences(_without_aliases(mine), _without_aliases(original)).items():
        free = not FREE_CONFIG_KEYS.isdisjoint(key.split("."))
        if free or key == "tie_word_embeddings":
            continue
        if old is _ABSENT:
            added[key] = new
            continue
        if new is _ABSENT:
            removed += [key] if old not in (None, False, [], {}) else []
            continue
        yield error(
            "config.changed",
            f"config.json: {key} is {_show(new)}, in the source {_show(old)}",
            "restore it; only quantization_config, dtype and version keys may change",
            "config.json",
        )
    if not removed and not added:
        return
    completed = _completed(mine), _completed(original)
    if removed:
        yield from _judge_removed(removed, completed)
    yield from judge_config(added, _differing(completed), completed[1] or ())


_Completed = tuple[dict[str, Any] | None, dict[str, Any] | None]


def _differing(completed: _Completed) -> set[str] | None:
    """Top-level keys in which two completed configs differ, None where one is not known."""
    mine, original = completed
    if mine is None or original is None:
        return None
    return {key.split(".")[0] for key in _differences(mine, original)}


def _judge_removed(removed: list[str], completed: _Completed) -> Iterator[Finding]:
    """Keys that a library dropped: harmless where the model class has the same default."""
    differ = _differing(completed)
    if differ is not None:
        removed = [key for key in removed if key.split(".")[0] in differ]
        if removed:
            yield error(
                "config.removed",
                f"config.json lacks {', '.join(removed)} of the source, and the model class has "
                "another default",
                "copy these keys from the source's config.json",
                "config.json",
            )
        return
    yield info(
        "config.removed",
        f"config.json lacks {', '.join(removed)} of the source",
        "copy these keys from the source's config.json if an engine misses them",
        "config.json",
    )


def _completed(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config with the defaults of its model class, None when Transformers has no such class."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    plain = deepcopy({k: v for k, v in config.items() if k not in FREE_CONFIG_KEYS})
    try:
        with without_docstrings():
            kind = CONFIG_MAPPING[str(config.get("model_type"))]
        completed: dict[str, Any] = kind.from_dict(plain).to_dict()
    except Exception:  # no such class, or values that its own validation refuses
        return None
    return {k: v for k, v in completed.items() if k not in FREE_CONFIG_KEYS}


def _without_aliases(config: Mapping[str, Any]) -> dict[str, Any]:
    """Older spellings of the rotary settings moved into `rope_parameters` (Transformers 5)."""
    plain = {
        key: _without_aliases(value) if isinstance(value, dict) and "rope" not in key else value
        for key, value in config.items()
    }
    stated = plain.get("rope_parameters")
    rope = dict(stated) if isinstance(stated, dict) else {}
    scaling = plain.pop("rope_scaling", None)
    if "rope_theta" in plain or isinstance(scaling, dict):
        rope = {**(scaling or {}), **rope}
        if "type" in rope:
            rope.setdefault("rope_type", rope.pop("type"))
        if "rope_theta" in plain:
            rope.setdefault("rope_theta", plain.pop("rope_theta"))
        rope.setdefault("rope_type", "default")
    if rope:
        plain["rope_parameters"] = rope
    return plain


def _differences(
    mine: Mapping[str, Any], original: Mapping[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Dotted key → (ours, the source's) where they differ; `_ABSENT` where one lacks it."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(mine.keys() | original.keys()):
        new, old = mine.get(key, _ABSENT), original.get(key, _ABSENT)
        if isinstance(new, dict) and isinstance(old, dict):
            found |= _differences(new, old, f"{prefix}{key}.")
        elif not _equal(new, old):
            found[f"{prefix}{key}"] = (new, old)
    return found


def _equal(new: object, old: object) -> bool:
    if isinstance(new, bool) or isinstance(old, bool):
        return new is old
    if isinstance(new, int | float) and isinstance(old, int | float):
        return isclose(new, old, rel_tol=1e-6)
    return new == old


def _show(value: object) -> str:
    if value is _ABSENT:
        return "absent"
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
