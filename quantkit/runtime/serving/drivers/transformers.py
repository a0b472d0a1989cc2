"""Transformers: `from_pretrained` of the Auto class, in the dtype of the checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from quantkit.runtime.serving.drivers.base import EngineOrder, Ids, Tell, pin
from quantkit.runtime.serving.drivers.likeliest import LikeliestTokens

BATCH_TOKENS = 2048
"""Tokens a forward pass: the logits of that many are the largest thing in memory."""


def _auto_class(transformers: Any, model: str) -> Any:
    """Of models that take more than text where the config has a language model inside."""
    config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
    multimodal = getattr(transformers, "AutoModelForMultimodalLM", None)
    nested = config.get_text_config() is not config
    known = multimodal is not None and type(config) in multimodal._model_mapping
    return multimodal if nested and known else transformers.AutoModelForCausalLM


class Transformers:
    """A model as `from_pretrained` loads it: on one device, or its layers over several GPUs."""

    def __init__(self, order: EngineOrder) -> None:
        if "," in order.device:
            pin(order.device)
        import torch
        import transformers

        self.version: str = transformers.__version__
        self._torch = torch
        self._stop = list(order.stop)
        device = order.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif "," in device:
            device = "balanced"
        loaded: Any = _auto_class(transformers, order.model).from_pretrained(
            order.model, dtype="auto", device_map=device, trust_remote_code=False
        )
        self._model = loaded.eval()

    def logprobs(self, windows: Sequence[Ids], tell: Tell) -> list[list[float]]:
        found: list[list[float]] = []
        for _, ids, scores in self._scored(windows, tell):
            chosen = scores.gather(-1, ids[:, 1:, None]).squeeze(-1)
            found += (chosen - scores.logsumexp(-1)).tolist()
        return found

    def top_logprobs(self, windows: Sequence[Ids], count: int, file: str, tell: Tell) -> None:
        table = LikeliestTokens(windows, count)
        for rows, ids, scores in self._scored(windows, tell):
            said = scores.log_softmax(-1)
            table.logprobs[rows] = said.gather(-1, ids[:, 1:, None]).squeeze(-1).cpu()
            kept, likeliest = said.topk(count)
            table.kept[rows], table.ids[rows] = kept.cpu(), likeliest.cpu()
        table.write(file)

    def generate(self, prompts: Sequence[Ids], new_tokens: int) -> list[list[int]]:
        return [self._continue([ids], new_tokens, self._stop)[0] for ids in prompts]

    def run(self, prompts: Sequence[Ids], new_tokens: int) -> None:
        self._continue(prompts, new_tokens, [])

    def kernels(self) -> dict[str, int]:
        found = (type(module).__name__ for module in self._model.modules() if _is_quantized(module))
        return dict(Counter(found))

    def memory_bytes(self) -> int:
        return int(self._model.get_memory_footprint())

    def close(self) -> None:
        del self._model

    def _scored(self, windows: Sequence[Ids], tell: Tell) -> Iterator[tuple[slice, Any, Any]]:
        """Rows of windows, their ids, and the float32 logits of every token that follows."""
        torch = self._torch
        step = max(1, BATCH_TOKENS // len(windows[0]))
        for start in range(0, len(windows), step):
            ids = torch.tensor(windows[start : start + step], device=self._model.device)
            with torch.inference_mode():
                scores = self._model(ids, use_cache=False).logits[:, :-1].float()
            yield slice(start, start + len(ids)), ids, scores
            tell(start + len(ids), len(windows))

    def _continue(self, prompts: Sequence[Ids], new: int, stop: list[int]) -> list[list[int]]:
        """Prompts of one length, each with `new` tokens or up to a stop token."""
        torch = self._torch
        ids = torch.tensor([list(prompt) for prompt in prompts], device=self._model.device)
        with torch.inference_mode():
            whole = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=None if stop else new,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,
                eos_token_id=stop or None,
                pad_token_id=0,
            )
        rows: list[list[int]] = whole[:, ids.shape[1] :].tolist()
        return rows


def _is_quantized(module: Any) -> bool:
    """Whether a module itself holds codes or scales."""
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return any(name in ("weight_scale", "weight_packed", "qweight") for name, _ in tensors)
