"""Text that is rendered already, repeated or no text is told of; natural text is not."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from typer.testing import CliRunner

from quantkit.calibration import TokenFile, build_tokens, load_calibration
from quantkit.calibration.chat import compile_template
from quantkit.calibration.unnatural import turn_marker
from quantkit.cli.app import app
from quantkit.errors import InputError

WORDS = ["river", "stone", "amber", "quiet", "window", "lantern", "harbour", "meadow"]
WORDS += ["copper", "violet", "thunder", "paper"]
TEMPLATE = (
    "{{ bos_token }}{% if tools %}<tools>{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
)
BOS, END = 0, 1


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a byte-level tokenizer that puts <s> before a text, and a template."""
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<|turn|>", "<|end|>"]
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": END}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def words(number: int) -> str:
    return " ".join(WORDS[(number * 7 + i * (i + number)) % len(WORDS)] for i in range(12))


def talk(number: int) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": words(number)},
        {"role": "assistant", "content": words(number + 1)},
    ]


def build(model: Path, rows: list[dict[str, Any]]) -> TokenFile:
    file = model.parent / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"samples": len(rows), "sequence_length": 64, "short": "pad", "allow_fewer": True}
    return build_tokens(load_calibration(str(file), sizes), model)


NATURAL: dict[str, Any] = {
    "texts": [{"text": words(i)} for i in range(20)],
    "conversations": [{"messages": talk(i)} for i in range(20)],
    "pairs": [{"prompt": words(i), "completion": words(i + 1)} for i in range(20)],
    "one of twenty names a marker": [
        {"text": words(i) + " <|im_start|>" * (i == 3)} for i in range(20)
    ],
    "half of them alike": [{"text": words(i if i % 2 else 0)} for i in range(20)],
    "one text": [{"text": words(1)}],
}


@pytest.mark.parametrize("kind", NATURAL)
def test_natural_text_has_no_notes(model: Path, kind: str) -> None:
    assert build(model, NATURAL[kind]).summary["notes"] == []


@pytest.mark.parametrize(
    ("begin", "told"),
    [
        ("<s><|turn|>user\n", "; 10 begin with <s>, and no second one was added"),
        ("<s>", "; 10 begin with <s>, and no second one was added"),
        ("<|turn|>user\n", ""),
        ("<|im_start|>user\n", ""),
        ("<|start_header_id|>user<|end_header_id|>", ""),
        ("<s>[INST] ", "; 10 begin with <s>, and no second one was added"),
        ("[INST] ", ""),
    ],
)
def test_text_that_is_rendered_already(model: Path, begin: str, told: str) -> None:
    rows = [{"text": (begin if i % 2 else "") + words(i)} for i in range(20)]
    tokens = build(model, rows)
    [note] = tokens.summary["notes"]
    assert f"50% (10 of 20) of its documents have been through a chat template already{told}." \
        in note  # fmt: skip
    ids, _ = tokens.arrays()
    assert (ids[:, 0] == BOS).all()
    assert (ids[:, 1] != BOS).all()


def test_rendered_text_inside_a_conversation(model: Path) -> None:
    rows = [{"prompt": f"<|turn|>{words(i)}", "completion": words(i + 1)} for i in range(20)]
    assert "100% (20 of 20)" in build(model, rows).summary["notes"][0]


def test_the_marker_is_the_templates_own() -> None:
    special = {"bos_token": "<s>"}
    assert turn_marker(compile_template(TEMPLATE, special), special) == "<|turn|>"
    for none in ("{{ bos_token }}User: {{ messages[0].content }}", "{{ raise_exception('no') }}"):
        assert turn_marker(compile_template(none, special), special) is None


@pytest.mark.parametrize("shape", ["text", "messages"])
def test_one_repeated_text(model: Path, shape: str) -> None:
    held = talk if shape == "messages" else words
    rows = [{shape: held(i if i % 5 == 0 else 1)} for i in range(20)]
    [note] = build(model, rows).summary["notes"]
    assert "80% (16 of 20) of its documents are one repeated text" in note


def identifier(number: int) -> str:
    return str(uuid.UUID(int=(number * 2654435761 + 12345) << 64))


@pytest.mark.parametrize("shape", ["text", "messages"])
def test_identifiers_among_texts(model: Path, shape: str) -> None:
    def row(text: str) -> dict[str, Any]:
        return {shape: text if shape == "text" else [{"role": "user", "content": text}]}

    rows = [row(identifier(i) if i % 4 == 0 else words(i)) for i in range(20)]
    [note] = build(model, rows).summary["notes"]
    assert "25% (5 of 20) of its documents hold identifiers" in note
    with pytest.raises(InputError, match="20 of 20") as caught:
        build(model, [row(identifier(i)) for i in range(20)])
    assert caught.value.code == "calibration.identifiers"


def test_blank_conversations_are_counted_and_left_out(model: Path) -> None:
    blank = [{"role": "user", "content": ""}, {"role": "assistant", "content": " \n"}]
    rows = [{"messages": blank if i % 3 == 0 else talk(i)} for i in range(12)]
    [part] = build(model, rows).summary["sources"]
    assert part["documents_dropped"] == {"messages is blank": 4}
    assert part["documents_used"] == 8


def test_tools_are_rendered(model: Path) -> None:
    rows = [{"messages": talk(1), "tools": [{"type": "function", "function": {"name": "f"}}]}]
    assert '"name": "f"' in build(model, rows).summary["sources"][0]["preview"]


def test_a_pair_without_a_template_is_joined(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    [part] = build(model, [{"prompt": "Who?", "completion": "I."}]).summary["sources"]
    assert part["preview"] == "<s>Who?\n\nI."


def test_the_command_tells_the_notes(model: Path) -> None:
    file = model.parent / "ids.jsonl"
    rows = [{"text": identifier(i) if i % 4 == 0 else words(i)} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["calibration", "build", str(file), "--model", str(model), "--set", "samples=2"]
    asked += ["--set", "sequence_length=512"]
    done = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert "note: file ids.jsonl: " in done.stderr
    told = json.loads(CliRunner().invoke(app, [*asked, "--json"], catch_exceptions=False).stdout)
    assert "identifiers" in told["notes"][0]
