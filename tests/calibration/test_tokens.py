"""From a mixture to the token file: its tokens, its account of them, its cache, its refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import chain, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantkit.backends.process.job import token_digest
from quantkit.calibration import (
    TokenFile,
    build_tokens,
    held_out_texts,
    leakage,
    load_calibration,
    read_token_file,
)
from quantkit.calibration.tokens import histogram, shares
from quantkit.checkpoint.directory import is_sidecar
from quantkit.errors import InputError
from tests.support.helpers import edit_json

pytestmark = pytest.mark.broad

END = 2  # <|im_end|>
TEXTS = [" one two three four", " five", " a b c d e f g h i j k"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibration"


@pytest.fixture(scope="session")
def tokenizer(small_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(small_model)


@pytest.fixture
def texts_only(small_model: Path, tmp_path: Path) -> Path:
    """The model's config and tokenizer files without its weights, to be changed."""
    copy = tmp_path / "model"
    copy.mkdir()
    for path in small_model.iterdir():
        if is_sidecar(path.name) or path.name == "config.json":
            shutil.copy(path, copy)
    return copy


def mixture(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> str:
    """A calibration file over one JSON lines file of these rows."""
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"type": "file", "path": "data.jsonl", **keys.pop("source", {})}
    file = folder / "mix.yaml"
    file.write_text(json.dumps({"sources": [source], **keys}))
    return str(file)


def build(name: str, model: Path, **overrides: object) -> TokenFile:
    return build_tokens(load_calibration(name, overrides), model)


def refused(name: str, model: Path, **overrides: object) -> InputError:
    with pytest.raises(InputError) as caught:
        build(name, model, **overrides)
    return caught.value


def test_the_default(small_model: Path, cache: Path) -> None:
    steps: list[tuple[int, int]] = []
    config = load_calibration("default")
    tokens = build_tokens(
        config, small_model, progress=lambda done, total: steps.append((done, total))
    )
    assert (tokens.samples, tokens.length, tokens.tokens) == (128, 512, 128 * 512)
    assert steps == [(done, 128) for done in range(1, 129)]
    ids, mask = tokens.arrays()
    assert ids.shape == mask.shape == (128, 512)
    assert ids.dtype == mask.dtype == np.int64
    assert mask.all()
    assert len(np.unique(ids, axis=0)) == 128
    assert tokens.digest == token_digest(ids.tolist())
    assert [part["samples"] for part in tokens.summary["sources"]] == [57, 16, 55]
    assert "<|im_start|>user\nExplain" in tokens.summary["sources"][1]["preview"]
    assert (ids == END).sum() > 100  # turns and documents end
    assert sum(tokens.summary["document_lengths"].values()) > 150
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".safetensors"]
    assert leakage(tokens, small_model, held_out_texts()) < 0.001
    assert str(Path.home()) not in json.dumps(tokens.summary)


def test_the_same_input_gives_the_same_digest_and_the_cache_is_used(
    small_model: Path, cache: Path
) -> None:
    first = build("default", small_model, samples=8, sequence_length=64)
    written = first.path.stat().st_mtime_ns
    assert build("default", small_model, samples=8, sequence_length=64) == first
    assert first.path.stat().st_mtime_ns == written
    shutil.rmtree(cache)
    assert build("default", small_model, samples=8, sequence_length=64) == first
    for change in ({"seed": 1}, {"short": "pad"}, {"sources.0.weight": 4}):
        other = build("default", small_model, **{"samples": 8, "sequence_length": 64, **change})
        assert other.digest != first.digest
        assert other.path != first.path


@pytest.mark.parametrize("damage", ["tokens", "summary", "cut", "no_summary"])
def test_a_damaged_cache_is_made_again(small_model: Path, damage: str) -> None:
    good = build("default", small_model, samples=4, sequence_length=64)
    if damage == "tokens":
        content = bytearray(good.path.read_bytes())
        content[-4 * 64 * 8 * 2 + 8] ^= 1
        good.path.write_bytes(content)
    elif damage == "summary":
        edit_json(good.path.with_suffix(".json"), lambda summary: summary.update(digest="0"))
    elif damage == "cut":
        good.path.write_bytes(good.path.read_bytes()[:-100])
    else:
        good.path.with_suffix(".json").unlink()
    assert read_token_file(good.path) is None
    assert build("default", small_model, samples=4, sequence_length=64) == good
    assert read_token_file(good.path) == good


