"""Let a checkpoint speak: `python load_and_generate.py DIR TEXT`."""

import sys

from transformers import AutoTokenizer

import quantkit


def main(directory: str, prompt: str) -> str:
    """The prompt and what follows it."""
    model = quantkit.load(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    text: str = tokenizer.decode(model.generate(ids, max_new_tokens=20)[0])
    print(text)
    print(model.kernels(), file=sys.stderr)
    return text


if __name__ == "__main__":
    main(*sys.argv[1:3])
