"""All quantized layers, one at a time on two threads: values, and likeness to the source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from quantkit.checkpoint.progress import Progress
from quantkit.checkpoint.tensors import read_tensor
from quantkit.formats import inventory
from quantkit.formats.base import QuantWeight
from quantkit.formats.quantized import QuantizedCheckpoint
from quantkit.verification.configuration.claims import check_claims
from quantkit.verification.findings import Finding, LayerFidelity, error
from quantkit.verification.weights.compare import Sums, compare, nearest_other, plain
from quantkit.verification.weights.folds import head_dim, row_pairs, to_columns
from quantkit.verification.weights.judge import MOST_SHIFT, faults, floor_db, garbled, overall_gain
from quantkit.verification.weights.ledger import Ledger
from quantkit.verification.weights.source import SourceModel
from quantkit.verification.weights.values import check_tensors, check_weight

if TYPE_CHECKING:
    import torch

THREADS = 2


@dataclass
class LayerCheck:
    """What one layer was found to be.

    `sqnr_db` is None without a source or where values are too broken to compare; `faults` are the
    findings of the comparison, `findings` all others. `gain` is the scale of each row where a fold
    scaled the rows.
    """

    module: str
    findings: list[Finding] = field(default_factory=list)
    faults: list[Finding] = field(default_factory=list)
    sqnr_db: float | None = None
    gain: torch.Tensor | None = None

    @property
    def ok(self) -> bool:
        return not self.findings and not self.faults


@dataclass(frozen=True)
class Weights:
    """The layers of a checkpoint beside those of its source.

    `columns` are the column factors that folded norms imply, by module.
    """

    subject: QuantizedCheckpoint
    source: SourceModel | None
    ledger: Ledger
    columns: Mapping[str, torch.Tensor]

    def check(self, module: str, *, keep_gain: bool = False) -> LayerCheck:
        """Read one layer and check it against itself and the source."""
        result = LayerCheck(module)
        spec = self.subject.declaration.layers.get(module)
        roles = self.subject.expected.get(module, {})
        tensors = self._tensors(module)
        result.findings += check_tensors(module, tensors, roles)
        if result.findings:
            return result
        for expert in range(spec.experts) if spec and spec.experts else (None,):
            weight = self._weight(module, tensors, expert)
            source = self._source(module, expert)
            shape = tuple(weight.q.shape)
            if source is not None and tuple(source.shape) != shape:
                result.findings.append(_wrong_shape(module, shape, tuple(source.shape)))
                return result
            if spec is not None:
                result.findings += check_weight(module, weight, spec, source)
                result.findings += check_claims(self.subject, module, weight, spec)
            if source is not None and not result.findings:
                sums = self._judge(result, weight, source, expert)
                if keep_gain:
                    result.gain = sums.row_gain()
        return result

    def compare(
        self,
        module: str,
        weight: QuantWeight,
        source: torch.Tensor,
        *,
        rows: torch.Tensor | None = None,
        columns: torch.Tensor | None = None,
        unclipped: bool = False,
    ) -> Sums:
        """The sums of a layer against its source, scaled by `rows`, and by `columns` or else as
        the layer's norm says; `unclipped` as in `fidelity.compare`."""
        if columns is None:
            columns = self.columns.get(module)
        return compare(weight, source, rows=rows, columns=columns, unclipped=unclipped)

    def check_pair(
        self, first: str, second: str, gain: torch.Tensor
    ) -> tuple[LayerCheck, LayerCheck] | None:
        """Both layers again, as if `gain` had been folded from rows of one to columns of the other.

        None when the fold does not explain both.
        """
        import torch

        one, other = LayerCheck(first), LayerCheck(second)
        weights = [self._weight(name, self._tensors(name), None) for name in (first, second)]
        sources = [self._source(name, None) for name in (first, second)]
        if sources[0] is None or sources[1] is None or not bool((gain > 0).all()):
            return None
        width = head_dim(self.subject.checkpoint.config)
        columns = to_columns(gain, sources[1].shape[1], width)
        if columns is None:
            return None
        folded = self.columns.get(second, torch.ones(())) * columns
        self._judge(one, weights[0], sources[0], None, rows=gain)
        self._judge(other, weights[1], sources[1], None, columns=folded)
        one.gain = gain
        return (one, other) if one.ok and other.ok else None

    def holds_instead(self, module: str) -> str | None:
        """Which sibling's weights a layer holds, when it is one of the same shape."""
        spec = self.subject.declaration.layers.get(module)
        if spec is None or spec.experts or self.source is None:
            return None
        weight = self._weight(module, self._tensors(module), None)
        parent = module.rpartition(".")[0]
        for other, theirs in self.subject.declaration.layers.items():
            related = other != module and other.rpartition(".")[0] == parent
            if not related or theirs.shape != spec.shape:
                continue
            source = self._source(other, None)
            if source is None or tuple(source.shape) != spec.shape:
                continue
            sums = self.compare(module, weight, source)
            if sums.sqnr_db >= floor_db(spec.scheme):
                return other
        return None

    def _tensors(self, module: str) -> dict[str, torch.Tensor]:
        parts = self.subject.parts[module]
        roles = self.subject.expected.get(module, {"weight": None})
        return {suffix: read_tensor(parts[suffix]) for suffix in roles if suffix in parts}

    def _weight(
        self, module: str, tensors: Mapping[str, torch.Tensor], expert: int | None
    ) -> QuantWeight:
        spec = self.subject.declaration.layers.get(module)
        if spec is None:
            return plain(tensors["weight"])
        if expert is not None:
            tensors = inventory.expert(tensors, spec, expert)
        return self.subject.layout.read(tensors, spec)

    def _source(self, module: str, expert: int | None) -> torch.Tensor | None:
        if self.source is None:
            return None
        parts = self.ledger.parts.get((module, expert))
        if parts is None:
            parts = self.source.parts(module, expert)
        return self.source.weight(parts) if parts else None

    def _judge(
        self,
        result: LayerCheck,
        weight: QuantWeight,
        source: torch.Tensor,
        expert: int | None,
        *,
        rows: torch.Tensor | None = None,
        columns: torch.Tensor | None = None,
    ) -> Sums:
        """Compare with the source and add what that says; of several experts the worst counts."""
        against = partial(self.compare, result.module, weight, source, rows=rows, columns=columns)
        sums = against()
        spec = self.subject.declaration.layers.get(result.module)
        scheme = spec.scheme if spec else None
        sqnr = sums.sqnr_db
        name = result.module if expert is None else f"{result.module}[{expert}]"
        if result.sqnr_db is None or sqnr < result.sqnr_db:
            result.sqnr_db = sqnr
        if not sqnr >= floor_db(scheme):
            gain = overall_gain(sums)
            why = f"; its weights are {gain:.2f} × the source's" if gain else ""
            result.faults.append(
                error(
                    "sqnr.below_floor",
                    f"{name}: weight SQNR {sqnr:.1f} dB against the source, under the floor of "
                    f"{floor_db(scheme):.1f} dB of {scheme.name if scheme else '16 bit'}{why}",
                    "quantize the layer again; its scale, order or codes are damaged",
                    result.module,
                )
            )
            return sums
        if scheme is not None and abs(sums.shift) > MOST_SHIFT:
            result.faults.append(
                error(
                    "zero_point.shifted",
                    f"{name}: its weights lie {sums.shift:+.2f} quantization steps from the "
                    "source's on average; its zero points are off, or their convention is "
                    "another than declared (gptq stores them less one, gptq_v2 does not)",
                    "declare the checkpoint_format that wrote it, or quantize the layer again",
                    result.module,
                )
            )
            return sums
        result.faults += [
            error(
                "scale.wrong",
                f"{name}: {text}",
                "quantize the layer again; some of its scales, or their order, are damaged",
                result.module,
            )
            for text in faults(sums, scheme, partial(against, unclipped=True))
        ]
        scaled = self.columns.get(result.module) if columns is None else columns
        others = partial(nearest_other, weight, source, columns=scaled)
        if not result.faults and (text := garbled(sums, scheme, source.shape[1], others)):
            result.faults.append(
                error(
                    "codes.damaged",
                    f"{name}: {text}",
                    "quantize the layer again; part of its codes is lost or in another order",
                    result.module,
                )
            )
        return sums


