"""The checks of a checkpoint whose writer measured it while writing: no tensor is read again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from quantkit.checkpoint import TensorInfo
from quantkit.verify.findings import LayerFidelity, VerifyReport, error
from quantkit.verify.judge import floor_db
from quantkit.verify.kept import settle_altered
from quantkit.verify.ledger import Ledger, make_ledger
from quantkit.verify.source import Source
from quantkit.verify.subject import Subject


@dataclass(frozen=True)
class Written:
    """What the writer's own pass measured.

    digests, source_digests: by tensor, as `Checkpoint.digest`. sqnr_db: by layer of the source.
    """

    digests: Mapping[str, str]
    source_digests: Mapping[str, str]
    sqnr_db: Mapping[str, float]

    def same(self, ours: TensorInfo, theirs: TensorInfo) -> bool:
        """Whether a kept tensor has the source's dtype, shape and bytes."""
        return self.digests[ours.name] == self.source_digests[theirs.name]


def check_written(report: VerifyReport, subject: Subject, source: Source, written: Written) -> None:
    """The ledger by digests, and every layer's SQNR against its floor."""
    ledger = make_ledger(subject, source, written.same)
    report.findings += [*ledger.findings, *settle_altered(ledger, [], {})]
    report.ledger = Counter(ledger.states.values())
    for module, spec in subject.declaration.layers.items():
        sqnr = written.sqnr_db[_source_layer(ledger, module)]
        floor = floor_db(spec.scheme)
        report.layers.append(LayerFidelity(module, spec.scheme.name, round(sqnr, 2), floor))
        if not sqnr >= floor:
            report.findings.append(
                error(
                    "sqnr.below_floor",
                    f"{module}: weight SQNR {sqnr:.1f} dB against the source, under the floor of "
                    f"{floor:.1f} dB of {spec.scheme.name}",
                    "look at its weights: quantkit verify DIR --source MODEL",
                    module,
                )
            )
    report.layers.sort(key=lambda layer: layer.sqnr_db)


def _source_layer(ledger: Ledger, module: str) -> str:
    parts = ledger.parts[module, None]
    return parts[0].info.name.removesuffix(".weight")
