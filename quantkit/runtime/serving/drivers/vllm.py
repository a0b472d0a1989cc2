"""vLLM's offline engine (`vllm.LLM`), as of 0.32."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from math import ceil
from typing import Any

from quantkit.runtime.serving.drivers.base import EngineOrder, Ids, Tell, pin
from quantkit.runtime.serving.drivers.likeliest import LikeliestTokens

_NO_KERNEL = ("Unquantized", "KVCache", "NoneType")
"""Parts of the names of what computes no quantized weight."""

BATCH = 8
"""Sequences that are scored, generated and timed at once."""


class Vllm:
    """One `vllm.LLM` in this process, without prefix caching: every token is computed.

    On a CPU it runs eagerly, and its throughput is less than a server's: in one measurement of a
    135 M model, compiled, it read prompts twice as fast and took 58 s to load instead of 11 s.
    """

    def __init__(self, order: EngineOrder) -> None:
        pin(order.device)
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(ceil(order.cache_bytes / 2**30)))
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        import vllm

        self.version: str = vllm.__version__
        self._sampling = vllm.SamplingParams
        self._stop = list(order.stop)
        settings = {**settings_here(), **order.arguments}
        self._engine = vllm.LLM(
            model=order.model,
            skip_tokenizer_init=not order.towers,
            generation_config="vllm",
            enable_prefix_caching=False,
            max_model_len=order.length,
            max_num_seqs=BATCH,
            max_logprobs=max(order.likeliest, 1),
            seed=0,
            **settings,
        )

    def logprobs(self, windows: Sequence[Ids], tell: Tell) -> list[list[float]]:
        return [
            [float(score[token].logprob) for token, score in zip(ids[1:], scores, strict=True)]
            for ids, scores in self._scored(windows, 0, tell)
        ]

    def top_logprobs(self, windows: Sequence[Ids], count: int, file: str, tell: Tell) -> None:
        """vLLM adds the token of the prompt where it is none of the likeliest, by its rank."""
        table = LikeliestTokens(windows, count)
        for row, (ids, scores) in enumerate(self._scored(windows, count, tell)):
            for at, score in enumerate(scores):
                ranked = sorted(score.items(), key=lambda item: item[1].rank)[:count]
                pairs = [(said.logprob, token) for token, said in ranked]
                table.put(row, at, score[ids[at + 1]].logprob, pairs)
        table.write(file)

    def generate(self, prompts: Sequence[Ids], new_tokens: int) -> list[list[int]]:
        outputs = self._ask(prompts, max_tokens=new_tokens, stop_token_ids=self._stop)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def run(self, prompts: Sequence[Ids], new_tokens: int) -> None:
        self._ask(prompts, max_tokens=new_tokens, min_tokens=new_tokens)

    def kernels(self) -> dict[str, int]:
        found: dict[str, int] = self._engine.apply_model(_kernels)[0]
        return found

    def memory_bytes(self) -> int:
        return sum(self._engine.apply_model(_weigh))

    def close(self) -> None:
        del self._engine

    def _scored(
        self, windows: Sequence[Ids], count: int, tell: Tell
    ) -> Iterator[tuple[Ids, Sequence[Any]]]:
        """Each window with what vLLM says of every token but its first, and of `count` others."""
        for start in range(0, len(windows), BATCH):
            batch = windows[start : start + BATCH]
            outputs = self._ask(batch, max_tokens=1, prompt_logprobs=count)
            for ids, output in zip(batch, outputs, strict=True):
                yield ids, output.prompt_logprobs[1:]
            tell(start + len(batch), len(windows))

    def _ask(self, prompts: Sequence[Ids], **sampling: Any) -> list[Any]:
        settings = self._sampling(temperature=0, ignore_eos=True, detokenize=False, **sampling)
        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        outputs: list[Any] = self._engine.generate(asked, settings, use_tqdm=False)
        return outputs


def settings_here() -> dict[str, Any]:
    """What this machine asks for: no compiling on a CPU; of a GPU that others use too, no larger
    share of the memory than is free."""
    import torch
    from vllm import EngineArgs
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return {"enforce_eager": True}
    free, total = torch.cuda.mem_get_info()
    share = int(100 * free / total) / 100 - 0.01
    wanted = EngineArgs.gpu_memory_utilization
    return {"gpu_memory_utilization": share} if share < wanted else {}


def _kernels(model: Any) -> dict[str, int]:
    """Kernels of a model's linear modules, 16-bit ones left out, by their classes in vLLM."""
    named = (_kernel(module) for module in model.modules() if hasattr(module, "quant_method"))
    return dict(Counter(name for name in named if not any(part in name for part in _NO_KERNEL)))


def _kernel(module: Any) -> str:
    """The innermost of quant_method → scheme → kernel that a module has."""
    holder = getattr(module, "scheme", None) or module.quant_method
    for name in ("kernel", "fp8_linear", "mm_kernel"):
        holder = getattr(holder, name, None) or holder
    return type(holder).__name__


def _weigh(model: Any) -> int:
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(held.values())
