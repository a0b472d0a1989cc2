"""Write a random Llama in BF16 of a chosen size, in shards, without building the model.

    python benchmarks/random_llama.py DIR [--size 1.1] [--shards 5]

Weights are Gaussian (σ = 0.02), cut from one block of random numbers at a different place for every
tensor, so that 8 B parameters take as long to write as the disk needs.
"""

import argparse
import json
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

SIZES: dict[str, dict[str, int]] = {
    "0.01": {"hidden": 256, "inner": 1024, "layers": 4, "kv": 64, "vocab": 4096, "heads": 4},
    "0.3": {"hidden": 1024, "inner": 4096, "layers": 16, "kv": 256, "vocab": 32000, "heads": 16},
    "1.1": {"hidden": 2048, "inner": 5632, "layers": 22, "kv": 256, "vocab": 32000, "heads": 32},
    "3": {"hidden": 3072, "inner": 8192, "layers": 28, "kv": 1024, "vocab": 128256, "heads": 24},
    "8": {"hidden": 4096, "inner": 14336, "layers": 32, "kv": 1024, "vocab": 128256, "heads": 32},
}
POOL = 1 << 25


def shapes_of(size: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, in the order of its layers."""
    hidden, inner, kv = size["hidden"], size["inner"], size["kv"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size["vocab"], hidden)}
    block = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    for layer in range(size["layers"]):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (size["vocab"], hidden)}


def pool() -> npt.NDArray[np.uint16]:
    """Gaussian numbers as BF16 bits."""
    values = np.random.default_rng(0).standard_normal(POOL, dtype=np.float32) * 0.02
    return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def write_shard(
    file: Path, shapes: dict[str, tuple[int, ...]], numbers: npt.NDArray[np.uint16]
) -> None:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + 2 * int(np.prod(shape))
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as handle:
        handle.write(struct.pack("<Q", len(header)) + header)
        for name, shape in shapes.items():
            left, place = int(np.prod(shape)), sum(name.encode()) * 7919 % POOL
            while left:
                piece = numbers[place : place + left]
                handle.write(piece.tobytes())
                left, place = left - len(piece), 0


def config_of(size: dict[str, int]) -> dict[str, object]:
    """The config.json of a model of these sizes."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": size["hidden"], "intermediate_size": size["inner"],
        "num_hidden_layers": size["layers"], "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv"] * size["heads"] // size["hidden"],
        "vocab_size": size["vocab"], "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
    }  # fmt: skip


def make(path: Path, size: str = "1.1", shards: int = 5, **others: int) -> int:
    """Write the checkpoint, with `others` in place of what `SIZES` says; its bytes of weights."""
    chosen = SIZES[size] | others
    shapes, numbers = shapes_of(chosen), pool()
    total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    path.mkdir(parents=True)
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        if filled >= total / shards and len(parts) < shards:
            parts.append({})
            filled = 0
        parts[-1][name] = shape
        filled += 2 * int(np.prod(shape))
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_shard(path / file, part, numbers)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(config_of(chosen), indent=2))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("path", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1.1")
    parser.add_argument("--shards", type=int, default=5)
    chosen = parser.parse_args()
    print(make(chosen.path, chosen.size, chosen.shards) / 1e9, "GB")


if __name__ == "__main__":
    main()
