"""A tokenizer for tiny models: one token a byte."""

from __future__ import annotations

from typing import Any

import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 260


def byte_tokenizer() -> Any:
    """Four special tokens (padding, start, end, unknown), then the 256 bytes."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {
        word: number
        for number, word in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    make: Any = hf.PreTrainedTokenizerFast
    return make(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", model_max_length=256,
    )  # fmt: skip
