"""The hands of a run: worker processes of this machine, or this process alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import quantkit
from quantkit.backends.streaming.job import Slice, StreamOptions, WorkOrder
from quantkit.backends.streaming.memory import MemoryWatch
from quantkit.checkpoint.progress import BytesDone
from quantkit.errors import BackendError, InputError

TICK = 0.1

Answered = Callable[[Any, Any], None]
"""Takes an Order's number and its WorkRecord, or a Slice and whether it is finite."""


class Crew(Protocol):
    """Who does the orders of a run."""

    memory: MemoryWatch

    def start(self) -> None:
        """Wait until orders can be done. Raises BackendError when they cannot."""

    def do(
        self,
        orders: Iterable[WorkOrder | Slice],
        answered: Answered,
        progress: BytesDone | None = None,
    ) -> None:
        """Have every order done. Raises InputError, OSError or BackendError from the worker."""


def hands(jobs: int, device: str, options: StreamOptions) -> Alone | Workers:
    """The crew, as a context, for that many jobs at a time."""
    return Alone(device, options) if jobs == 1 else Workers(jobs, device, options)


class Alone:
    """This process does everything itself: for one job, where workers would only cost time."""

    def __init__(self, device: str, options: StreamOptions) -> None:
        self.memory = MemoryWatch()
        self._device, self._options = device, options

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def start(self) -> None:
        """See `Crew`."""

    def do(
        self,
        orders: Iterable[WorkOrder | Slice],
        answered: Answered,
        progress: BytesDone | None = None,
    ) -> None:
        """See `Crew`."""
        import torch

        from quantkit.backends.streaming.perform import Performer, find_device, keep_freed_memory

        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if progress:
                progress(done)
            self.memory.look()

        performer = Performer(find_device(self._device, 0), self._options, advance)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        keep_freed_memory()
        try:
            with torch.inference_mode():
                for order in orders:
                    answered(*performer.answer(order))
        finally:
            torch.set_num_threads(threads)


_START = """
import sys
sys.path.append(sys.argv[1])
from quantkit.backends.streaming.worker import main
main(sys.argv[2], [int(argument) for argument in sys.argv[3:]])
"""


class Workers:
    """Worker processes for one run, as a context: they start at once and end with it.

    When this process is killed they end by themselves: their sockets close.
    """

    def __init__(self, count: int, device: str, options: StreamOptions) -> None:
        self.memory = MemoryWatch()
        self._options = options
        pairs = [socket.socketpair() for _ in range(count)]
        theirs = [pair[1].fileno() for pair in pairs]
        root = str(Path(quantkit.__file__).parent.parent)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the context
        self._server = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, root, device, *map(str, theirs)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._errors,
            pass_fds=theirs, process_group=0,
        )  # fmt: skip
        for _, their in pairs:
            their.close()
        self._sockets = [Connection(ours.detach()) for ours, _ in pairs]

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for connection in self._sockets:
            connection.close()
        if kind is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()
        self._errors.close()

    def start(self) -> None:
        """See `Crew`."""
        for connection in self._sockets:
            self._receive(connection)
            self._send(connection, self._options)

    def do(
        self,
        orders: Iterable[WorkOrder | Slice],
        answered: Answered,
        progress: BytesDone | None = None,
    ) -> None:
        """See `Crew`."""
        queue = iter(orders)
        busy: set[Connection] = set()
        done = 0

        def give(connection: Connection) -> None:
            order = next(queue, None)
            if order is None:
                busy.discard(connection)
            else:
                self._send(connection, order)
                busy.add(connection)

        for connection in self._sockets:
            give(connection)
        while busy:
            for ready in wait(list(busy), TICK):
                assert isinstance(ready, Connection)
                kind, *content = self._receive(ready)
                if kind == "read":
                    done += content[0]
                    continue
                answered(*content)
                give(ready)
            if progress:
                progress(done)
            self.memory.look()

    def _send(self, connection: Connection, value: StreamOptions | WorkOrder | Slice) -> None:
        try:
            connection.send(value)
        except (BrokenPipeError, ConnectionResetError):
            raise self._lost() from None

    def _receive(self, connection: Connection) -> tuple[Any, ...]:
        try:
            message: tuple[Any, ...] = connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._lost() from None
        if message[0] != "failed":
            return message
        kind, *content = message[1:]
        if kind == "input":
            raise InputError(content[0], hint=content[1], code=content[2])
        if kind == "os":
            raise OSError(content[0], content[1])
        raise BackendError(
            f"A streaming worker failed: {content[0].strip().splitlines()[-1]}\n{content[0]}",
            hint="report this with the text above",
            code="stream.worker_failed",
        )

    def _lost(self) -> BackendError:
        self._errors.seek(0)
        told = self._errors.read().decode(errors="replace").strip().splitlines()
        return BackendError(
            "A streaming worker was killed or could not start"
            + (f": {told[-1]}" if told else " (out of memory?)")
            + ". Finished files are kept.",
            hint="run the same command with --resume, and with a lower --jobs if memory was short",
            code="stream.worker_lost",
        )
