"""A model that an engine's data has no rules for: the same words in every command, no failure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from tests.formats.test_foreign import made
from tests.support.cli import quantkit
from tests.support.helpers import edit_json

pytestmark = pytest.mark.broad


def test_plan_and_quantize_warn_of_a_family_without_rules(tmp_path: Path) -> None:
    source, told = tmp_path / "m", "no rules for novelnet in vLLM"
    sizes: Any = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    config = hf.LlamaConfig(vocab_size=64, num_attention_heads=2, num_key_value_heads=2, **sizes)
    model: Any = hf.LlamaForCausalLM
    model(config).save_pretrained(source)
    new: Any = {"model_type": "novelnet", "architectures": ["NovelForCausalLM"]}
    edit_json(source / "config.json", lambda config: config.update(new))
    method = (source, "--method", "rtn_fp8_dynamic")
    for asked in ((), ("--engine", "vllm"), ("--tp", "2")):
        run = quantkit("plan", *method, *asked)
        assert run.code == 0
        assert told in run.out.replace("\n", " ") or told in run.err
        assert (f"warning: Whether vLLM loads it is unknown: {told}" in run.err) == (
            asked == ("--engine", "vllm")
        )
    document = json.loads(quantkit("plan", *method, "--engine", "vllm", "--json").out)
    (verdict,) = document["verdicts"]
    assert (verdict["verdict"], verdict["loads"]) == ("unknown", None)
    assert told in verdict["unknown"]
    serve = ("--set", "serve.engines=[vllm]", "--out", tmp_path / "out")
    done = quantkit("quantize", *method, *serve)
    assert done.code == 0
    assert f"warning: Whether vLLM loads it is unknown: {told}" in done.err
    assert "unknown for this model in vLLM" in done.out.replace("\n", " ")
    assert "Whether vLLM loads this model is unknown" in (tmp_path / "out/README.md").read_text()
    checked = quantkit("verify", tmp_path / "out", "--engine", "vllm", "--json")
    assert checked.code == 0
    found = {f["code"]: f["severity"] for f in json.loads(checked.out)["findings"]}
    assert found["engine.unknown"] == "warning"
    assert "engine.loads" not in found


def test_verify_and_launch_say_that_a_family_has_no_rules(tmp_path: Path) -> None:
    told = "no rules for novelnet in vLLM"
    path = made(tmp_path / "m", "dynamic", model_type="novelnet")
    document = json.loads(quantkit("verify", path, "--json").out)
    assert any(told in f["message"] for f in document["findings"])
    assert told in quantkit("launch", path, "--engine", "vllm").err
    known = made(tmp_path / "known", "dynamic")
    assert told not in quantkit("verify", known).out
