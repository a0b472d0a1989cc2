"""The hands of a run: worker processes of this machine, or this process alone."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import quantkit
from quantkit.backends.child_process import Child
from quantkit.backends.streaming.job import Slice, StreamOptions, WorkOrder
from quantkit.backends.streaming.memory import MemoryWatch
from quantkit.checkpoint.paths import new_log
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
LEAVE_SECONDS = 10.0
"""What workers get to leave by themselves when nothing more is asked of them."""


class Workers:
    """Worker processes for one run, as a context: they start at once and end with it (`Child`).

    When this process is killed they end by themselves: their sockets close. What workers wrote is
    kept in a log, which the error names, when one was lost or failed.
    """

    def __init__(self, count: int, device: str, options: StreamOptions) -> None:
        self.memory = MemoryWatch()
        self._options = options
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the context
        pairs = [socket.socketpair() for _ in range(count)]
        theirs = [their.detach() for _, their in pairs]
        root = str(Path(quantkit.__file__).parent.parent)
        self._child = Child(
            [sys.executable, "-P", "-c", _START, root, device, *map(str, theirs)],
            log=self._log,
            descriptors=theirs,
            own_session=False,
        )
        self._sockets = [Connection(ours.detach()) for ours, _ in pairs]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for connection in self._sockets:
            connection.close()
        self._child.end(patience=LEAVE_SECONDS if kind is None else 0.0)
        self._log.close()

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
            self._child.look()

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
        log = self._kept_log(content[0])
        raise BackendError(
            f"A streaming worker failed: {content[0].strip().splitlines()[-1]}",
            hint=f"read {log}; finished files are kept, --resume goes on from them",
            code="stream.worker_failed",
        )

    def _lost(self) -> BackendError:
        what = "A streaming worker was killed or could not start (out of memory?)."
        told = self._written().strip().splitlines()
        if self._child.memory_ran_out():
            what = "A streaming worker was killed: the machine or its container ran out of memory."
        elif told:
            log = self._kept_log()
            what = f"A streaming worker was killed or could not start: {told[-1]} ({log})."
        return BackendError(
            f"{what} Finished files are kept.",
            hint="run the same command with --resume, and with a lower --jobs if memory was short",
            code="stream.worker_lost",
        )

    def _written(self) -> str:
        """What the workers wrote; they go on from where they are."""
        file = self._log.fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")

    def _kept_log(self, more: str = "") -> Path:
        """A file with what the workers wrote, and `more`."""
        log = new_log("streaming")
        log.write_text(self._written() + more, encoding="utf-8")
        return log
