"""The report as one HTML file that needs nothing else: pictures are inside, no script runs."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

from quantkit.errors import InputError
from quantkit.recipe.gates import outcome
from quantkit.validation.reports.markdown import (
    PICTURE_HEAD,
    beside_online,
    gate_row,
    kernels,
    lowest_routing,
    measured,
    number,
    worst_pictures,
)

Document = Mapping[str, Any]


def require_matplotlib() -> None:
    """InputError when the pictures cannot be drawn."""
    if find_spec("matplotlib") is None:
        raise InputError(
            "An HTML report needs matplotlib, which is not installed.",
            hint="pip install 'quantkit[report]', or --report report.md",
            code="validate.no_matplotlib",
        )


def as_html(document: Document) -> str:
    """The page. What models said is escaped: it is untrusted text."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    from quantkit.validation.reports import plots

    figures = {
        "layers": plots.layers_figure(document),
        "experts": plots.experts_figure(document),
        "kl": plots.kl_figure(document),
        "routing": plots.routing_figure(document),
        "throughput": plots.throughput_figure(document),
    }
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("quantkit.validation.reports").joinpath("report.html").read_text("utf-8")
    return environment.from_string(source).render(
        report=document,
        outcome=outcome(document["ok"], document["undecided"]),
        gates=[(gate, *gate_row(gate)) for gate in document["gates"]],
        measured=list(measured(document)),
        online=beside_online(document) if document.get("online") else [],
        kernels=kernels(document["engine"]),
        number=number,
        routing=lowest_routing(document),
        shown=worst_pictures(document),
        picture_head=PICTURE_HEAD,
        worst=sorted(document["layers"], key=lambda layer: layer["sqnr_db"])[:10],
        pictures={
            name: None if figure is None else Markup(plots.svg(figure))  # noqa: S704  ours
            for name, figure in figures.items()
        },
    )
