"""The parent's side of an engine process: start it, ask it, and say clearly how it failed."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.backends.child_process import Child, log_text
from quantkit.checkpoint.paths import new_log
from quantkit.checkpoint.progress import Progress
from quantkit.errors import BackendError
from quantkit.runtime.serving import worker
from quantkit.runtime.serving.drivers.base import EngineOrder
from quantkit.runtime.serving.environments import EngineProcessSpec

_ERROR_LINE = re.compile(r"^\S*(?:Error|Exception|Interrupt)\b.*")
_PREFIX = re.compile(r"^\([^)]*\) (?:ERROR|WARNING|INFO) \S+ \S+ \[[^]]*\] ?")
LINE_WIDTH = 400
LEAVE_SECONDS = 5.0
"""What an engine gets to stop by itself when nothing more is asked of it."""


class EngineProcess:
    """An engine with its model, as processes that end with this object or this process (`Child`).

    Raises BackendError from the constructor and from every call: `engine.out_of_memory`,
    `engine.import_failed`, `engine.killed` or `engine.failed`, with the engine's last error line
    and the place of its log. The log of a process that was closed in order is removed.
    """

    def __init__(self, engine: EngineProcessSpec, python: Path, order: EngineOrder) -> None:
        self.engine = engine
        self.model = order.model
        self.log = new_log(engine.name)
        self._work = tempfile.TemporaryDirectory(prefix="quantkit-")
        requests_of_child, requests = os.pipe()
        events, events_of_child = os.pipe()
        self._requests = os.fdopen(requests, "w", encoding="utf-8")
        self._pipe = os.fdopen(events, "rb")
        self._told_why = False
        order_file = Path(self._work.name, "order.json")
        order.write(order_file)
        script = Path(worker.__file__).resolve()
        descriptors = (requests_of_child, events_of_child)
        try:
            with self.log.open("wb") as handle:
                self._child = Child(
                    [str(python), str(script), str(order_file), *map(str, descriptors)],
                    log=handle,
                    descriptors=descriptors,
                    folder=order_file.parent,
                )
        except OSError as error:
            self._release()
            self.log.unlink()
            raise BackendError(
                f"{engine.title} cannot be started with {python}: {error.strerror}.",
                hint=self._check_hint(),
                code="engine.failed",
            ) from error
        self._events = self._child.events(events)
        try:
            started = self._until("ready", None)
        except BaseException:
            self._stop()
            raise
        self.version: str = started["version"]
        self.kernels: dict[str, int] = started["kernels"]
        self.memory_bytes: int = started["memory_bytes"]
        self.load_seconds: float = started["load_seconds"]

    def logprobs(
        self, windows: Sequence[Sequence[int]], progress: Progress | None
    ) -> list[list[float]]:
        """Log-probability of every token but the first of each window."""
        value: list[list[float]] = self._ask("logprobs", progress, windows=windows)
        return value

    def top_logprobs(
        self, windows: Sequence[Sequence[int]], count: int, progress: Progress | None
    ) -> dict[str, NDArray[Any]]:
        """`logprobs`, `ids` and `kept` of `drivers/likeliest.py`."""
        file = Path(self._work.name, "likeliest.npz")
        self._ask("top_logprobs", progress, windows=windows, count=count, file=str(file))
        with np.load(file, allow_pickle=False) as held:
            found = dict(held)
        file.unlink()
        return found

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """The greedy continuation of each prompt."""
        value: list[list[int]] = self._ask(
            "generate", None, prompts=prompts, new_tokens=new_tokens
        )  # fmt: skip
        return value

    def seconds(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
        """How long one batch of prompts takes, with exactly so many new tokens each."""
        value: float = self._ask("seconds", None, prompts=prompts, new_tokens=new_tokens)
        return value

    def tasks(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """What lm-eval's own backend finds (`drivers/harness.py`), of an engine that is one."""
        value: dict[str, Any] = self._ask("tasks", None, **asked)
        return value

    def close(self) -> None:
        """End the engine; its log goes, unless an error named it."""
        self._stop()
        if not self._told_why:
            self.log.unlink(missing_ok=True)

    def _ask(self, call: str, progress: Progress | None, **arguments: object) -> Any:
        try:
            self._requests.write(json.dumps({"call": call, **arguments}) + "\n")
            self._requests.flush()
        except BrokenPipeError:
            pass  # the reason is what its events end with
        return self._until("value", progress)["value"]

    def _until(self, wanted: str, progress: Progress | None) -> dict[str, Any]:
        """The next event of that kind, progress passed on; raises when the engine fails first."""
        for event in self._events:
            if event["event"] == "error":
                self._told_why = True
                raise self._failed(event)
            if event["event"] == wanted:
                return event
            if progress:
                progress(event["done"], event["total"])
        self._told_why = True
        raise self._gone()

    def _failed(self, event: dict[str, Any]) -> BackendError:
        what = f"{self.engine.title} with {self.model}"
        if event["out_of_memory"]:
            return self._out_of_memory(f"{what} ran out of memory: {_line(event['message'])}")
        if event["missing"]:
            return BackendError(
                f"{self.engine.title} cannot be imported: {event['missing']} is missing.",
                hint=self._check_hint(),
                code="engine.import_failed",
            )
        message = event["message"]
        told = f"{event['type']}: {_line(message)}" if message else event["type"]
        if "See root cause above" in message:
            told = self._last_error()
        return BackendError(
            f"{what} failed: {told}", hint=f"read {self.log}", code="engine.failed"
        )  # fmt: skip

    def _gone(self) -> BackendError:
        ending = self._child.ending()
        what = f"{self.engine.title} with {self.model}"
        if ending.out_of_memory:
            return self._out_of_memory(
                f"{what} was killed: the machine or its container ran out of memory."
            )
        how = f"was killed by {ending.killer}" if ending.killer else ""
        last = self._last_error()
        return BackendError(
            f"{what} {how or f'ended with status {ending.status}'}."
            + (f" Its log ends with: {last}" if last else ""),
            hint=f"read {self.log}",
            code="engine.killed" if ending.killer else "engine.failed",
        )

    def _out_of_memory(self, message: str) -> BackendError:
        return BackendError(
            message,
            hint=f"use a machine with more memory; its log: {self.log}",
            code="engine.out_of_memory",
        )

    def _check_hint(self) -> str:
        names = self.engine.environments
        return f"quantkit env check {names[-1]}" if names else f"read {self.log}"

    def _last_error(self) -> str:
        """The last line of the log that names an error, else its last line."""
        lines = [_PREFIX.sub("", line).strip() for line in log_text(self.log).splitlines()]
        lines = [line for line in lines if line and "See root cause above" not in line]
        errors = [line for line in lines if _ERROR_LINE.match(line)]
        return _line((errors or lines or [""])[-1])

    def _stop(self) -> None:
        """Close the requests, which ends the engine, and make sure that it ends."""
        with suppress(BrokenPipeError):
            self._requests.close()
        try:
            self._child.end(patience=LEAVE_SECONDS)
        finally:
            self._release()

    def _release(self) -> None:
        with suppress(BrokenPipeError):
            self._requests.close()
        self._pipe.close()
        self._work.cleanup()


def _line(text: str) -> str:
    return " ".join(text.split())[:LINE_WIDTH]
