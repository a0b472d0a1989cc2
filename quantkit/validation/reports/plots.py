"""The pictures of a report: matplotlib figures, as SVG text for a page or as files.

Figures are built without pyplot, which keeps global state and may look for a display.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.network.modules import layer_index

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Document = Mapping[str, Any]

BASE, OURS, BAD = "#8a94a6", "#2563eb", "#dc2626"
COLORS = ("#2563eb", "#16a34a", "#d97706", "#7c3aed", "#0891b2", "#db2777", "#65a30d", "#475569")


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element: text as paths, no date, no reference to anything."""
    import matplotlib as mpl

    buffer = StringIO()
    with mpl.rc_context({"svg.hashsalt": "quantkit"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text[text.index("<svg") :]


def layers_figure(document: Document) -> Figure | None:
    """Weight SQNR of every layer over its depth, with the floor; None without measured layers."""
    layers = document["layers"]
    if not layers:
        return None
    figure, axes = new_figure(9, 3.6)
    kinds = sorted({_kind(layer["module"]) for layer in layers})
    for number, kind in enumerate(kinds):
        rows = [layer for layer in layers if _kind(layer["module"]) == kind]
        axes.scatter(
            [layer_index(layer["module"]) or 0 for layer in rows],
            [layer["sqnr_db"] for layer in rows],
            s=22,
            color=COLORS[number % len(COLORS)],
            label=kind,
        )
    broken = [layer for layer in layers if layer["sqnr_db"] < layer["floor_db"]]
    axes.scatter(
        [layer_index(layer["module"]) or 0 for layer in broken],
        [layer["sqnr_db"] for layer in broken],
        s=110,
        facecolors="none",
        edgecolors=BAD,
        linewidths=1.6,
    )
    for floor in sorted({layer["floor_db"] for layer in layers}):
        axes.axhline(floor, color=BAD, linestyle="--", linewidth=1)
        axes.annotate(
            f"floor {floor:g} dB", (1, floor), xycoords=("axes fraction", "data"),
            xytext=(-4, 3), textcoords="offset points", ha="right", color=BAD, fontsize=8,
        )  # fmt: skip
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("weight SQNR, dB")
    axes.legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8, handletextpad=0.2
    )
    return figure


def experts_figure(document: Document) -> Figure | None:
    """Calibration tokens that each expert was routed, layers × experts, those below the floor
    crossed; None for a model without experts or a method without calibration."""
    coverage = document["checkpoint"].get("experts")
    if not coverage:
        return None
    seen = coverage["seen"]
    routed = dict(sorted(coverage["routed"].items(), key=lambda item: layer_index(item[0]) or 0))
    widest = max(map(len, routed.values()))
    columns = [[*counts, *[float("nan")] * (widest - len(counts))] for counts in routed.values()]
    figure, axes = new_figure(9, min(9.0, 1.6 + 0.2 * widest))
    axes.grid(visible=False)
    grid = list(zip(*columns, strict=True))
    picture = axes.imshow(grid, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
    under = [
        (column, index)
        for column, block in enumerate(routed)
        for index, count in enumerate(seen[block])
        if count < coverage["floor"]
    ]
    if under:
        axes.scatter(*zip(*under, strict=True), marker="x", color=BAD, s=20)
    step = len(routed) // 16 + 1
    layers = [layer_index(block) for block in routed]
    axes.set_xticks(range(0, len(layers), step), layers[::step])
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("expert")
    figure.colorbar(picture, ax=axes, label="tokens routed")
    return figure


def kl_figure(document: Document) -> Figure | None:
    """How the KL of single tokens is distributed; None where it was not measured."""
    histogram = document["kl_histogram"]
    if histogram is None:
        return None
    figure, axes = new_figure(4.6, 3.2)
    edges, counts = histogram["edges"], histogram["counts"]
    total = sum(counts) or 1
    widths = [b - a for a, b in pairwise(edges)]
    axes.bar(edges[:-1], [c / total for c in counts], widths, align="edge", color=OURS)
    mean = document["metrics"]["kl_mean"]["value"]
    if mean:
        axes.axvline(mean, color=BAD, linewidth=1.2)
        axes.annotate(
            f"mean {mean:.3g}", (mean, 1), xycoords=("data", "axes fraction"),
            xytext=(4, -12), textcoords="offset points", color=BAD, fontsize=8,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("KL(baseline‖quantized) of a token, nats")
    axes.set_ylabel("share of tokens")
    return figure


def routing_figure(document: Document) -> Figure | None:
    """Share of tokens with the baseline's experts, layer by layer; None of other models."""
    rows = document.get("routing")
    if not rows:
        return None
    figure, axes = new_figure(9, 2.6)
    shares = [row["agreement"] for row in rows]
    axes.bar([row["layer"] for row in rows], shares, 0.8, color=OURS)
    for gate in document["gates"]:
        if gate["metric"] == "routing_agreement":
            limit = float(gate["limit"].removeprefix(">="))
            axes.axhline(limit, color=BAD, linestyle="--", linewidth=1)
    axes.set_ylim(0, 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("tokens with the same experts")
    return figure


def throughput_figure(document: Document) -> Figure | None:
    """Prefill and decode rates of both models; None where they were not measured."""
    theirs, ours = document["throughput"]["baseline"], document["throughput"]["quantized"]
    if theirs is None or ours is None:
        return None
    figure, both = new_figure(4.6, 3.2, columns=2)
    for axes, what in zip(both, ("prefill", "decode"), strict=True):
        key = f"{what}_tokens_s"
        for shift, color, label, side in (
            (-0.2, BASE, "baseline", theirs), (0.2, OURS, "quantized", ours),
        ):  # fmt: skip
            rates = [row[key] for row in side["rows"]]
            medians = [rate["median"] for rate in rates]
            errors = [
                [rate["median"] - rate["low"] for rate in rates],
                [rate["high"] - rate["median"] for rate in rates],
            ]
            places = [index + shift for index in range(len(rates))]
            axes.bar(places, medians, 0.38, yerr=errors, color=color, label=label,
                     error_kw={"linewidth": 0.8})  # fmt: skip
        axes.set_xticks(range(len(ours["rows"])), [f"batch {r['batch']}" for r in ours["rows"]])
        axes.set_title(f"{what}, tokens/s", fontsize=9)
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
                  frameon=False, fontsize=8)  # fmt: skip
    return figure


def scatter_figure(documents: Sequence[Document]) -> Figure:
    """Size of the weights against mean KL, a point per report: left and low is good."""
    figure, axes = new_figure(7.5, 4.2)
    for number, document in enumerate(documents):
        size = document["checkpoint"]["weight_bytes"] / document["baseline"]["weight_bytes"]
        kl = document["metrics"]["kl_mean"]["value"]
        axes.scatter([size], [kl], s=46, color=COLORS[number % len(COLORS)])
        name = document["checkpoint"]["method"] or document["checkpoint"]["name"]
        axes.annotate(name, (size, kl), xytext=(6, 3), textcoords="offset points", fontsize=8)
    axes.set_yscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + (high - low) * 0.35)
    axes.set_xlabel("size of the weights, share of the baseline's")
    axes.set_ylabel("KL from the baseline, nats (log scale)")
    return figure


def _kind(module: str) -> str:
    return module.rpartition(".")[2]


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    """A figure in inches in the style of the reports, and its axes (several: an array)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes: Any = figure.subplots(1, columns)
    for one in [axes] if columns == 1 else axes:
        _plain(one)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