def test_ids_are_those_of_transformers(small_model: Path, tmp_path: Path, tokenizer: Any) -> None:
    talk = [
        {"role": "user", "content": "Où est  Paris? 12345\n\ttab"},
        {"role": "assistant", "content": "In France — naïve answer."},
    ]
    rows: list[dict[str, Any]] = [{"messages": talk}, {"text": talk[0]["content"]}]
    for row, source, wanted in (
        (rows[0], {"messages_field": "messages"},
         tokenizer.apply_chat_template(talk, return_dict=False)),
        (rows[1], {}, tokenizer(rows[1]["text"])["input_ids"]),
    ):  # fmt: skip
        name = mixture(tmp_path, [row], source=source, short="pad", samples=1, sequence_length=64)
        ids, mask = build(name, small_model).arrays()
        assert ids[mask == 1].tolist() == list(wanted)


def test_a_tokenizer_without_tokenizer_json_goes_through_transformers(
    texts_only: Path, small_model: Path
) -> None:
    content = json.loads((texts_only / "tokenizer.json").read_text())["model"]
    (texts_only / "tokenizer.json").unlink()
    (texts_only / "vocab.json").write_text(json.dumps(content["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["merges"]]
    (texts_only / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    edit_json(
        texts_only / "tokenizer_config.json",
        lambda config: config.update(
            tokenizer_class="GPT2Tokenizer", backend=None, clean_up_tokenization_spaces=False
        ),
    )
    only_prose = {"samples": 3, "sequence_length": 64, "sources.1.weight": 1e-9}
    slow = build("default", texts_only, **only_prose)
    fast = build("default", small_model, **only_prose)
    assert "transformers" in slow.summary["versions"]
    assert slow.summary["sources"][0]["preview"] == fast.summary["sources"][0]["preview"]


def test_packing_drops_nothing_and_ends_each_document(
    small_model: Path, tmp_path: Path, tokenizer: Any
) -> None:
    rows = [{"text": text} for text in TEXTS]
    name = mixture(tmp_path, rows, samples=2, sequence_length=8)
    tokens = build(name, small_model)
    ids, mask = tokens.arrays()
    assert mask.all()
    part = tokens.summary["sources"][0]
    assert (part["documents_used"], part["documents_dropped"]) == (3, {})
    wanted = [[*tokenizer(text)["input_ids"], END] for text in TEXTS]
    assert part["tokens_cut"] == sum(map(len, wanted)) - 16
    possible = [list(chain(*order))[:16] for order in permutations(wanted)]
    assert [*ids[0], *ids[1]] in possible or [*ids[1], *ids[0]] in possible


def test_padding_masks_what_it_adds(small_model: Path, tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": text} for text in TEXTS]
    name = mixture(tmp_path, rows, samples=3, sequence_length=8, short="pad")
    tokens = build(name, small_model)
    ids, mask = tokens.arrays()
    wanted = sorted(tokenizer(text)["input_ids"][:8] for text in TEXTS)
    assert sorted(ids[i][mask[i] == 1].tolist() for i in range(3)) == wanted
    assert (np.diff(mask, axis=1) <= 0).all()  # padded on the right
    assert tokens.tokens == sum(map(len, wanted)) < 3 * 8
    assert tokens.digest == token_digest(ids[i][mask[i] == 1].tolist() for i in range(3))


def test_dropping_counts_with_reasons(small_model: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": text} for text in [*TEXTS, "", None, 4]]
    name = mixture(
        tmp_path, rows, samples=1, sequence_length=8, short="drop", allow_fewer=True,
        source={"min_tokens": 2},
    )  # fmt: skip
    error = refused(name, small_model, samples=4, sequence_length=16, allow_fewer=False)
    assert error.code == "calibration.empty_source"
    tokens = build(name, small_model, samples=4)
    assert tokens.samples == 1
    part = tokens.summary["sources"][0]
    assert part["documents_seen"] == 6
    assert part["documents_dropped"] == {
        "fewer than 8 tokens (short: drop)": 1,
        "fewer than 2 tokens (min_tokens)": 1,
        "no text": 1,
        "text is blank": 1,
        "text is not a text": 1,
    }
    assert len(part["dropped_examples"]) == 5


def test_too_few_samples_is_an_error_unless_allowed(small_model: Path, tmp_path: Path) -> None:
    name = mixture(tmp_path, [{"text": text} for text in TEXTS * 4], sequence_length=8, samples=99)
    error = refused(name, small_model)
    assert error.code == "calibration.too_few_samples"
    assert "of 99 samples of 8 tokens: 12 documents" in error.message
    fewer = int(error.message.split(" gave ")[1].split()[0])
    assert f"set samples to {fewer}," in error.hint
    assert build(name, small_model, samples=fewer).samples == fewer
    tokens = build(name, small_model, allow_fewer=True)
    assert fewer <= tokens.samples <= fewer + 1
    assert tokens.summary["sources"][0]["tokens_cut"] == 0


def test_refusals_that_concern_the_model(texts_only: Path, tmp_path: Path) -> None:
    name = mixture(tmp_path, [{"text": "long " * 99}], samples=1, sequence_length=16)
    error = refused(name, texts_only, sequence_length=9000)
    assert error.code == "calibration.too_long"
    assert "8192" in error.hint
    edit_json(texts_only / "config.json", lambda config: config.update(vocab_size=100))
    assert refused(name, texts_only).code == "calibration.wrong_tokenizer"
    for file in ("config.json", "generation_config.json"):
        edit_json(texts_only / file, lambda config: config.pop("eos_token_id", None))
    edit_json(texts_only / "config.json", lambda config: config.update(vocab_size=49152))
    assert build(name, texts_only, sequence_length=8).samples == 1  # the tokenizer names one
    edit_json(texts_only / "tokenizer_config.json", lambda config: config.pop("eos_token"))
    assert refused(name, texts_only).code == "calibration.no_eos"
    (texts_only / "tokenizer.json").write_text("{}")
    assert refused(name, texts_only).code == "calibration.bad_tokenizer"
    (texts_only / "tokenizer.json").unlink()
    assert refused(name, texts_only).code == "calibration.no_tokenizer"
    (texts_only / "vocab.txt").write_text("a\n")
    edit_json(
        texts_only / "tokenizer_config.json",
        lambda config: config.update(auto_map={"AutoTokenizer": ["own.Own", None]}),
    )
    assert refused(name, texts_only).code == "calibration.remote_code"


def test_conversations_need_a_chat_template(texts_only: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hello there, who are you?"}]}]
    source = {"messages_field": "messages"}
    name = mixture(tmp_path, rows, samples=1, sequence_length=8, source=source)
    (texts_only / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    error = refused(name, texts_only)
    assert "1 × refused by the chat template: no system role" in error.message
    (texts_only / "chat_template.jinja").write_text("{% if %}")
    assert refused(name, texts_only).code == "calibration.bad_template"
    (texts_only / "chat_template.jinja").unlink()
    assert refused(name, texts_only).code == "calibration.no_template"
    plain = build(name, texts_only, **{"sources.0.without_template": "plain"})
    assert plain.summary["sources"][0]["preview"].startswith("Hello there")
    assert plain.summary["chat_template_digest"] is None


def test_a_cache_that_cannot_be_written(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "file"))
    error = refused("default", small_model, samples=3, sequence_length=16)
    assert error.code == "calibration.cache_unwritable"
    assert "QUANTKIT_CACHE" in error.hint


def test_processes_that_build_the_same_tokens_at_once(small_model: Path, cache: Path) -> None:
    command = [
        sys.executable, "-m", "quantkit", "calibration", "build", "default",
        "--model", str(small_model), "--set", "samples=8", "--json",
    ]  # fmt: skip
    children = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ)
        for _ in range(3)
    ]
    said = [json.loads(child.communicate()[0]) for child in children]
    assert said[0] == said[1] == said[2]
    assert len(list(cache.iterdir())) == 2
    assert read_token_file(Path(said[0]["path"])) is not None


def test_leakage_finds_calibration_text(small_model: Path, tmp_path: Path) -> None:
    held_out = held_out_texts()
    seen, unseen = held_out[0][2000:6000], held_out[1][2000:6000]
    name = mixture(tmp_path, [{"text": seen}], samples=1, sequence_length=512)
    tokens = build(name, small_model)
    assert leakage(tokens, small_model, [seen[10:1500]]) > 0.95
    assert leakage(tokens, small_model, [unseen]) == 0
    assert 0.3 < leakage(tokens, small_model, [seen[:1500], unseen[:1500]]) < 0.7
    assert leakage(tokens, small_model, [seen[:20]]) == 1
    assert leakage(tokens, small_model, []) == 0


def test_shares_add_up_and_leave_nobody_out() -> None:
    assert shares([0.5, 0.3, 0.2], 128) == [64, 38, 26]
    assert shares([1, 1e-9], 2) == [1, 1]
    for total in range(3, 40):
        counts = shares([5, 1, 2.5], total)
        assert sum(counts) == total
        assert min(counts) >= 1


def test_histogram() -> None:
    assert histogram([0, 1, 511, 512, 513]) == {"0": 1, "1-1": 1, "256-511": 1, "512-1023": 2}
