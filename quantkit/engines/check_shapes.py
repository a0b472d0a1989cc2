"""What must divide what: shards of tensor parallelism, groups, blocks and kernel tiles.

Sources: `divide` in both engines' layers/linear.py, `validate_fp8_block_shape` and
`validate_fp8_block_shape_moe` of their fp8_utils, Marlin's `verify_marlin_supports_shape`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import gcd
from typing import Any

from quantkit.checkpoint.network.config import text_size
from quantkit.checkpoint.schemes import BITS
from quantkit.engines.loadable import LayerPart, Loadable
from quantkit.engines.names import EngineLayer
from quantkit.engines.reasons import Reason
from quantkit.engines.rules import EngineFamily, EngineRules, SchemeRule

_DOWN = ("down_proj", "w2", "output_linear")
TILES = ((64, 128), (128, 64))
KEEP = "keep this layer in 16 bit"
SMALLER_CUT = f"a smaller tensor-parallel size, or {KEEP}"


def check_heads(engine: EngineRules, config: Mapping[str, Any], tp: int) -> Iterator[Reason]:
    """Reasons of code `engine.tp_heads`: attention heads that tensor parallelism cannot share out.

    Key/value heads are replicated where there are fewer of them than ranks.
    """
    heads = text_size(config, "num_attention_heads")
    shared = text_size(config, "num_key_value_heads") or heads
    latent = bool(text_size(config, "kv_lora_rank"))
    wrong = []
    if heads and heads % tp:
        wrong.append(f"{heads} attention heads")
    if shared and not latent and shared % tp and tp % shared:
        wrong.append(f"{shared} key/value heads")
    for key in ("linear_num_key_heads", "linear_num_value_heads"):
        count = text_size(config, key)
        if count and count % tp:
            wrong.append(f"{count} linear-attention heads")
    if wrong:
        common = gcd(heads, shared) if shared and not latent else heads
        fits = [str(n) for n in (1, 2, 4, 8, 16) if common % n == 0]
        yield Reason(
            "engine.tp_heads",
            f"{engine.name} cannot share {' and '.join(wrong)} among {tp} ranks",
            f"tensor-parallel size {' or '.join(fits)}",
        )


def check_shapes(
    engine: EngineRules,
    family: EngineFamily,
    candidate: Loadable,
    layers: Sequence[EngineLayer],
    tp: int,
    *,
    spread: bool = False,
) -> Iterator[Reason]:
    """Reasons of codes `engine.tp_split`, `engine.tp_group`, `engine.block_shape`, `engine.tile`
    and `engine.multiple_of`, a layer each; `spread`: with whole experts a rank."""
    for layer in layers:
        cut = 1 if spread and layer.experts else tp
        yield from _check_split(engine, layer, cut)
        shard = _shard(engine, family, candidate, layer, cut)
        if shard is not None:
            yield from shard.reasons()


def group_fits(
    engine: EngineRules,
    family: EngineFamily,
    candidate: Loadable,
    layers: Sequence[EngineLayer],
    tp: int,
    size: int,
) -> bool:
    """Whether groups of `size` have a kernel and divide every quantized layer's shards."""
    for layer in layers:
        shard = _shard(engine, family, candidate, layer, tp)
        if shard is not None and shard.scheme.weight.group_size is not None:
            able = not shard.rule.groups or size in shard.rule.groups
            if not able or any(length % size for length in shard.inputs):
                return False
    return True


def _shard(
    engine: EngineRules, family: EngineFamily, candidate: Loadable, layer: EngineLayer, tp: int
) -> _Shard | None:
    """One rank's part of a layer; None where it is not quantized, has no rule or cannot be cut."""
    part, rules = layer.parts[0], engine.formats.get(candidate.layout)
    if part.scheme is None or rules is None or any(_check_split(engine, layer, tp)):
        return None
    rule = rules.schemes.get(part.rule_name(candidate.layout))
    return None if rule is None else _Shard(family, candidate, layer, rule, tp)


def _check_split(engine: EngineRules, layer: EngineLayer, tp: int) -> Iterator[Reason]:
    if layer.split == "whole" or layer.head or tp == 1:
        return
    for part in layer.parts[:3] if layer.experts else layer.parts:
        inner = layer.experts and part.name.rpartition(".")[2] in _DOWN
        by_rows = layer.split == "rows" or inner
        size = part.columns if by_rows else part.rows
        if part.rows < tp or _is_shared_kv(layer, part):
            continue
        if size % tp:
            side = "input" if by_rows else "output"
            yield Reason(
                "engine.tp_split",
                f"{engine.name} cannot cut the {side} dimension {size} of {part.name} into {tp}",
                f"a tensor-parallel size that divides {size}",
                layer.name,
            )
            return


def _is_shared_kv(layer: EngineLayer, part: LayerPart) -> bool:
    """Key and value heads may be fewer than ranks; `check_heads` judges them."""
    return layer.leaf == "qkv_proj" and part is not layer.parts[0]


