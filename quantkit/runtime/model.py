"""What `load` returns: a module that looks like a Transformers causal language model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantkit.backends.adapters.hf_config import stated_value
from quantkit.errors import InputError
from quantkit.runtime.linear.grouped.select import Grouped
from quantkit.runtime.linear.kernels.select import packed_tensors
from quantkit.runtime.linear.modules import PlainLinear, QuantLinear
from quantkit.runtime.loading.hosted import HostedNetwork
from quantkit.runtime.loading.make_layers import LayerRecord, inputs_left_in_16_bit
from quantkit.runtime.network.cache import KVCache
from quantkit.runtime.network.cache_rounding import CacheScales, CacheWatch
from quantkit.runtime.network.decoder import Decoder
from quantkit.runtime.network.generation import Forward, Sampling, Streamer, generate
from quantkit.runtime.network.graph import DecodeGraph, unsupported

if TYPE_CHECKING:
    from transformers.modeling_outputs import CausalLMOutputWithPast


class Runtime(nn.Module):
    """A loaded model: `forward` and `generate` as Transformers has them, and how it computes.

    layers: for every quantized module of the checkpoint its scheme and kernel, and why not an
        earlier one.
    layout: the on-disk layout that it was read from, None for 16 bit.
    stop_tokens: what ends a generation unless named there (of generation_config.json).
    """

    def __init__(
        self,
        config: Any,
        network: Decoder | HostedNetwork,
        layers: list[LayerRecord],
        layout: str | None,
        stop_tokens: Sequence[int],
    ) -> None:
        super().__init__()
        self.config = config
        self.network = network
        self.layers = layers
        self.layout = layout
        self.stop_tokens = list(stop_tokens)
        self._graph: DecodeGraph | None = None
        self.eval()

    @property
    def lean(self) -> bool:
        """Whether our own decoder computes it, and not Transformers' modules."""
        return isinstance(self.network, Decoder)

    @property
    def device(self) -> torch.device:
        return self.network.embed.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.embed.dtype

    @property
    def weights_only(self) -> bool:
        """Whether some layer's activations should be quantized and are not."""
        return any(layer.weights_only for layer in self.layers)

    @property
    def schemes_with_16_bit_inputs(self) -> list[str]:
        """Schemes whose activations stay in 16 bit here because the engine leaves them so."""
        return inputs_left_in_16_bit(self.layers)

    @property
    def memory_bytes(self) -> int:
        """What all weights take in memory, each counted once."""
        held: dict[int, int] = {}
        outside = 0
        for module in self.modules():
            if isinstance(module, PlainLinear | QuantLinear):
                outside += module.outside_bytes
            packed: Iterable[torch.Tensor] = ()
            if isinstance(module, QuantLinear):
                packed = packed_tensors(module.packed)
            elif isinstance(module, Grouped):
                packed = module.tensors()
            for tensor in (*module.parameters(False), *module.buffers(False), *packed):
                place = tensor.data_ptr() if tensor.layout == torch.strided else id(tensor)
                held[place] = tensor.numel() * tensor.element_size()
        return sum(held.values()) + outside

    @property
    def cache_scales(self) -> dict[int, CacheScales]:
        """Layer → the scales of its quantized key-value cache; empty for one in 16 bit."""
        rules = self.network.cache_rules.items()
        return {index: rule for index, rule in rules if isinstance(rule, CacheScales)}

    @contextmanager
    def cache_in_16_bit(self) -> Iterator[Mapping[int, CacheWatch]]:
        """Compute with a key-value cache in 16 bit inside the block; layer → what it held."""
        scales = self.cache_scales
        watched = {index: CacheWatch() for index in scales}
        self.network.cache_rules = watched
        try:
            yield watched
        finally:
            self.network.cache_rules = scales

    def kernels(self) -> dict[str, int]:
        """Kernel → how many modules it computes."""
        return dict(Counter(layer.kernel for layer in self.layers))

    def to_json(self) -> dict[str, Any]:
        """How the model is computed, as plain JSON values: the layout, the device, the dtype of
        what is not quantized, bytes in memory, and scheme and kernel of every quantized module."""
        return {
            "schema_version": 1,
            "layout": self.layout,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "memory_bytes": self.memory_bytes,
            "weights_only": self.weights_only,
            "layers": [asdict(layer) for layer in self.layers],
        }

    @torch.inference_mode()
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        pictures: Mapping[str, torch.Tensor] | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, n or logits_to_keep, vocabulary] of input_ids [batch, n].

        `attention_mask` [batch, cached + n] is 0 on padding. With `use_cache` the result holds a
        cache to pass on as `past_key_values`. `pictures` are the other arguments that the model's
        processor makes (`pixel_values`, …). Raises InputError (`runtime.no_tower`) for pictures
        that nothing looks at.
        """
        from transformers.modeling_outputs import CausalLMOutputWithPast

        cache = past_key_values
        if cache is None and use_cache:
            cache = self.network.new_cache(input_ids.shape[0], input_ids.shape[1])
        if not pictures:
            logits = self.network(input_ids, attention_mask, cache, logits_to_keep)
        elif isinstance(self.network, HostedNetwork):
            logits = self.network(input_ids, attention_mask, cache, logits_to_keep, pictures)
        else:
            raise InputError(
                "The model has no tower that looks at pictures.",
                hint="give the text alone",
                code="runtime.no_tower",
            )
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)  # type: ignore[arg-type]

    @torch.inference_mode()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int = 128,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        streamer: Streamer | None = None,
    ) -> torch.Tensor:
        """Prompts [batch, n], padded on the left, with what follows them [batch, n + new].

        Ends with a stop token of each sequence, the rest being padding. A `streamer` is given the
        prompts, then the ids [batch] of every step. Raises InputError for prompts padded on the
        right.
        """
        stop = self.stop_tokens if eos_token_id is None else eos_token_id
        stops = [stop] if isinstance(stop, int) else list(stop)
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise InputError(
                "A prompt of the batch ends in padding.",
                hint="pad on the left: tokenizer.padding_side = 'left'",
                code="runtime.right_padding",
            )
        capacity = input_ids.shape[1] + max_new_tokens
        padding = (
            stated_value(self.config, "pad_token_id") if pad_token_id is None else pad_token_id
        )
        if padding is None:
            padding = stops[0] if stops else 0
        return generate(
            self._forward(input_ids.shape[0], capacity),
            input_ids,
            attention_mask,
            new_tokens=max_new_tokens,
            stop=stops,
            padding=padding,
            sampling=Sampling(do_sample, temperature, top_k, top_p, seed),
            streamer=streamer,
        )

    def _forward(self, batch: int, capacity: int) -> Forward:
        """What computes the steps of a generation: on a GPU a captured graph, kept for the next."""
        if isinstance(self.network, Decoder) and unsupported(self.network) is None:
            if self._graph is None or not self._graph.fits(batch, capacity):
                self._graph = None
                self._graph = DecodeGraph(self.network, batch, capacity)
            self._graph.begin()
            return self._graph.forward
        cache = self.network.new_cache(batch, capacity)
        return lambda ids, mask: self.network(ids, mask, cache, 1)
