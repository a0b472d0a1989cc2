"""The checks of a checkpoint whose writer measured it while writing: no tensor is read again."""

from __future__ import annotations

from collections import Counter

from quantkit.errors import command
from quantkit.formats.quantized import QuantizedCheckpoint
from quantkit.verification.findings import LayerFidelity, VerifyReport, Written, bounded_db, error
from quantkit.verification.weights.judge import floor_db
from quantkit.verification.weights.kept import settle_altered
from quantkit.verification.weights.ledger import make_ledger
from quantkit.verification.weights.source import SourceModel


def check_written(
    report: VerifyReport, subject: QuantizedCheckpoint, source: SourceModel, written: Written
) -> None:
    """The ledger by digests, and every layer's SQNR against its floor."""
    ledger = make_ledger(subject, source, written.same)
    report.findings += [*ledger.findings, *settle_altered(ledger, [], {})]
    report.ledger = Counter(ledger.states.values())
    again = command("verify", subject.checkpoint.path, "--source", source.checkpoint.path)
    for module, spec in subject.declaration.layers.items():
        sqnr = bounded_db(written.sqnr_db[module])
        floor = floor_db(spec.scheme)
        report.layers.append(LayerFidelity(module, spec.scheme.name, round(sqnr, 2), floor))
        if not sqnr >= floor:
            report.findings.append(
                error(
                    "sqnr.below_floor",
                    f"{module}: weight SQNR {sqnr:.1f} dB against the source, under the floor of "
                    f"{floor:.1f} dB of {spec.scheme.name}",
                    f"look at its weights: {again}",
                    module,
                )
            )
    report.layers.sort(key=lambda layer: layer.sqnr_db)
