"""Validate checkpoints of one baseline: a table, a picture, and damaged copies.

    python benchmarks/validate_methods.py BASELINE DIR... --pictures docs/images
    python benchmarks/validate_methods.py BASELINE DIR... --round 3 --round 2
    python benchmarks/validate_methods.py BASELINE DIR... --damage --pictures docs/images

The order within one number format is what counts: 8 bits ≈ baseline < 4 bits tuned < 4 bits rounded
to nearest < 3 bits < 2 bits. `--round BITS` adds a copy of the baseline (a directory) rounded to
so many bits in groups of 64, in GPTQ's layout, with the clipping of least error. `--damage`
validates copies of each checkpoint, damaged in the layer in the middle, instead; every one must
fail its gates. The pictures are `methods.png` and, with `--damage`, `damaged.png`, the layers of
the first copy.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from quantkit.backends.streaming.rtn import quantize_rows
from quantkit.checkpoint.directory import read_json
from quantkit.checkpoint.schemes import SCHEMES
from quantkit.cli.output import Output
from quantkit.formats import gptq
from quantkit.formats.base import LayerSpec, QuantWeight
from quantkit.validation.reports.markdown import number, table
from quantkit.validation.reports.plots import layers_figure, scatter_figure
from quantkit.validation.run import ValidateRequest, validate
from tests.support import written

COLUMNS = ("ppl_ratio", "kl_mean", "kl_of_rtn", "top1_agreement", "mcq_drop", "canary_drift",
           "weight_sqnr_margin")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("baseline")
    parser.add_argument("directories", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--damage", action="store_true")
    parser.add_argument("--round", type=int, action="append", default=[], metavar="BITS")
    asked = parser.parse_args()
    documents = []
    with tempfile.TemporaryDirectory() as work:
        asked.directories += [
            rounded(Path(asked.baseline), Path(work) / f"{bits} bits, rounded", bits)
            for bits in asked.round
        ]
        for name, directory in subjects(asked.directories, Path(work) if asked.damage else None):
            request = ValidateRequest(
                directory, asked.baseline, samples=asked.samples, throughput=False
            )
            document = validate(request, Output()).to_json()
            document["checkpoint"] |= {"name": name, "method": name}
            documents.append(document)
            print(" | ".join(row(document)), file=sys.stderr)
    if asked.pictures:
        asked.pictures.mkdir(parents=True, exist_ok=True)
        name = "damaged" if asked.damage else "methods"
        figure = layers_figure(documents[0]) if asked.damage else scatter_figure(documents)
        if figure is not None:
            figure.savefig(asked.pictures / f"{name}.png", dpi=110)
    documents.sort(key=lambda document: document["metrics"]["kl_mean"]["value"])
    print("\n".join(table(["checkpoint", "MB", *COLUMNS, "fails"], map(row, documents))))


def row(document: dict[str, Any]) -> tuple[str, ...]:
    cells = [document["metrics"][name] for name in COLUMNS]
    failed = [gate["metric"] for gate in document["gates"] if gate["verdict"] == "fail"]
    return (
        f"`{document['checkpoint']['name']}`",
        f"{document['checkpoint']['weight_bytes'] / 1e6:.0f}",
        *(number(cell["value"]) for cell in cells),
        ", ".join(failed) or "nothing",
    )


def subjects(directories: list[Path], work: Path | None) -> Iterator[tuple[str, Path]]:
    """Names and directories: the checkpoints themselves, or their damaged copies in `work`."""
    for directory in directories:
        if work is None:
            yield directory.name, directory
            continue
        for what in ("scales × 1.5", "k and v swapped", "gate and up swapped", "zero point"):
            copy = work / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(directory, copy)
            (copy / "quantkit.json").unlink(missing_ok=True)
            if damage(copy, what):
                yield f"{directory.name}, {what}", copy


def rounded(baseline: Path, out: Path, bits: int) -> Path:
    """The baseline, of one file, with every linear layer of its blocks rounded to nearest."""
    scheme = SCHEMES[f"w{bits}a16"].with_weight(group_size=64, symmetric=False)
    shutil.copytree(baseline, out)
    tensors = load_file(out / "model.safetensors")
    layers = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        module, weight = name.removesuffix(".weight"), tensors.pop(name)
        spec = LayerSpec(scheme, "gptq_v2", (weight.shape[0], weight.shape[1]))
        rows = quantize_rows(weight, scheme.weight, clip="mse")
        assert rows.zero_point is not None
        held = QuantWeight(scheme.weight, rows.codes, rows.scale.float(), rows.zero_point.float())
        parts = written.gptq(held, spec, torch.float16)
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        layers[module] = spec
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = read_json(out / "config.json")
    config["quantization_config"] = gptq.quantization_config(layers, [])
    (out / "config.json").write_text(json.dumps(config))
    return out


def damage(directory: Path, what: str) -> bool:
    """Damage one decoder layer of a one-file checkpoint; False where it has nothing to damage."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    blocks = sorted({int(name.split(".")[2]) for name in tensors if ".layers." in name})
    block = f"model.layers.{blocks[len(blocks) // 2]}."
    down = f"{block}mlp.down_proj."
    if what == "scales × 1.5":
        tensors[f"{down}weight_scale"] *= 1.5
    elif what == "zero point":
        if f"{down}weight_zero_point" not in tensors:
            return False
        bits = (
            tensors[f"{down}weight_packed"].shape[1] * 32 // int(tensors[f"{down}weight_shape"][1])
        )
        off = 0x10101010 if bits == 8 else 0x22222222
        tensors[f"{down}weight_zero_point"] ^= off
    else:
        pair = ("self_attn.k_proj.", "self_attn.v_proj.")
        one, other = pair if what[0] == "k" else ("mlp.gate_proj.", "mlp.up_proj.")
        for name in [name for name in tensors if name.startswith(block + one)]:
            twin = name.replace(one, other)
            tensors[name], tensors[twin] = tensors[twin], tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    return True


if __name__ == "__main__":
    main()
