"""What `analyze` measured as one HTML file that needs nothing else: a heat map and tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.resources import files
from math import nan
from typing import TYPE_CHECKING, Any

from quantkit.validation.reports.markdown import number
from quantkit.validation.reports.plots import COLORS, new_figure, svg
from quantkit.validation.reports.write import Writers, as_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Document = Mapping[str, Any]
WORST = 20


def as_html(document: Document) -> str:
    """The page."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("quantkit.validation.search").joinpath("page.html").read_text("utf-8")
    figures = {"heat": heat_figure(document), "cumulated": cumulated_figure(document)}
    return environment.from_string(source).render(
        report=document,
        number=number,
        worst=_worst(document),
        pictures={
            name: Markup(svg(figure)) if figure else None  # noqa: S704  ours
            for name, figure in figures.items()
        },
    )


WRITERS: Writers = {".json": as_json, ".html": as_html}


def heat_figure(document: Document) -> Figure | None:
    """Estimated KL, layers × (kind of group, scheme), on a logarithmic scale of colour."""
    cells = list(_cells(document))
    shown = [(layer, kind, scheme, cell["kl"]) for layer, kind, scheme, cell in cells]
    positive = [kl for *_, kl in shown if kl > 0]
    if not positive:
        return None
    from matplotlib.colors import LogNorm

    layers = sorted({layer for layer, *_ in shown})
    kinds = list(dict.fromkeys(kind for _, kind, *_ in shown))
    found = dict.fromkeys((kind, scheme) for _, kind, scheme, _ in shown)
    rows = sorted(found, key=lambda row: kinds.index(row[0]))
    values = {(kind, scheme, layer): kl for layer, kind, scheme, kl in shown}
    grid = [[values.get((*row, layer)) or nan for layer in layers] for row in rows]
    figure, axes = new_figure(9, 1.2 + 0.26 * len(rows))
    axes.grid(visible=False)
    norm = LogNorm(min(positive), max(positive))
    picture = axes.imshow(grid, aspect="auto", cmap="YlOrRd", norm=norm, interpolation="nearest")
    axes.set_yticks(range(len(rows)), [f"{kind}  {scheme}" for kind, scheme in rows], fontsize=7)
    step = len(layers) // 16 + 1
    axes.set_xticks(range(0, len(layers), step), layers[::step])
    axes.set_xlabel("decoder layer")
    figure.colorbar(picture, ax=axes, label="KL, nats a token")
    return figure


def cumulated_figure(document: Document) -> Figure | None:
    """Bytes saved against the KL that adds up, the groups that cost least a byte first."""
    figure, axes = new_figure(9, 3.4)
    drawn = False
    for color, scheme in enumerate(document["schemes"]):
        found = [
            group["schemes"][scheme] for group in document["groups"] if scheme in group["schemes"]
        ]
        found.sort(key=lambda cell: cell["kl"] / max(cell["bytes_saved"], 1))
        saved, kl, points = 0.0, 0.0, []
        for cell in found:
            saved, kl = saved + cell["bytes_saved"] / 1e6, kl + cell["kl"]
            points.append((saved, kl))
        if points:
            drawn = True
            axes.plot(*zip(*points, strict=True), color=COLORS[color % len(COLORS)], label=scheme)
    if not drawn:
        return None
    axes.set_yscale("log")
    axes.set_xlabel("bytes saved, MB")
    axes.set_ylabel("KL that adds up, nats (log scale)")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _cells(document: Document) -> Iterator[tuple[int, str, str, Mapping[str, float]]]:
    """Decoder layer, kind of group, scheme and cell, of every group inside the stack."""
    for group in document["groups"]:
        if group["layer"] is not None:
            kind = "experts" if group["experts"] else group["name"].rpartition(".")[2]
            for scheme, cell in group["schemes"].items():
                yield group["layer"], kind, scheme, cell


def _worst(document: Document) -> list[tuple[str, str, Mapping[str, float]]]:
    """The cells with the largest KL: group, scheme, cell."""
    found = [
        (group["name"], scheme, cell)
        for group in document["groups"]
        for scheme, cell in group["schemes"].items()
    ]
    return sorted(found, key=lambda one: -one[2]["kl"])[:WORST]
