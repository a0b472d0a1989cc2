"""Pictures with captions that say what is in them, drawn by code from a seed: nothing borrowed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]

VERSION = 1
"""Raised whenever the same seed would give another picture."""
SIDE = 224
"""Pixels a side."""
COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = {"circle": "o", "square": "s", "triangle": "^", "star": "*", "diamond": "D"}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


@dataclass(frozen=True)
class Picture:
    """`pixels` is uint8 [height, width, 3]; `answer` says of it what `question` asks."""

    pixels: Pixels
    question: str
    answer: str


def draw(seed: int, index: int) -> Picture:
    """The picture of that number: shapes to count, digits, or a small table.

    Raises ImportError without matplotlib.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    choices = random.Random(f"{VERSION} {seed} {index}")  # noqa: S311 - no secret is drawn
    figure = Figure(figsize=(SIDE / 100, SIDE / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_axis_off()
    question, answer = choices.choice(_KINDS)(axes, choices)
    canvas.draw()  # type: ignore[no-untyped-call]
    drawn = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    pixels = drawn[..., :3].copy()
    return Picture(pixels, question, answer)


def _shapes(axes: Any, choices: random.Random) -> tuple[str, str]:
    colour, (shape, marker) = choices.choice(COLOURS), choices.choice(list(SHAPES.items()))
    count = choices.randint(1, 6)
    places = choices.sample([(x, y) for x in (0.2, 0.5, 0.8) for y in (0.25, 0.75)], count)
    for x, y in places:
        axes.plot(x, y, marker=marker, markersize=choices.randint(20, 32), color=colour)
    plural = "" if count == 1 else "s"
    return "What do you see, and how many?", f"I see {NUMBERS[count]} {colour} {shape}{plural}."


def _digits(axes: Any, choices: random.Random) -> tuple[str, str]:
    number, colour = choices.randint(10, 9999), choices.choice(COLOURS)
    axes.text(0.5, 0.5, str(number), fontsize=44, color=colour, ha="center", va="center")
    return "Which number is this, and in which colour?", f"The number {number}, in {colour}."


def _table(axes: Any, choices: random.Random) -> tuple[str, str]:
    names = choices.sample(("apples", "pears", "plums", "nuts", "eggs"), 3)
    rows = [[name, str(choices.randint(1, 99))] for name in names]
    axes.table(cellText=rows, bbox=(0.1, 0.2, 0.8, 0.6), cellLoc="center", fontsize=18)
    return "Read the table.", ", ".join(f"{name}: {number}" for name, number in rows) + "."


_KINDS: tuple[Callable[[Any, random.Random], tuple[str, str]], ...] = (_shapes, _digits, _table)
