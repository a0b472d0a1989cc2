"""The demo model and the same behind a vision tower through every method, side by side.

    python benchmarks/wrapped_methods.py WORKDIR [--only NAME …] [--samples 2] [--layers N]
                                                 [--table docs/towers.md]

Each method quantizes both with the same texts. What it makes is verified; the runtime measures both
on the same windows of held-out text, and shows the wrapped one pictures. The language model is the
same, and so should its layers be: "same layers" counts those whose tensors are equal, bit by bit.
What is measured stays in WORKDIR/NAME.json and is not measured again. --table puts the table of all
that is there into the page, between the lines `<!-- wrapped_methods.py -->`.
With --layers both are cut to N layers, which model no language.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from agreement import G64
from methods import quantize
from numpy.typing import NDArray

import quantkit
from quantkit.checkpoint.demo import demo_model
from quantkit.checkpoint.directory import open_checkpoint
from quantkit.checkpoint.wrap_vision import demo_with_vision, wrap_vision
from quantkit.formats.quantized import examine
from quantkit.formats.registry import detect
from quantkit.validation.ask import pictures
from quantkit.validation.ask.data import eval_text
from quantkit.validation.ask.picture_prompts import MOST, picture_prompts
from quantkit.validation.judge.pictures import picture_metrics
from quantkit.validation.preflight import longest_of, open_candidate, tokenizer_of
from quantkit.validation.reports.markdown import number, table
from quantkit.validation.subjects.base import Opening, Subject
from quantkit.validation.subjects.builtin import open_builtin, open_rounded
from tests.support.helpers import cut_layers

SMALL = ("calibration.samples=8", "calibration.sequence_length=256")
METHODS: dict[str, tuple[str, ...]] = {
    "rtn_w8a16": (),
    "rtn_w8a8_dynamic": (),
    "rtn_fp8_dynamic": (),
    "rtn_fp8_block": (),
    "rtn_mxfp8": (),
    "rtn_w4a16": (G64,),
    "rtn_nvfp4a16": (),
    "rtn_mxfp4a16": (),
    "llmcompressor_fp8_dynamic": (),
    "llmcompressor_w8a8": SMALL,
    "llmcompressor_w4a16": (*SMALL, G64),
    "llmcompressor_nvfp4": SMALL,
    "modelopt_fp8": SMALL,
    "modelopt_nvfp4": SMALL,
    "modelopt_nvfp4_mlp_only": SMALL,
    "autoround_w4a16": (*SMALL, G64, "options.iters=5"),
    "gptqmodel_w4a16": (*SMALL, G64),
}
BASELINE = "BF16"
MARK = "<!-- wrapped_methods.py -->\n"
IMAGES = ("image_kl_mean", "image_kl_of_rtn", "image_top1_agreement", "image_embedding_error")


class Measure:
    """The two models in 16 bit, and what quantized ones are held against."""

    def __init__(self, work: Path, samples: int, layers: int | None) -> None:
        self.work, self.plain, self.wrapped = work, demo_model(), Path()
        if layers is None:
            self.wrapped = demo_with_vision()
        else:
            if not (work / "plain").is_dir():
                wrap_vision(cut_layers(self.plain, work / "plain", layers), work / "wrapped")
            self.plain, self.wrapped = work / "plain", work / "wrapped"
        self.windows: NDArray[np.int64] = eval_text(
            None, tokenizer_of(self.plain), samples, None
        ).windows

    def baseline(self) -> dict[str, Any]:
        found = {}
        for name, path in (("plain", self.plain), ("wrapped", self.wrapped)):
            with closing(open_builtin(path, Opening("cpu"))) as subject:
                found[name] = self._perplexity(subject)
        return found

    def method(self, name: str) -> dict[str, Any]:
        """Both quantized, verified and measured; "refused": in the words of the plan."""
        outs = {kind: self.work / f"{name}-{kind}" for kind in ("plain", "wrapped")}
        found: dict[str, Any] = {}
        for kind, out in outs.items():
            source = getattr(self, kind)
            shutil.rmtree(out, ignore_errors=True)
            try:
                quantize(source, name, out, list(METHODS[name]))
            except RuntimeError as error:
                return {"refused": str(error).replace(str(source), "the model")}
            found[f"verified {kind}"] = quantkit.verify(out, source=source).ok
            with closing(open_builtin(out, Opening("cpu"))) as subject:
                found[kind] = self._perplexity(subject)
        found["same"], found["layers"] = same_layers(outs["plain"], outs["wrapped"])
        found["bytes"] = open_checkpoint(outs["wrapped"]).weight_bytes
        found["images"] = self._pictures(outs["wrapped"])
        for out in outs.values():
            shutil.rmtree(out)
        return found

    def _perplexity(self, subject: Subject) -> float:
        return math.exp(-subject.logprobs(self.windows).mean(dtype=np.float64))

    def _pictures(self, out: Path) -> dict[str, float | None]:
        candidate = open_candidate(out, str(self.wrapped))
        tokenizer = tokenizer_of(self.wrapped)
        shown = picture_prompts(candidate, "builtin", tokenizer, MOST, longest_of(candidate))
        shows = shown.prompts
        with closing(open_builtin(self.wrapped, Opening("cpu"))) as subject:
            theirs = pictures.measure_baseline(subject, shows, None)
        with closing(open_builtin(out, Opening("cpu"))) as subject:
            said = pictures.measure_quantized(subject, shows, theirs, None)
        with closing(open_rounded(self.wrapped, out, Opening("cpu"))) as subject:
            rounded = pictures.measure_quantized(subject, shows, theirs, None)
        metrics = picture_metrics(shown, pictures.PictureAnswers(said, said), rounded)
        return {name: metrics[name].value for name in IMAGES}


def same_layers(plain: Path, wrapped: Path) -> tuple[int, int]:
    """How many quantized layers of the plain checkpoint have the wrapped one's bytes, of how
    many."""
    one, other = open_checkpoint(plain), open_checkpoint(wrapped)
    layers = examine(one, detect(one)).declaration.layers
    same = 0
    for layer in layers:
        inside = layer.replace("model.", "model.text_model.", 1)
        names = [name for name in one.tensors if name.startswith(f"{layer}.")]
        same += all(
            (twin := name.replace(layer, inside, 1)) in other.tensors
            and one.digest(name) == other.digest(twin)
            for name in names
        )
    return same, len(layers)


def as_markdown(found: dict[str, dict[str, Any]]) -> str:
    """The table, methods by the perplexity of the wrapped model, and refusals below it."""
    base = found.pop(BASELINE)
    refused = {name: each["refused"] for name, each in found.items() if "refused" in each}
    done = {name: each for name, each in found.items() if name not in refused}
    head = ["method", "MB", "perplexity, plain", "perplexity, wrapped", "same layers", "verified",
            *(f"`{name}`" for name in IMAGES)]  # fmt: skip
    rows = [[BASELINE, "", f"{base['plain']:.3f}", f"{base['wrapped']:.3f}", "", *[""] * 5]]
    for name in sorted(done, key=lambda name: done[name]["wrapped"]):
        each = done[name]
        verified = each["verified plain"] and each["verified wrapped"]
        rows.append([
            f"`{name}`", f"{each['bytes'] / 1e6:.0f}", f"{each['plain']:.3f}",
            f"{each['wrapped']:.3f}", f"{each['same']} of {each['layers']}",
            "yes" if verified else "no", *(number(each["images"][of]) for of in IMAGES),
        ])  # fmt: skip
    lines = [*table(head, rows), ""]
    lines += [f"`{name}` is refused: {why}" for name, why in refused.items()]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--table", type=Path)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    kept = {name: asked.work / f"{name}.json" for name in (BASELINE, *METHODS)}
    wanted = [name for name in (BASELINE, *asked.only) if not kept[name].is_file()]
    if wanted:
        measure = Measure(asked.work, asked.samples, asked.layers)
        for name in wanted:
            each = measure.baseline() if name == BASELINE else measure.method(name)
            kept[name].write_text(json.dumps(each))
            print(f"{name}: {each}", file=sys.stderr, flush=True)
    found = {name: json.loads(file.read_text()) for name, file in kept.items() if file.is_file()}
    text = as_markdown(found)
    if asked.table is None:
        print(text)
        return
    page = asked.table.read_text(encoding="utf-8")
    whole = re.compile(f"{MARK}.*?{MARK}", re.DOTALL)
    asked.table.write_text(
        whole.sub(lambda _: f"{MARK}\n{text}\n{MARK}", page, count=1), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
