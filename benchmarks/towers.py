"""A model behind a vision tower: the libraries' own scripts and the same through quantkit, in turn.

    python benchmarks/towers.py WORKDIR [--only NAME …] [--rounds 3] [--samples 16] [--length 256]
                                        [--layers N]

The demo model in its Idefics3 wrapper (cut to N layers), calibrated with text; tower, connector and
head stay in 16 bit on both sides. Prints medians of time and peak memory of the library's stage,
from loading to saving, whose ratios should be at most 1.05, and whether the tensors are equal.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts_in_turn import add_sizes, print_in_turn

from quantkit.checkpoint.demo import demo_model
from quantkit.checkpoint.wrap_vision import demo_with_vision, wrap_vision
from tests.support.helpers import cut_layers

METHODS: dict[str, tuple[str, ...]] = {
    "llmcompressor_fp8_dynamic": (),
    "llmcompressor_w4a16": ("group_size=64",),
    "llmcompressor_nvfp4": (),
    "modelopt_fp8": (),
    "modelopt_nvfp4": (),
    "modelopt_nvfp4_mlp_only": (),
}


def wrapped(work: Path, layers: int | None) -> Path:
    """The whole wrapper, or one cut to so many layers, made in `work`."""
    if layers is None:
        return demo_with_vision()
    made = work / f"wrapped_{layers}_layers"
    if not made.is_dir():
        wrap_vision(cut_layers(demo_model(), work / f"demo_{layers}_layers", layers), made)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    add_sizes(parser)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    methods = {name: METHODS[name] for name in asked.only}
    print_in_turn(wrapped(asked.work, asked.layers), methods, asked)


if __name__ == "__main__":
    main()
