"""The leaderboard as one page that needs nothing else: it sorts by itself, and follows the reader's
light or dark theme.

Pictures are drawn here, in colours of the page's style, which those of matplotlib could not take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from math import ceil, floor, log10
from typing import Any

from quantkit.validation.reports.markdown import number
from quantkit.validation.sweep.leaderboard import COLUMNS, cell_text

WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 640, 360, 80, 52, 16
LEAST = 1e-9
"""KL under it is drawn there: the scale is logarithmic."""


@dataclass(frozen=True)
class Point:
    """One cell in a picture: x as it is, y on a logarithmic scale."""

    x: float
    y: float
    title: str
    series: int


def as_html(document: Mapping[str, Any]) -> str:
    """The page."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    cells = document["cells"]
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("quantkit.validation.sweep").joinpath("page.html").read_text("utf-8")
    size = scatter(
        _points(cells, models, "share"), "size of the weights, × the baseline", least=True
    )
    speed = scatter(
        _points(cells, models, "decode_tokens_s"), "decoded tokens a second", least=False
    )
    return environment.from_string(source).render(
        report=document,
        columns=COLUMNS,
        models=models,
        cell_text=cell_text,
        number=number,
        states={"ok": "ok", "gate failed": "gate", "failed": "failed"},
        pictures={"size": Markup(size), "speed": Markup(speed)},  # noqa: S704  ours
    )


def _points(cells: Sequence[Mapping[str, Any]], models: Sequence[str], name: str) -> list[Point]:
    return [
        Point(cell[name], max(cell["kl"], LEAST), f"{cell['model']}: {cell['recipe']}",
              models.index(cell["model"]))
        for cell in cells
        if cell[name] is not None and cell["kl"] is not None
    ]  # fmt: skip


def pareto(points: Sequence[Point], *, least: bool) -> list[Point]:
    """The points that none is better than in both: less y, and less x (or more), in the order of
    x."""
    found: list[Point] = []
    for point in sorted(points, key=lambda one: (one.x if least else -one.x, one.y)):
        if not found or point.y < found[-1].y:
            found.append(point)
    return sorted(found, key=lambda one: one.x)


def scatter(points: Sequence[Point], label: str, *, least: bool) -> str:
    """An SVG element: KL over `label`, each model's Pareto front as a line; empty without points.
    `least`: whether a smaller x is better."""
    if not points:
        return ""
    xs, ys = [point.x for point in points], [log10(point.y) for point in points]
    low, high = min(xs), max(xs)
    pad = (high - low or abs(high) or 1.0) * 0.08
    low, high = low - pad, high + pad
    bottom, top = min(ys) - 0.15, max(ys) + 0.15

    def place(point: Point) -> tuple[float, float]:
        across = (point.x - low) / (high - low)
        up = (log10(point.y) - bottom) / (top - bottom)
        return (LEFT + across * (WIDTH - LEFT - MARGIN),
                HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - MARGIN))  # fmt: skip

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="KL over {escape(label)}">'
    ]
    for tick in _ticks(bottom, top):
        _, y = place(Point(low, 10**tick, "", 0))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - MARGIN}" y1="{y:.1f}" '
                     f'y2="{y:.1f}"/><text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" '
                     f'text-anchor="end">{10**tick:.2g}</text>')  # fmt: skip
    for value, written in round_ticks(low, high):
        x, _ = place(Point(value, 10**bottom, "", 0))
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" '
                     f'text-anchor="middle">{written}</text>')  # fmt: skip
    parts.append(f'<text class="label" x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 6}" '
                 f'text-anchor="middle">{escape(label)}</text>'
                 f'<text class="label" x="14" y="{HEIGHT / 2:.0f}" text-anchor="middle" '
                 f'transform="rotate(-90 14 {HEIGHT / 2:.0f})">KL, nats</text>')  # fmt: skip
    for series in sorted({point.series for point in points}):
        front = pareto([point for point in points if point.series == series], least=least)
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, front))
        parts.append(f'<polyline class="front s{series % 6}" points="{line}"/>')
    for point in points:
        x, y = place(point)
        parts.append(f'<circle class="s{point.series % 6}" cx="{x:.1f}" cy="{y:.1f}" r="5">'
                     f"<title>{escape(point.title)}: {point.x:.4g}, KL {point.y:.4g}</title>"
                     "</circle>")  # fmt: skip
    return "".join([*parts, "</svg>"])


def round_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Four to ten multiples of 1, 2 or 5 times a power of ten within a range, each with what is
    written there."""
    power = floor(log10((high - low) / 4))
    fitting = (f * 10**power for f in (5, 2) if (high - low) / (f * 10**power) >= 4)
    step = next(fitting, 10**power)
    numbers = range(ceil(low / step), floor(high / step) + 1)
    return [(number * step, f"{number * step:.{max(-power, 0)}f}") for number in numbers]


def _ticks(bottom: float, top: float) -> list[float]:
    """Powers of ten in a range of exponents, and twice and five times them where those are few."""
    whole = [float(e) for e in range(int(bottom) - 2, int(top) + 2)]
    few = top - bottom < 2
    every = [e + log10(factor) for e in whole for factor in ((1, 2, 5) if few else (1,))]
    return [tick for tick in every if bottom <= tick <= top]
