"""A Llama of random weights made on the GPU, 16-bit or quantized there, for benchmarks/gpu.py."""

from typing import Any

import torch
from random_llama import SIZES

from quantkit.backends.streaming.rtn import nvfp4_global_scale, quantize_rows
from quantkit.checkpoint.schemes import SCHEMES, Scheme
from quantkit.formats.base import QuantWeight
from quantkit.formats.dequantize import decode_e8m0
from quantkit.runtime.linear.description import describe
from quantkit.runtime.linear.kernels.select import choose
from quantkit.runtime.linear.modules import PlainLinear, QuantLinear
from quantkit.runtime.loading.make_layers import LayerRecord
from quantkit.runtime.model import Runtime
from quantkit.runtime.network.decoder import Block, Decoder, Shape
from quantkit.runtime.network.mlp import Mlp

GPU = torch.device("cuda")
SIGMA = 0.02
Amax = dict[str, float]
"""Module → the largest magnitude of its input."""


def quantized(weight: torch.Tensor, scheme: Scheme, amax: float) -> QuantWeight:
    """Round-to-nearest codes of a weight; `amax` sets the static scale of the input, if any."""
    number, inputs = scheme.weight, scheme.input
    outer = input_scale = None
    if inputs is not None and (not inputs.dynamic or inputs.scale == "e4m3"):
        top = {"fp8_e4m3": 448.0, "int8": 127.0, "fp4_e2m1": 448.0 * 6}[inputs.element]
        input_scale = torch.tensor([amax / top], device=weight.device)
    if number.granularity == "tensor":
        scale = weight.abs().amax().float().reshape(1, 1) / 448
        return QuantWeight(
            number, (weight / scale).to(torch.float8_e4m3fn), scale, input_scale=input_scale
        )
    if number.scale == "e4m3":
        outer = nvfp4_global_scale(float(weight.abs().amax()), weight.dtype).to(weight.device)
    rows = quantize_rows(weight, number, global_scale=outer)
    scale = decode_e8m0(rows.scale) if number.scale == "e8m0" else rows.scale.float()
    outer = None if outer is None else 1 / outer.double()
    return QuantWeight(number, rows.codes, scale, global_scale=outer, input_scale=input_scale)


def build(scheme_name: str, size: str, amax: Amax | None = None, layers: int = 0) -> Runtime:
    """The Llama of `random_llama.SIZES`; "bf16", or every linear layer but the head in a scheme."""
    from transformers import LlamaConfig

    chosen = SIZES[size]
    hidden, inner, kv = chosen["hidden"], chosen["inner"], chosen["kv"]
    config = LlamaConfig(
        vocab_size=chosen["vocab"], hidden_size=hidden, intermediate_size=inner,
        num_hidden_layers=layers or chosen["layers"], num_attention_heads=chosen["heads"],
        num_key_value_heads=kv * chosen["heads"] // hidden, max_position_embeddings=8192,
        rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    records: list[LayerRecord] = []
    generator = torch.Generator(GPU)

    def random(seed: int, *shape: int) -> torch.Tensor:
        generator.manual_seed(seed)
        return torch.randn(shape, generator=generator, device=GPU, dtype=torch.bfloat16) * SIGMA

    def linear(name: str, seed: int, *shape: int) -> torch.nn.Module:
        weight = random(seed, *shape)
        if scheme_name == "bf16":
            return PlainLinear(weight, None)
        scheme = SCHEMES[scheme_name]
        canonical = quantized(weight, scheme, (amax or {}).get(name, 6.0))
        layer = describe(name, scheme, canonical, torch.bfloat16)
        choice = choose(layer, GPU)
        records.append(LayerRecord(name, scheme_name, choice.kernel.NAME, {}, choice.weights_only))
        return QuantLinear(layer, choice, canonical, None)

    blocks = []
    ones = torch.ones(hidden, dtype=torch.bfloat16, device=GPU)
    for index in range(config.num_hidden_layers):
        sizes = {
            "qkv": (hidden + 2 * kv, hidden), "out": (hidden, hidden),
            "gate_up": (2 * inner, hidden), "down": (hidden, inner),
        }  # fmt: skip
        made: Any = tuple(
            linear(f"{index}.{name}", 10 * index + at, *shape)
            for at, (name, shape) in enumerate(sizes.items())
        )
        mlp = Mlp(*made[2:])
        blocks.append(Block(Shape.of(config), 1e-5, (ones, ones), None, made[:2], mlp, None))
    embed = random(10_001, chosen["vocab"], hidden) * 50
    head = PlainLinear(random(10_002, chosen["vocab"], hidden), None)
    network = Decoder(config, embed, blocks, ones, head)
    return Runtime(config, network, records, None if scheme_name == "bf16" else "random", [])


@torch.inference_mode()
def largest_inputs(model: Runtime, ids: torch.Tensor) -> Amax:
    """The largest magnitude of every linear layer's input over some tokens."""
    found: Amax = {}
    hooks = []
    for index, block in enumerate(model.network.blocks):  # type: ignore[arg-type]
        for name in ("qkv", "out", "gate_up", "down"):

            def note(_: Any, inputs: Any, name: str = f"{index}.{name}") -> None:
                found[name] = float(inputs[0].abs().max())

            holder = block if name in ("qkv", "out") else block.mlp
            hooks.append(getattr(holder, name).register_forward_pre_hook(note))
    model(ids, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return found
