"""A model that costs nothing: random weights, and a tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def byte_llama(out: Path, *, hidden: int = 64, wide: int = 128) -> Path:
    """A Llama of two layers in BF16 that reads bytes, written into `out`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast: Any = hf.PreTrainedTokenizerFast
    fast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(out)
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=hidden, intermediate_size=wide, num_hidden_layers=2, vocab_size=len(words),
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )  # fmt: skip
    network: Any = hf.LlamaForCausalLM
    network(config).to(torch.bfloat16).save_pretrained(out)
    return out
