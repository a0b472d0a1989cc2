"""What AutoRound's GGUF export needs to get the vocabulary of a byte-level tokenizer right."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

from auto_round.export.export_to_gguf.llama_cpp_conversion import get_conversion

from quantkit.backends.process.job import Job, Reporter

PLAIN_PRE_TOKENIZER = "gpt-2"
"""llama.cpp's name of byte-level pre-tokenization by GPT-2's expression and nothing else."""


def keep_byte_level(job: Job, report: Reporter) -> None:
    """Make a byte-level BPE tokenizer a `gpt2` vocabulary, whatever else its file says.

    The converter takes a tokenizer with `byte_fallback` for a SentencePiece one; llama.cpp would
    then split every text in another way and say nothing. The name of the pre-tokenizer is looked
    up by the converter; where it knows none, the plain one is right for a plain byte-level step.
    """
    file = Path(job.model, "tokenizer.json")
    steps = _steps(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else []
    if not any(step.get("type") == "ByteLevel" for step in steps):
        return
    plain = len(steps) == 1 and steps[0].get("use_regex", True)
    os.environ.pop("AUTO_ROUND_GGUF_AUTO_UPDATE", None)  # it would download and run a converter
    get_conversion(job.model)
    converter = importlib.import_module("conversion.base").TextModel  # where the line above put it
    known = converter.get_vocab_base_pre

    def not_sentencepiece(_: Any) -> None:
        raise FileNotFoundError("a byte-level tokenizer is no SentencePiece model")

    def pre_tokenizer(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            if not plain:
                raise
            report.note(f"tokenizer.ggml.pre is {PLAIN_PRE_TOKENIZER}, from tokenizer.json")
            return PLAIN_PRE_TOKENIZER

    converter._set_vocab_llama_hf = not_sentencepiece
    converter.get_vocab_base_pre = pre_tokenizer


def _steps(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    """The pre-tokenizer's steps, one or a sequence."""
    step = tokenizer.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    return [step for step in steps if isinstance(step, dict)]
