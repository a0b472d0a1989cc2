"""A mixture of experts that answers, made of a dense Llama by sparse upcycling.

Komatsuzaki et al. 2023 (arXiv 2212.05055): attention, norms and embeddings are copied; every MLP
becomes experts that are copies of it, here each with noise of its own, under a random router whose
weights are renormalised over the experts that it picks.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quantkit.checkpoint.demo import demo_model
from quantkit.checkpoint.directory import Checkpoint, is_sidecar, open_checkpoint
from quantkit.checkpoint.paths import cache_dir, keep_first
from quantkit.checkpoint.shards import write_shards
from quantkit.checkpoint.tensors import read_tensor
from quantkit.errors import InputError

if TYPE_CHECKING:
    import torch

    Named = Iterator[tuple[str, torch.Tensor]]

Family = Literal["mixtral", "qwen2_moe"]

ACTIVE = 2
"""Experts that compute a token."""
EXPERT_NOISE = 0.05
"""Of the weight's standard deviation."""
ROUTER_DEVIATION = 0.02
SEED = 0
SHARD_BYTES = 500_000_000

_MLP = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def demo_mixture(experts: int = 4) -> Path:
    """The demo model as a Mixtral (4 experts: 373 M parameters, 8: 692 M); made when not cached.

    Raises BackendError as `demo_model` does.
    """
    source = demo_model()
    target = cache_dir() / "demo" / f"{source.name}-{experts}x"
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        staged = Path(work) / "model"
        upcycle(source, staged, experts)
        keep_first(staged, target)
    return target


def upcycle(source: Path, target: Path, experts: int, family: Family = "mixtral") -> Path:
    """Write a dense Llama as a mixture of `experts` to the new directory `target`; two of them
    compute a token.

    The same weights every time. Memory holds one shard. Raises InputError for a source that is no
    Llama.
    """
    dense = open_checkpoint(source)
    if dense.config.get("model_type") != "llama":
        raise InputError(
            f"{source} is a {dense.config.get('model_type')}; only a Llama can be upcycled.",
            hint="give the directory of a 16-bit Llama",
            code="upcycle.not_llama",
        )
    target.mkdir(parents=True)
    config = _mixtral_config(dense, experts)
    if family == "qwen2_moe":
        config = _qwen2_moe_config(dense, experts)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in source.iterdir():
        if is_sidecar(path.name) or path.name == "README.md":
            shutil.copyfile(path, target / path.name)
    write_shards(target, _tensors(dense, experts, family), SHARD_BYTES)
    return target


def _mixtral_config(dense: Checkpoint, experts: int) -> dict[str, Any]:
    left_out = ("attention_bias", "mlp_bias", "pretraining_tp")
    kept = {key: value for key, value in dense.config.items() if key not in left_out}
    return kept | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_experts_per_tok": ACTIVE,
        "num_local_experts": experts,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    }


def _qwen2_moe_config(dense: Checkpoint, experts: int) -> dict[str, Any]:
    left_out = ("attention_bias", "head_dim", "mlp_bias", "pretraining_tp")
    kept = {key: value for key, value in dense.config.items() if key not in left_out}
    width = dense.config["intermediate_size"]
    return kept | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "model_type": "qwen2_moe",
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
        "num_experts": experts,
        "num_experts_per_tok": ACTIVE,
        "output_router_logits": False,
        "qkv_bias": True,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": width,
        "use_sliding_window": False,
    }


def _tensors(dense: Checkpoint, experts: int, family: Family) -> Named:
    import torch

    random = torch.Generator().manual_seed(SEED)
    for name, info in dense.tensors.items():
        if ".mlp." not in name:
            yield name, read_tensor(info)
    for index in range(int(dense.config["num_hidden_layers"])):
        layer = f"model.layers.{index}"
        mlp = {
            leaf: read_tensor(dense.tensors[f"{layer}.mlp.{leaf}.weight"]) for leaf in _MLP
        }  # fmt: skip
        if family == "mixtral":
            yield from _mixtral_layer(f"{layer}.block_sparse_moe", mlp, experts, random)
        else:
            yield from _qwen2_biases(f"{layer}.self_attn", dense)
            yield from _qwen2_layer(f"{layer}.mlp", mlp, experts, random)


def _mixtral_layer(
    block: str, mlp: dict[str, torch.Tensor], experts: int, random: torch.Generator
) -> Named:
    yield f"{block}.gate.weight", _router(mlp["gate_proj"], experts, random)
    for expert in range(experts):
        for leaf, weight in mlp.items():
            name = f"{block}.experts.{expert}.{_MIXTRAL[leaf]}.weight"
            yield name, _noisy(weight, random)


def _qwen2_layer(
    block: str, mlp: dict[str, torch.Tensor], experts: int, random: torch.Generator
) -> Named:
    """Half of what the MLP gives comes from the shared expert, whose gate is sigmoid(0), and half
    from the routed ones."""
    yield f"{block}.gate.weight", _router(mlp["gate_proj"], experts, random)
    yield (
        f"{block}.shared_expert_gate.weight",
        mlp["gate_proj"].new_zeros(1, mlp["gate_proj"].shape[1]),
    )
    for leaf, weight in mlp.items():
        yield f"{block}.shared_expert.{leaf}.weight", weight.clone()
    for expert in range(experts):
        for leaf, weight in mlp.items():
            part = weight / 2 if leaf == "down_proj" else weight
            yield f"{block}.experts.{expert}.{leaf}.weight", _noisy(part, random)


def _qwen2_biases(attention: str, dense: Checkpoint) -> Named:
    import torch

    for leaf in ("q_proj", "k_proj", "v_proj"):
        rows = dense.tensors[f"{attention}.{leaf}.weight"].shape[0]
        yield f"{attention}.{leaf}.bias", torch.zeros(rows, dtype=torch.bfloat16)


def _router(like: torch.Tensor, experts: int, random: torch.Generator) -> torch.Tensor:
    import torch

    drawn = torch.randn(experts, like.shape[1], generator=random)
    return (drawn * ROUTER_DEVIATION).to(like.dtype)


def _noisy(weight: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    import torch

    values = weight.float()
    noise = torch.randn(values.shape, generator=random)
    return values.add_(noise, alpha=EXPERT_NOISE * float(values.std())).to(weight.dtype)
