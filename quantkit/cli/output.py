"""What commands print: data on stdout, everything else on stderr; a bar or plain lines.

rich is imported on first use, so that `quantkit --help` stays fast.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from quantkit.recipe.units import duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, TaskID

    from quantkit.api import ProgressEvent
    from quantkit.backends.process.job import Unit

PLAIN_INTERVAL_S = 5.0


class Output:
    """Tables or one JSON document on stdout; notes and progress on stderr.

    Implements `quantkit.backends.process.job.Reporter`, so that the pipeline can tell its stages.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._total = 0
        self._unit: Unit = "steps"
        self._began = 0.0
        self._last_line = 0.0

    @cached_property
    def _out(self) -> Console:
        from rich.console import Console

        class Plain(Console):
            def on_broken_pipe(self) -> None:
                raise

        return Plain(width=None if sys.stdout.isatty() else 120, highlight=False)

    @cached_property
    def _err(self) -> Console:
        from rich.console import Console

        return Console(stderr=True, highlight=False, soft_wrap=True)

    def document(self, value: Any) -> None:
        """The one JSON document of a `--json` run; nothing without `--json`."""
        if self.as_json:
            sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def text(self, value: str) -> None:
        """Plain text on stdout; nothing with `--json`."""
        if not self.as_json:
            self._out.print(value, markup=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A table on stdout; nothing with `--json`."""
        if self.as_json:
            return
        from rich.box import ROUNDED
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title or None, title_justify="left", box=ROUNDED)
        for number, column in enumerate(columns):
            table.add_column(column, overflow="fold", no_wrap=number == 0)
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        self._out.print(table)

    def info(self, value: str) -> None:
        """A line for people on stderr."""
        self._err.print(value, markup=False)

    def stage(self, name: str, total: int = 0, unit: Unit = "steps") -> None:
        """Begin a stage: a bar on a terminal, plain lines elsewhere."""
        self.finish()
        self._stage, self._total, self._unit = name, total, unit
        self._began = self._last_line = time.monotonic()
        if self._err.is_terminal:
            self._start_bar()
        else:
            self.info(f"{name} …")

    def advance(self, done: int) -> None:
        """`done` steps of the stage are finished."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done)
            return
        now = time.monotonic()
        if self._total and now - self._last_line >= PLAIN_INTERVAL_S:
            self._last_line = now
            self.info(f"{self._stage} {self._progress_line(done, now - self._began)}")

    def _progress_line(self, done: int, seconds: float) -> str:
        """How far a stage is; without a rate or an estimate before a hundredth of it is done."""
        known = done * 100 >= self._total
        left = f", about {duration(seconds * (self._total - done) / done)} left" if known else ""
        if self._unit == "steps":
            return f"{done}/{self._total}{left}"
        rate = f", {done / seconds / 1e6:.0f} MB/s" if known else ""
        return f"{done / 1e6:.0f}/{self._total / 1e6:.0f} MB{rate}{left}"

    def note(self, text: str) -> None:
        """Something that the user should know and that is kept in quantkit.json."""
        self.info(f"note: {text}")

    def follow(self, event: ProgressEvent) -> None:
        """Show what a function of `quantkit.api` tells: the progress callback of every command."""
        if event.kind == "stage":
            self.stage(event.stage, event.total, event.unit)
        elif event.kind == "advance":
            self.advance(event.done)
        else:
            self.note(event.note)

    def finish(self) -> None:
        """End the current stage and leave the terminal clean."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None

    def _start_bar(self) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}")]
        if self._total and self._unit == "bytes":
            columns += [BarColumn(), DownloadColumn(), TransferSpeedColumn()]
        elif self._total:
            columns += [BarColumn(), MofNCompleteColumn()]
        if self._total:
            columns.append(TimeRemainingColumn())
        self._progress = Progress(*columns, TimeElapsedColumn(), console=self._err, transient=True)
        self._task = self._progress.add_task(self._stage, total=self._total or None)
        self._progress.start()


def print_error(message: str, hint: str) -> None:
    """The two lines that every failure ends with, on stderr."""
    color = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    red, cyan, off = ("\033[1;31m", "\033[36m", "\033[0m") if color else ("", "", "")
    sys.stderr.write(f"{red}error:{off} {message}\n{cyan}hint:{off} {hint}\n")
