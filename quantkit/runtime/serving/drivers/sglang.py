"""SGLang's offline engine (`sglang.Engine`), by its documented interface as of 0.5.23."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quantkit.runtime.serving.drivers.base import EngineOrder, Ids, Tell, pin
from quantkit.runtime.serving.drivers.likeliest import LikeliestTokens

BATCH = 8
"""Sequences that are scored, generated and timed at once."""


class Sglang:
    """One `sglang.Engine`, without the radix cache: every token is computed.

    It keeps the model in a process of its own, so kernels and memory are not known here.
    """

    def __init__(self, order: EngineOrder) -> None:
        pin(order.device)
        import sglang

        self.version: str = sglang.__version__
        self._stop = list(order.stop)
        self._engine = sglang.Engine(
            model_path=order.model,
            skip_tokenizer_init=True,
            disable_radix_cache=True,
            context_length=order.length,
            max_running_requests=BATCH,
            random_seed=0,
            **order.arguments,
        )

    def logprobs(self, windows: Sequence[Ids], tell: Tell) -> list[list[float]]:
        return [prompt_logprobs(out, ids) for ids, out in self._scored(windows, tell)]

    def top_logprobs(self, windows: Sequence[Ids], count: int, file: str, tell: Tell) -> None:
        table = LikeliestTokens(windows, count)
        scored = self._scored(windows, tell, top_logprobs_num=count)
        for row, (ids, out) in enumerate(scored):
            top = out["meta_info"]["input_top_logprobs"][1:]
            for at, (follows, pairs) in enumerate(zip(prompt_logprobs(out, ids), top, strict=True)):
                table.put(row, at, follows, [(entry[0], entry[1]) for entry in pairs])
        table.write(file)

    def generate(self, prompts: Sequence[Ids], new_tokens: int) -> list[list[int]]:
        outputs = self._ask(prompts, max_new_tokens=new_tokens, stop_token_ids=self._stop)
        return [list(output["output_ids"]) for output in outputs]

    def run(self, prompts: Sequence[Ids], new_tokens: int) -> None:
        self._ask(prompts, max_new_tokens=new_tokens, ignore_eos=True)

    def kernels(self) -> dict[str, int]:
        return {}

    def memory_bytes(self) -> int:
        return 0

    def close(self) -> None:
        self._engine.shutdown()

    def _scored(
        self, windows: Sequence[Ids], tell: Tell, **more: Any
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Each window with what the engine says of its tokens."""
        for start in range(0, len(windows), BATCH):
            batch = [list(ids) for ids in windows[start : start + BATCH]]
            outputs = self._engine.generate(
                input_ids=batch,
                sampling_params={"temperature": 0, "max_new_tokens": 1},
                return_logprob=True,
                logprob_start_len=0,
                **more,
            )
            yield from zip(batch, outputs, strict=True)
            tell(start + len(batch), len(windows))

    def _ask(self, prompts: Sequence[Ids], **sampling: Any) -> list[dict[str, Any]]:
        """With `ignore_eos` it ignores `stop_token_ids` too (srt/managers/schedule_batch.py)."""
        settings = {"temperature": 0, **sampling}
        asked = [list(ids) for ids in prompts]
        answers: list[dict[str, Any]] = self._engine.generate(
            input_ids=asked, sampling_params=settings
        )
        return answers


def prompt_logprobs(output: Mapping[str, Any], ids: Ids) -> list[float]:
    """The log-probabilities in one answer of `generate` with `return_logprob`.

    `meta_info.input_token_logprobs` is a list of [log-probability, token id, text], one for each
    prompt token, the first without a value. Raises ValueError when it is of other tokens.
    """
    scored = output["meta_info"]["input_token_logprobs"]
    if [entry[1] for entry in scored] != list(ids):
        raise ValueError("SGLang scored other tokens than it was asked to")
    return [float(entry[0]) for entry in scored[1:]]
