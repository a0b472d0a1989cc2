"""Decoding of a mixture of experts on a GPU: FP8 and W4A16 experts against BF16, in one run.

    python benchmarks/gpu_moe.py [--layers 48] [--batches 1 8 32] [--schemes bf16 fp8_dynamic w4a16]
                                 [--json FILE]

The model has the shape of Qwen3-30B-A3B (128 experts, 8 of which compute a token) with random
weights made on the device; every linear layer but routers and head is quantized. Prints tokens/s
of the captured decoding step after 128 tokens (the median of the rounds), and its ratio to BF16.
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from gpu_llama import GPU, SIGMA, quantized

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.runtime.linear.description import describe
from quantkit.runtime.linear.grouped.select import group, kernels_of_experts
from quantkit.runtime.linear.kernels.select import choose
from quantkit.runtime.linear.modules import PlainLinear, QuantLinear
from quantkit.runtime.loading.make_layers import LayerRecord
from quantkit.runtime.loading.mixture import HostedBlock
from quantkit.runtime.model import Runtime
from quantkit.runtime.network.decoder import Block, Decoder, Shape
from quantkit.runtime.network.experts import GroupedExperts
from quantkit.runtime.network.mlp import silu_mul

SHAPE = {
    "vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "norm_topk_prob": True, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
PROMPT, NEW, ROUNDS = 128, 64, 5


def build(scheme_name: str, layers: int) -> Runtime:
    """The model with "bf16" or quantized layers."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(num_hidden_layers=layers, **SHAPE)  # type: ignore[arg-type]
    hidden, wide, shape = config.hidden_size, config.moe_intermediate_size, Shape.of(config)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    generator = torch.Generator(GPU).manual_seed(0)
    records: list[LayerRecord] = []

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=GPU, dtype=torch.bfloat16) * SIGMA

    def linear(name: str, *size: int, expert: bool = False) -> torch.nn.Module:
        if scheme_name == "bf16":
            return PlainLinear(random(*size), None)
        scheme = SCHEMES[scheme_name]
        weight = quantized(random(*size), scheme, 6.0)
        layer = describe(name, scheme, weight, torch.bfloat16)
        choice = choose(layer, GPU, kernels_of_experts(scheme, GPU) if expert else [])
        records.append(LayerRecord(name, scheme_name, choice.kernel.NAME, {}, choice.weights_only))
        return QuantLinear(layer, choice, weight, None)

    ones = torch.ones(hidden, dtype=torch.bfloat16, device=GPU)
    head_norms = (ones[: shape.head_dim], ones[: shape.head_dim])
    blocks = []
    for index in range(layers):
        count = range(config.num_experts)
        ups = [linear(f"{index}.up", 2 * wide, hidden, expert=True) for _ in count]
        downs = [linear(f"{index}.down", hidden, wide, expert=True) for _ in count]
        with torch.device("meta"):
            module: Any = Qwen3MoeSparseMoeBlock(config)
        module.gate.weight = torch.nn.Parameter(random(config.num_experts, hidden), False)
        module.experts = GroupedExperts(ups, downs, silu_mul, group(ups, downs, GPU))
        projections = (
            linear(f"{index}.qkv", queries + 2 * keys, hidden),
            linear(f"{index}.out", hidden, queries),
        )
        mlp = HostedBlock(module.eval())
        blocks.append(Block(shape, 1e-6, (ones, ones), head_norms, projections, mlp, None))
    embed = random(config.vocab_size, hidden) * 50
    head = PlainLinear(random(config.vocab_size, hidden), None)
    network = Decoder(config, embed, blocks, ones, head)
    return Runtime(config, network, records, None if scheme_name == "bf16" else "random", [])


def rate(runtime: Runtime, batch: int) -> float:
    """New tokens a second, all sequences together, prefill subtracted."""
    ids = torch.randint(3, 1000, (batch, PROMPT), device=GPU)
    spent = []
    for new in (1, NEW):
        torch.cuda.synchronize()
        start = time.perf_counter()
        runtime.generate(ids, max_new_tokens=new, eos_token_id=[])
        torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    return batch * (NEW - 1) / (spent[1] - spent[0])


def difference(runtime: Runtime) -> float:
    """How far the captured step's logits are from the decoder's, on the last of nine tokens."""
    ids = torch.randint(3, 1000, (1, 9), device=GPU)
    step = runtime._forward(1, 32)
    step(ids[:, :8], None)
    captured = step(ids[:, 8:], None)[:, -1].double()
    whole = runtime(ids, logits_to_keep=1).logits[:, -1].double()
    return float((captured - whole).norm() / whole.norm())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--schemes", nargs="+", default=["bf16", "fp8_dynamic", "w4a16"])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {asked.layers} layers")
    found: dict[str, dict[str, Any]] = {}
    for scheme in asked.schemes:
        start = time.perf_counter()
        runtime = build(scheme, asked.layers)
        experts = next(m for m in runtime.modules() if isinstance(m, GroupedExperts))
        kernel = "one by one" if experts.grouped is None else experts.grouped.kernel.NAME
        made = time.perf_counter() - start
        row: dict[str, Any] = {
            "kernel": kernel, "bytes": runtime.memory_bytes, "difference": difference(runtime),
        }  # fmt: skip
        for batch in asked.batches:
            rates = [rate(runtime, batch) for _ in range(ROUNDS + 1)][1:]  # the first captures
            row[str(batch)] = statistics.median(rates)
        found[scheme] = row
        ratios = [
            f"{row[str(batch)]:.0f} ({row[str(batch)] / found[asked.schemes[0]][str(batch)]:.2f})"
            for batch in asked.batches
        ]
        print(
            f"| {scheme} | {kernel} | {row['bytes'] / 1e9:.1f} GB | {' | '.join(ratios)} | "
            f"step against decoder {row['difference']:.4f}, made in {made:.0f} s",
            flush=True,
        )
        del runtime, experts
        gc.collect()
        torch.cuda.empty_cache()
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
