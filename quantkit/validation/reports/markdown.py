"""The report as Markdown: for a pull request, a job summary, a model card."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf
from typing import Any

from quantkit.recipe.gates import outcome

WORST_LAYERS = 5
WORST_PICTURES = 5
PICTURE_HEAD = ["question", "answer", "KL, nats", "same token first"]


def as_markdown(document: Mapping[str, Any]) -> str:
    """A summary that is read in a minute."""
    checkpoint, engine, text = document["checkpoint"], document["engine"], document["text"]
    verdict = outcome(document["ok"], document["undecided"])
    verdict = verdict if document["ok"] else f"**{verdict}**"
    lines = [
        f"# {checkpoint['name']}: {verdict}",
        "",
        f"Against {document['baseline']['name']} in {engine['name']} {engine['version']} on "
        f"{engine['device']}; {text['windows']} windows of {text['length']} tokens of "
        f"{text['name']}. Kernels: {kernels(engine)}.",
        "",
        *table(["gate", "limit", "measured", "95 % interval", "verdict"],
               [gate_row(gate) for gate in document["gates"]]),
    ]  # fmt: skip
    if engine["weights_only"]:
        lines += ["", "**Weights only**: activations were computed in 16 bit."]
    if document["regression"] is not None:
        rows = [
            (c["metric"], number(c["old"]), number(c["new"]), c["verdict"])
            for c in document["regression"]
        ]
        lines += ["", "## Since the earlier report", ""]
        lines += table(["metric", "before", "now", "verdict"], rows)
    lines += ["", "## Measured", "", *table(["", "baseline", "quantized"], measured(document))]
    if document.get("online"):
        said = document["online"]["sentence"]
        lines += ["", f"## Against {document['online']['title']}", ""]
        lines += table(["", "baseline", "quantized", "online"], beside_online(document))
        lines += ["", f"{said[0].upper()}{said[1:]}."]
    routing = lowest_routing(document)
    if routing:
        lines += ["", f"## The {len(routing)} layers with the lowest routing agreement", ""]
        lines += table(["decoder layer", "share of tokens with the baseline's experts"], routing)
    shown = worst_pictures(document)
    if shown:
        lines += ["", f"## The {len(shown)} pictures with the largest KL", ""]
        lines += table(PICTURE_HEAD, shown)
    layers = sorted(document["layers"], key=lambda layer: layer["sqnr_db"])
    if layers:
        lines += ["", f"## The {WORST_LAYERS} layers with the lowest weight SQNR", ""]
        lines += table(["layer", "scheme", "dB", "floor"], [
            (f"`{layer['module']}`", layer["scheme"], f"{layer['sqnr_db']:.1f}",
             f"{layer['floor_db']:.1f}") for layer in layers[:WORST_LAYERS]
        ])  # fmt: skip
    lines += ["", *(f"- **Warning**: {text}" for text in document["warnings"])]
    lines += [f"- {note}" for note in document["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def lowest_routing(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The worst layers of a mixture of experts and their routing agreement; none of other models,
    nor in the reports of earlier versions."""
    rows = sorted(document.get("routing", ()), key=lambda row: row["agreement"])
    return [(str(row["layer"]), f"{row['agreement']:.1%}") for row in rows[:WORST_LAYERS]]


def worst_pictures(document: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The pictures whose words lose most: what was asked and answered, KL and top-1 agreement of
    the words; none of models without a vision tower, nor in the reports of earlier versions."""
    images = document.get("images")
    if not images:
        return []
    columns = ("kl", "agreement", "questions", "answers")
    rows = sorted(
        zip(*(images[name] for name in columns), strict=True),
        key=lambda row: inf if row[0] is None else row[0],  # no number: worse than any
        reverse=True,
    )
    return [
        (question, answer, number(kl), f"{agreement:.1%}")
        for kl, agreement, question, answer in rows[:WORST_PICTURES]
    ]


def measured(document: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What, of the baseline, of the quantized model."""
    both = document["values"]
    sizes = [document[part]["weight_bytes"] / 1e6 for part in ("baseline", "checkpoint")]
    yield "weights", f"{sizes[0]:.0f} MB", f"{sizes[1]:.0f} MB"
    perplexity, facts, tasks = both["perplexity"], both["mcq_accuracy"], both["tasks"]
    yield "perplexity", number(perplexity["baseline"]), number(perplexity["quantized"])
    yield "four-choice facts", f"{facts['baseline']:.1%}", f"{facts['quantized']:.1%}"
    worked = both.get("exercises", {"baseline": {}, "quantized": {}})
    for kind, share in worked["baseline"].items():
        yield f"exercises, {kind}", f"{share:.0%}", f"{worked['quantized'][kind]:.0%}"
    for task, values in tasks["baseline"].items():
        for metric, value in values.items():
            yield f"{task} {metric}", number(value), number(tasks["quantized"][task][metric])
    theirs, ours = document["throughput"]["baseline"], document["throughput"]["quantized"]
    if theirs is not None and ours is not None:
        yield from _speed(theirs, ours)


def beside_online(document: Mapping[str, Any]) -> list[list[str]]:
    """What, of the baseline, of the quantized model, and of the baseline quantized online."""
    online, both = document["online"], document["values"]
    perplexity = (*both["perplexity"].values(), online["perplexity"])
    facts = (*both["mcq_accuracy"].values(), online["mcq_accuracy"])
    rows = [
        ["perplexity", *map(number, perplexity)],
        ["four-choice facts", *(f"{share:.1%}" for share in facts)],
    ]
    for name in ("kl_mean", "kl_p99", "top1_agreement"):
        values = (side["metrics"][name]["value"] for side in (document, online))
        rows.append([name, "–", *map(number, values)])
    return rows


def _speed(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    yield "load", f"{theirs['load_seconds']:.1f} s", f"{ours['load_seconds']:.1f} s"
    held = [side["memory_bytes"] / 1e6 for side in (theirs, ours)]
    yield "memory of the weights", f"{held[0]:.0f} MB", f"{held[1]:.0f} MB"
    for rows in zip(theirs["rows"], ours["rows"], strict=True):
        batch = f"batch {rows[0]['batch']}"
        for what in ("prefill", "decode"):
            one, other = (f"{row[f'{what}_tokens_s']['median']:.0f} tokens/s" for row in rows)
            yield f"{what}, {batch}", one, other
        one, other = (f"{row['first_token_s']['median'] * 1e3:.0f} ms" for row in rows)
        yield f"first token, {batch}", one, other


def gate_row(gate: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    """A gate as a row of a table."""
    low_high = gate["interval"]
    interval = f"{number(low_high[0])} … {number(low_high[1])}" if low_high else ""
    why = f" ({gate['reason']})" if gate["reason"] else ""
    return gate["metric"], gate["limit"], number(gate["value"]), interval, gate["verdict"] + why


def gate_text(gate: Mapping[str, Any]) -> str:
    """A gate as a sentence."""
    _, limit, value, interval, verdict = gate_row(gate)
    within = f" ({interval})" if interval else ""
    return f"{gate['metric']} is {value}{within}, limit {limit}: {verdict}"


def kernels(engine: Mapping[str, Any]) -> str:
    """The kernels with their counts of modules."""
    found = engine["kernels"]
    return ", ".join(f"{name} × {count}" for name, count in found.items()) or "the engine's own"


def number(value: float | None) -> str:
    """Four digits; a dash for what there is not."""
    return "–" if value is None else f"{value:.4g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows),
    ]