def check_weights(
    weights: Weights,
    modules: list[str],
    *,
    row_folds: bool,
    progress: Progress | None,
) -> dict[str, LayerCheck]:
    """Check every module; with `row_folds`, explain pairs of faults by a fold where one fits."""
    pairs = row_pairs(modules) if row_folds and weights.source is not None else []
    firsts = {first for first, _ in pairs}
    results: dict[str, LayerCheck] = {}
    with _one_thread_each(), ThreadPoolExecutor(THREADS) as pool:
        checks = pool.map(lambda name: weights.check(name, keep_gain=name in firsts), modules)
        for done, result in enumerate(checks, 1):
            results[result.module] = result
            if progress:
                progress(done, len(modules))
        for first, second in pairs:
            one, other = results[first], results[second]
            gain, one.gain = one.gain, None
            if gain is None or not (one.faults or other.faults) or other.findings:
                continue
            explained = weights.check_pair(first, second, gain)
            if explained is not None:
                results[first], results[second] = explained
        for result in results.values():
            _name_swapped(weights, result)
    return results


def fidelities(weights: Weights, results: Mapping[str, LayerCheck]) -> list[LayerFidelity]:
    """The measured layers, the worst first."""
    layers = [
        LayerFidelity(r.module, spec.scheme.name, round(r.sqnr_db, 2), floor_db(spec.scheme))
        for r in results.values()
        if (spec := weights.subject.declaration.layers.get(r.module)) and r.sqnr_db is not None
    ]
    return sorted(layers, key=lambda layer: layer.sqnr_db)


def _name_swapped(weights: Weights, result: LayerCheck) -> None:
    for index, finding in enumerate(result.faults):
        if finding.code == "sqnr.below_floor" and (other := weights.holds_instead(result.module)):
            result.faults[index] = error(
                finding.code,
                f"{finding.message}; it holds the weights of {other}",
                "export the checkpoint again; two layers were swapped",
                finding.where,
            )


def _wrong_shape(module: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> Finding:
    return error(
        "ledger.wrong_shape",
        f"{module} is {list(ours)}, in the source {list(theirs)}",
        "name the source that this checkpoint was made from, or export it again",
        module,
    )


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let the pool's threads share the cores instead of splitting every small operation."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
