"""The head of a model card: nothing of the source's is lost, and results are in the Hub's form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from quantkit.checkpoint.directory import Checkpoint, open_checkpoint
from quantkit.checkpoint.provenance import Provenance, Results
from quantkit.pipeline.card import hub_name, with_measured
from quantkit.pipeline.frontmatter import front_matter, header

ODD = {
    "base_model": ["someone/first", "someone/second"],
    "base_model_relation": "merge",
    "license": "other",
    "license_name": "modèle-licence-v1",
    "license_link": "https://example.org/licence?a=1&b=2#part: one",
    "language": ["en", "中文", "no"],
    "pipeline_tag": "image-text-to-text",
    "tags": ["quantkit", "llmcompressor", "w4a16"],
}
BODY = "\n# tiny, w8a8\n\n## Measured\n\nold\n\n## How it was made\n\n- with care\n"
FOUND: dict[str, Any] = {
    "ok": True,
    "text": {"name": "speeches", "windows": 8, "length": 512},
    "engine": {"name": "builtin", "version": "1", "device": "cpu", "weights_only": True},
    "baseline": {"name": "tiny"},
    "values": {
        "perplexity": {"quantized": 22.51, "baseline": 22.37},
        "mcq_accuracy": {"quantized": None, "baseline": 0.8},
    },
    "metrics": {
        "kl_mean": {"value": 0.0123},
        "prefill_speedup": {"value": None},
        "decode_speedup": {"value": None},
    },
}


def provenance(found: dict[str, Any] | None) -> Provenance:
    return Provenance(results=Results(2, 1, 8.0, validation=found))


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    return open_checkpoint(tmp_path)


def read(source: Checkpoint, card: str | bytes) -> dict[str, Any]:
    content = card if isinstance(card, bytes) else card.encode()
    (source.path / "README.md").write_bytes(content)
    return front_matter(source)


def test_what_is_written_is_read_again_in_its_order(source: Checkpoint) -> None:
    head = header(ODD)
    assert list(yaml.safe_load(head.strip("-\n"))) == list(ODD)
    assert yaml.safe_load(head.strip("-\n")) == ODD
    assert "中文" in head
    assert read(source, f"{head}\n{BODY}") == ODD


@pytest.mark.parametrize(
    "card",
    [
        "---\r\nlicense: mit\r\n---\r\ntext",
        "\n\n---\nlicense: mit\n---  \ntext",
        "\ufeff---\nlicense: mit\n---\n",
        "---\nlicense: mit\n---",
        b"---\nlicense: mit\n---\n\xe9",
    ],
)
def test_heads_are_found_however_they_are_fenced(source: Checkpoint, card: str | bytes) -> None:
    assert read(source, card) == {"license": "mit"}


def test_a_broken_list_of_results_costs_the_licence_nothing(source: Checkpoint) -> None:
    head = read(source, "---\nlicense: mit\nmodel-index: [odd]\nlanguage: no\n---\n")
    assert head == {"license": "mit", "model-index": ["odd"], "language": "no"}


@pytest.mark.parametrize(
    "card", ["", "text", "---\n- a\n---\n", "---\na: [\n---\n", "---\n1: a\n---\n", "---\na: b\n"]
)
def test_a_head_that_cannot_be_read_is_none(source: Checkpoint, card: str) -> None:
    assert read(source, card) == {}


def test_base_is_what_the_source_says_it_is_a_quantized_form_of(source: Checkpoint) -> None:
    here = str(source.path)
    read(source, "---\nbase_model: [a/b]\nbase_model_relation: quantized\n---\n")
    assert hub_name(here, source) == "a/b"
    read(source, "---\nbase_model: [a/b, a/c]\nbase_model_relation: quantized\n---\n")
    assert hub_name(here, source) is None
    read(source, "---\nbase_model: a/b\nbase_model_relation: finetune\n---\n")
    assert hub_name(here, source) is None


def test_results_are_in_the_hubs_form_once(source: Checkpoint) -> None:
    card = with_measured(f"{header(ODD)}\n{BODY}", provenance(FOUND))
    again = json.loads(json.dumps(FOUND))
    again["values"]["perplexity"]["quantized"] = 23.0
    parsed = ModelCard(with_measured(card, provenance(again)))
    assert {name: parsed.data[name] for name in ODD} == ODD
    assert parsed.data["model_name"] == "tiny, w8a8"
    assert [(r.metric_type, r.metric_value) for r in parsed.data["eval_results"]] == [
        ("perplexity", 23.0), ("kl_divergence", 0.0123),
    ]  # fmt: skip
    assert parsed.data["eval_results"][0].metric_name == "perplexity (weights only)"
    assert parsed.data["eval_results"][0].dataset_args == {"windows": 8, "length": 512}
    assert parsed.text.count("## Measured") == 1


def test_results_of_others_and_heads_edited_by_hand_stay(source: Checkpoint) -> None:
    theirs = [
        {
            "name": "their name",
            "results": [
                {
                    "task": {"type": "text-generation"},
                    "dataset": {"name": "Theirs", "type": "them/theirs"},
                    "metrics": [{"type": "accuracy", "value": 0.5}],
                }
            ],
        }
    ]
    card = with_measured(f"{header(ODD | {'model-index': theirs})}\n{BODY}", provenance(FOUND))
    data = ModelCard(card).data
    assert data["model_name"] == "their name"
    assert [r.dataset_type for r in data["eval_results"]] == [
        "them/theirs", "quantkit-text", "quantkit-text",
    ]  # fmt: skip
    edited = "---\nlicense: mit  # as the base\n---\n"
    card = with_measured(edited + BODY, provenance(FOUND))
    assert card.startswith(edited)
    assert "model-index" not in card
    assert "22.51" in card
