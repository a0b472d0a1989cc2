"""The worker processes: torch is imported once, then one process a socket is forked.

Started by `crew.Workers`. A worker takes orders from its socket until the other end is closed, so
none outlives the run that it works for.
"""

from __future__ import annotations

import gc
import os
import time
import traceback
from multiprocessing.connection import Connection

import torch

from quantkit.backends.streaming.job import StreamOptions
from quantkit.backends.streaming.perform import Performer, find_device, keep_freed_memory
from quantkit.errors import InputError

REPORT_SECONDS = 0.05


def main(device: str, descriptors: list[int]) -> None:
    """Fork a worker for every socket, and wait for them."""
    torch.set_num_threads(1)
    gc.freeze()
    for index, descriptor in enumerate(descriptors):
        if os.fork() == 0:
            for other in descriptors:
                if other != descriptor:
                    os.close(other)
            try:
                serve(Connection(descriptor), device, index)
            finally:
                os._exit(0)
    for descriptor in descriptors:
        os.close(descriptor)
    for _ in descriptors:
        os.wait()


def serve(socket: Connection, device: str, index: int) -> None:
    """Answer orders until the socket is closed, as the worker of that index.

    First comes the run's StreamOptions, then orders for `Performer.answer`. Replies are ("ready",)
    once, ("done", *answer), in between ("read", bytes), and ("failed", kind, …) at the end of all.
    """
    try:
        socket.send(("ready",))
        options: StreamOptions = socket.recv()
        keep_freed_memory()
        reporter = _Reporter(socket)
        performer = Performer(find_device(device, index), options, reporter.advance)
        with torch.inference_mode():
            while True:
                answer = performer.answer(socket.recv())
                reporter.flush()
                socket.send(("done", *answer))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except InputError as error:
        socket.send(("failed", "input", error.message, error.hint, error.code))
    except OSError as error:
        socket.send(("failed", "os", error.errno, str(error)))
    except Exception:
        socket.send(("failed", "other", traceback.format_exc()))


class _Reporter:
    def __init__(self, socket: Connection) -> None:
        self._socket, self._count, self._last = socket, 0, time.monotonic()

    def advance(self, count: int) -> None:
        self._count += count
        if time.monotonic() - self._last > REPORT_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._socket.send(("read", self._count))
        self._count, self._last = 0, time.monotonic()
