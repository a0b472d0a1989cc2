"""The demo model in a shape that kernels like: 768 columns, the same function.

Its 576 columns are no multiple of 128, which blocks and groups of 128 want. Norms are folded into
the layers after them, the residual stream is rotated into 768 dimensions, and the first group of
heads (3 of queries, 1 of keys and values) is there twice at half its weight.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.directory import is_sidecar

WIDTH = 768
GROUP = 3
"""Heads of queries for one of keys and values."""


def widen(source: Path, target: Path) -> Path:
    """Write the wide form of the demo model to `target`; needs about 2 GB of memory."""
    config = json.loads((source / "config.json").read_text())
    old, inner = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    held = {name: one.double() for name, one in load_file(source / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(WIDTH, old, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(drawn)[0]  # [768, 576], its columns orthonormal
    norm = torch.full((WIDTH,), math.sqrt(old / WIDTH), dtype=torch.float64)
    embedding = held["model.embed_tokens.weight"]
    made = {
        "model.embed_tokens.weight": embedding @ turn.T,
        "lm_head.weight": (embedding * held["model.norm.weight"]) @ turn.T,
        "model.norm.weight": norm,
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        before, after = f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight"
        for name, count in (("q_proj", GROUP * inner), ("k_proj", inner), ("v_proj", inner)):
            rows = (held[f"{layer}self_attn.{name}.weight"] * held[before]) @ turn.T
            made[f"{layer}self_attn.{name}.weight"] = torch.cat([rows, rows[:count]])
        columns = turn @ held[f"{layer}self_attn.o_proj.weight"]
        half, rest = columns[:, : GROUP * inner] / 2, columns[:, GROUP * inner :]
        made[f"{layer}self_attn.o_proj.weight"] = torch.cat([half, rest, half], 1)
        for name in ("gate_proj", "up_proj"):
            made[f"{layer}mlp.{name}.weight"] = (
                held[f"{layer}mlp.{name}.weight"] * held[after]
            ) @ turn.T
        made[f"{layer}mlp.down_proj.weight"] = turn @ held[f"{layer}mlp.down_proj.weight"]
        made[before] = made[after] = norm
    target.mkdir(parents=True)
    stored = {name: one.bfloat16().contiguous().clone() for name, one in made.items()}
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    config |= {
        "hidden_size": WIDTH,
        "num_attention_heads": config["num_attention_heads"] + GROUP,
        "num_key_value_heads": config["num_key_value_heads"] + 1,
        "head_dim": inner,
        "tie_word_embeddings": False,
        "rms_norm_eps": config["rms_norm_eps"] * old / WIDTH,
    }
    (target / "config.json").write_text(json.dumps(config, indent=2))
    for path in source.iterdir():
        if is_sidecar(path.name):
            shutil.copyfile(path, target / path.name)
    return target
