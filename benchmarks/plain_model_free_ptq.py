"""LLM Compressor's own data-free quantization of a checkpoint, as its examples do it.

`python plain_model_free_ptq.py MODEL OUT SCHEME WORKERS`
"""

import sys

from llmcompressor import model_free_ptq


def main(model: str, out: str, scheme: str, workers: str) -> None:
    ignore = ["lm_head", "model.embed_tokens"]
    model_free_ptq(
        model, out, scheme=scheme, ignore=ignore, max_workers=int(workers), device="cpu"
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