class _Shard:
    """One rank's part of a quantized layer: input × output parts."""

    def __init__(
        self,
        family: EngineFamily,
        candidate: Loadable,
        layer: EngineLayer,
        rule: SchemeRule,
        tp: int,
    ) -> None:
        self.layer, self.rule, self.tp = layer, rule, tp
        part = layer.parts[0]
        assert part.scheme is not None
        self.scheme, self.packing = part.scheme, part.packing
        if layer.experts:
            self.hidden, self.inner = _expert_sizes(layer)
            self.inner //= tp
            self.inputs, self.outputs = [self.hidden, self.inner], [self.inner, self.inner]
            return
        outputs = _outputs(layer, family, candidate.config)
        rows, columns = layer.split == "rows", layer.split == "columns" and not layer.head
        self.inputs = [part.columns // tp if rows else part.columns]
        self.outputs = [max(size // tp, 1) for size in outputs] if columns else outputs
        if columns and layer.leaf == "qkv_proj":
            self.outputs = [outputs[0] // tp, *(_replicated(n, candidate, tp) for n in outputs[1:])]

    def reasons(self) -> Iterator[Reason]:
        yield from self._groups()
        yield from self._blocks()
        yield from self._packs()
        yield from self._tiles()

    def _reason(self, code: str, what: str, fix: str) -> Reason:
        return Reason(code, f"{self.layer.name}: {what}", fix, self.layer.name)

    def _groups(self) -> Iterator[Reason]:
        size = self.scheme.weight.group_size
        if size is None:
            return
        for length in self.inputs:
            if length % size:
                yield self._reason(
                    "engine.tp_group",
                    f"group size {size} does not divide its input of {length}",
                    SMALLER_CUT if self.tp > 1 else KEEP,
                )
                return

    def _blocks(self) -> Iterator[Reason]:
        block = self.scheme.weight.block
        if block is None or self.rule.block is None:
            return
        high, wide = block
        split = self.tp > 1 and self.layer.split == "columns" and not self.layer.head
        if self.layer.experts:
            if self.inner % high or (self.tp > 1 and self.inner % wide):
                yield self._misfit(f"its experts' inner size {self.inner}", block)
            return
        rows = self.tp > 1 and self.layer.split == "rows"
        if (rows or self.rule.block == "input") and self.inputs[0] % wide:
            yield self._misfit(f"its input of {self.inputs[0]}", block)
            return
        merged = len(self.outputs) > 1
        checked = self.outputs if split else self.outputs[:-1] if merged else []
        wrong = [size for size in checked if size % high]
        if wrong:
            yield self._misfit(f"the part of {wrong[0]} outputs in {self.outputs}", block)

    def _misfit(self, what: str, block: tuple[int, int]) -> Reason:
        return self._reason(
            "engine.block_shape",
            f"{what} is no multiple of the block {block[0]} × {block[1]}",
            "a scheme without blocks (fp8_dynamic), or "
            + ("a smaller tensor-parallel size" if self.tp > 1 else "keep this layer in 16 bit"),
        )

    def _packs(self) -> Iterator[Reason]:
        needed = self.rule.multiple_of
        if self.scheme.weight.scale == "e4m3":
            needed = 16
        words = self.packing in ("gptq", "gptq_v2", "gemm", "pack-quantized")
        per_word = 32 // BITS[self.scheme.weight.element] if words else 1
        for length in self.inputs:
            if length % needed:
                yield self._reason(
                    "engine.multiple_of",
                    f"its input of {length} is no multiple of {needed}",
                    SMALLER_CUT,
                )
        across = self.outputs if self.packing in ("gemm", "gptq", "gptq_v2") else self.inputs
        if words and any(length % per_word for length in across):
            yield self._reason(
                "engine.multiple_of",
                f"{across} is no multiple of {per_word}, the codes in a packed word",
                SMALLER_CUT,
            )

    def _tiles(self) -> Iterator[Reason]:
        if self.layer.experts or self.rule.tiles not in (True, self.packing.removesuffix("_v2")):
            return
        outputs, length = sum(self.outputs), self.inputs[0]
        if not any(outputs % high == 0 and length % wide == 0 for high, wide in TILES):
            yield self._reason(
                "engine.tile",
                f"its shard of {outputs} × {length} (output × input) fits no Marlin tile "
                "(64 × 128 or 128 × 64)",
                "keep this layer in 16 bit, or serve it with vLLM, which pads"
                if self.tp == 1
                else "a smaller tensor-parallel size",
            )


def _outputs(layer: EngineLayer, family: EngineFamily, config: Mapping[str, Any]) -> list[int]:
    """The stacked output sizes of a layer, also of one that is stored merged."""
    if len(layer.parts) > 1:
        return [part.rows for part in layer.parts]
    rows = layer.parts[0].rows
    kind = family.stored.get(layer.leaf)
    heads = text_size(config, "num_attention_heads")
    shared = text_size(config, "num_key_value_heads") or heads
    if kind == "qkv" and heads and rows % (heads + 2 * shared) == 0:
        head = rows // (heads + 2 * shared)
        return [heads * head, shared * head, shared * head]
    return [rows // 2, rows // 2] if kind == "pair" and rows % 2 == 0 else [rows]


def _replicated(rows: int, candidate: Loadable, tp: int) -> int:
    shared = text_size(candidate.config, "num_key_value_heads")
    return rows // min(tp, shared) if shared else rows // tp


def _expert_sizes(layer: EngineLayer) -> tuple[int, int]:
    """Hidden and inner size of a block of experts."""
    for part in layer.parts:
        leaf = part.name.rpartition(".")[2]
        if leaf in _DOWN:
            return part.rows, part.columns
        if leaf in ("gate_proj", "up_proj", "w1", "w3"):
            return part.columns, part.rows
        if leaf in ("gate_up_proj", "input_linear", "fc1"):
            return part.columns, part.rows // 2
    part = layer.parts[0]
    return part.columns, part.rows
