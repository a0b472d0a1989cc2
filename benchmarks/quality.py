"""Perplexity and KL divergence of a checkpoint's weights, dequantized into its source model."""

from pathlib import Path

import torch

from quantkit.calibration.heldout import held_out_texts
from quantkit.checkpoint.directory import Checkpoint, open_checkpoint
from quantkit.checkpoint.gguf import GgufFile, gguf_in, open_gguf
from quantkit.formats.dequantize import dequantize
from quantkit.formats.quantized import examine
from quantkit.formats.registry import detect
from quantkit.verification.gguf import source_pairs, source_values

WINDOWS, WINDOW = 8, 512


class Judge:
    """A source model that lends its activations, in float32, to the weights of checkpoints."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.source = open_checkpoint(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
        ids = tokenizer(" ".join(held_out_texts()), return_tensors="pt").input_ids[0]
        self.windows = ids[: WINDOWS * WINDOW].view(WINDOWS, WINDOW)
        self.base = [self._log_probabilities(window) for window in self.windows]
        pairs = zip(self.base, self.windows, strict=True)
        self.perplexity = _perplexity([_loss(*pair) for pair in pairs])

    def judge(self, out: Path) -> tuple[float, float]:
        """Perplexity of `out`, and KL(source ‖ out) in nats a token."""
        self.model.load_state_dict(dequantized(out, self.source), strict=False)
        losses, divergences = [], []
        for window, base in zip(self.windows, self.base, strict=True):
            mine = self._log_probabilities(window)
            losses.append(_loss(mine, window))
            divergences.append(torch.nn.functional.kl_div(mine, base, log_target=True,
                                                          reduction="batchmean"))  # fmt: skip
        return _perplexity(losses), float(torch.stack(divergences).mean())

    @torch.no_grad()
    def _log_probabilities(self, window: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(window[None]).logits[0, :-1]
        return logits.log_softmax(-1)


def _loss(log_probabilities: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    return -log_probabilities.gather(1, window[1:, None]).mean()


def _perplexity(losses: list[torch.Tensor]) -> float:
    return float(torch.stack(losses).mean().exp())


def dequantized(out: Path, source: Checkpoint) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors as floats by the source's names; KeyError when one has none."""
    if gguf_in(out):
        return _from_gguf(open_gguf(out), source)
    checkpoint = open_checkpoint(out)
    subject = examine(checkpoint, detect(checkpoint))
    state = {}
    for name in source.tensors:
        module = name.removesuffix(".weight")
        spec = subject.declaration.layers.get(module)
        if spec is None:
            state[name] = checkpoint.tensor(name)
            continue
        parts = subject.layout.expected(spec)
        held = {s: f"{module}.{s}" for s in parts if f"{module}.{s}" in checkpoint.tensors}
        tensors = {suffix: checkpoint.tensor(full) for suffix, full in held.items()}
        state[name] = dequantize(subject.layout.read(tensors, spec))
    return state


def _from_gguf(held: GgufFile, source: Checkpoint) -> dict[str, torch.Tensor]:
    pairs, _ = source_pairs(held, source)
    return {pair.name: source_values(held, pair) for pair in pairs}
