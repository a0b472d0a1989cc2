"""KL from the likeliest tokens of both models, as of an engine, against all logits.

    python benchmarks/kl_likeliest.py DIR … [--windows 3]

Each DIR is a checkpoint of the demo model. Both distributions are the built-in runtime's on a CPU,
on windows of held-out text; prints the mean KL of all logits, the estimate and its bounds.
"""

import argparse
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from quantkit.checkpoint.demo import demo_model
from quantkit.validation.ask.data import eval_text
from quantkit.validation.ask.likeliest import divergence
from quantkit.validation.preflight import tokenizer_of
from quantkit.validation.reports.markdown import number, table
from quantkit.validation.subjects.base import TOP, Opening
from quantkit.validation.subjects.builtin import open_builtin


def scores(model: Path, windows: NDArray[np.int64]) -> torch.Tensor:
    """Log-probabilities [predictions, vocabulary], float32."""
    with closing(open_builtin(model, Opening("cpu"))) as subject:
        parts = [said[:, :-1].float().log_softmax(-1) for _, said in subject.logits(windows)]
    return torch.cat(parts).flatten(0, 1)


def row(name: str, base: torch.Tensor, ours: torch.Tensor) -> list[str]:
    """What is found of one checkpoint."""
    exact = float((base.exp() * (base - ours)).sum(-1).double().mean())
    (kept, ids), (our_kept, our_ids) = base.topk(TOP), ours.topk(TOP)
    found = divergence(
        ids.int().numpy(), kept.numpy(), our_ids.int().numpy(), our_kept.numpy()
    )  # fmt: skip
    low, value, high = (float(each.mean()) for each in (found.low, found.value, found.high))
    return [
        f"`{name}`",
        *map(number, (exact, value, low, high)),
        f"{100 * (value / exact - 1):+.1f} %",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--windows", type=int, default=3)
    asked = parser.parse_args()
    model = demo_model()
    windows = eval_text(None, tokenizer_of(model), asked.windows, None).windows
    base = scores(model, windows)
    rows = [row(path.name, base, scores(path, windows)) for path in asked.checkpoints]
    heads = ["checkpoint", "all logits", "estimate", "at least", "at most", "off by"]
    print("\n".join(table(heads, rows)))


if __name__ == "__main__":
    main()
