"""A child process with all that it starts: started, followed, ended as one tree, and explained.

The worker of a library, the streaming workers and the serving engines are each a `Child`. What they
are told and what they answer is their own; that none of their processes stays behind is decided
here.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

POLL_SECONDS = 0.2
TERM_SECONDS = 2.0
"""How long what is told to end may take before it is killed."""
KILL_SECONDS = 10.0
"""How long the kernel may take to end what is killed; a process in a driver's call may stay."""
OOM_WINDOW_SECONDS = 30.0
LOG_BYTES = 1 << 18
VMSTAT = Path("/proc/vmstat")

MARK = "QUANTKIT_CHILD"
"""Environment variable by which what a child started is found, even when its parent is gone and it
has a session of its own (a daemon)."""


@dataclass(frozen=True)
class Ending:
    """How a child ended by itself.

    `status` is its exit status, or the negative number of the signal that killed it;
    `out_of_memory` whether that was the kernel's, because memory ran out; `peak_bytes` the most
    that its own process was seen to hold in memory.
    """

    status: int
    out_of_memory: bool
    peak_bytes: int

    @property
    def killer(self) -> str:
        """The name of the signal that killed it; empty when it left by itself."""
        if self.status >= 0:
            return ""
        try:
            return signal.Signals(-self.status).name
        except ValueError:
            return f"signal {-self.status}"


class Child:
    """A running process and all that it starts, as a context that leaves nothing of it behind.

    `arguments` is the command; stdout and stderr go to `log`, stdin is empty. `descriptors` are
    the child's: it inherits them under the same numbers, and they are closed here. With
    `own_session` it leads a session, so that no terminal's Ctrl-C reaches it; without, only a
    process group, so that priorities by session are those of the command.

    A child whose parent dies ends by itself: by the kernel's signal (`process/worker.py`,
    `die_with_parent`), or because its sockets close.

    Raises OSError when it cannot be started.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        log: IO[bytes],
        descriptors: Sequence[int] = (),
        folder: Path | None = None,
        own_session: bool = True,
    ) -> None:
        self._mark = secrets.token_hex(16)
        self._kills, self._last_kill = oom_kills(), -math.inf
        self._looked = -math.inf
        self._peak = 0
        try:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=descriptors,
                start_new_session=own_session,
                process_group=None if own_session else 0,
                cwd=folder,
                env=_environment() | {MARK: self._mark},
            )
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def events(self, descriptor: int) -> Iterator[dict[str, Any]]:
        """The JSON objects, one a line, that the child writes to the other end of a pipe.

        Ends with the pipe or with the child, even if a grandchild keeps the pipe open.
        """
        pipe = select.poll()
        pipe.register(descriptor, select.POLLIN)
        unfinished = bytearray()
        while True:
            gone = self._process.poll() is not None
            readable = pipe.poll(0 if gone else POLL_SECONDS * 1000)
            self.look()
            if not readable:
                if gone:
                    return
                continue
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                return
            unfinished += chunk
            if b"\n" in chunk:
                *lines, unfinished = unfinished.split(b"\n")
                for line in lines:
                    yield json.loads(line)

    def look(self, every: float = POLL_SECONDS) -> None:
        """Notice whether the kernel has killed for want of memory since the last look, and what the
        child holds, unless that was less than so many seconds ago."""
        now = time.monotonic()
        if now - self._looked < every:
            return
        self._looked = now
        self._peak = max(self._peak, _held(self._process.pid))
        if self._kills != (kills := oom_kills()):
            self._kills, self._last_kill = kills, now

    def memory_ran_out(self) -> bool:
        """Whether the kernel has just killed a process, of this tree or another, for memory."""
        self.look(every=0)
        return time.monotonic() - self._last_kill < OOM_WINDOW_SECONDS

    def ending(self) -> Ending:
        """Wait until the child itself has ended; how it did."""
        status = self._process.wait()
        out_of_memory = status == -signal.SIGKILL and self.memory_ran_out()
        return Ending(status, out_of_memory, self._peak)

    def end(self, patience: float = 0.0) -> None:
        """Give the child so many seconds to leave by itself, then end what there is of its tree:
        told to (SIGTERM), killed TERM_SECONDS later, at once when this is interrupted."""
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
            self._signal_tree(signal.SIGTERM, TERM_SECONDS)
        finally:
            self._signal_tree(signal.SIGKILL, KILL_SECONDS)

    def _signal_tree(self, number: signal.Signals, seconds: float) -> None:
        """Send a signal to every process of the tree, new ones too, until none runs."""
        import psutil

        deadline = time.monotonic() + seconds
        known: set[Any] = set()
        while True:
            self._process.poll()  # a zombie of ours goes
            running = {process for process in known | self._tree() if _runs(process)}
            for process in running - known:
                with suppress(psutil.Error):
                    process.send_signal(number)
            known |= running
            if not running or time.monotonic() > deadline:
                return
            time.sleep(0.01)

    def _tree(self) -> set[Any]:
        """The child, its descendants, and those that lost their parent: they have its group or its
        mark."""
        import psutil

        found = set()
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                ours = os.getpgid(process.pid) == self._process.pid
                if ours or process.environ().get(MARK) == self._mark:
                    found.add(process)
        if self._process.returncode is None:
            with suppress(psutil.Error):
                found.update(psutil.Process(self._process.pid).children(recursive=True))
        return found


def oom_kills(vmstat: Path = VMSTAT) -> int:
    """Processes that the kernel has killed for memory since it started (0 where it won't say).

    `oom_kill` of proc_vmstat(5) counts kills by cgroup limits too.
    """
    with suppress(OSError):
        for line in vmstat.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _held(pid: int) -> int:
    """Resident bytes of a process; 0 where the kernel does not tell, or when it has ended."""
    with suppress(OSError, ValueError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0


def log_text(log: Path) -> str:
    """The end of a log (LOG_BYTES of it); empty where it cannot be read."""
    with suppress(OSError), log.open("rb") as handle:
        handle.seek(max(0, log.stat().st_size - LOG_BYTES))
        return handle.read().decode("utf-8", "replace")
    return ""


def _environment() -> dict[str, str]:
    """A child's environment: no downloads, no unsafe unpickling, the same hashes every run."""
    child = dict(os.environ)
    child.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    child.update(
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        PYTHONUNBUFFERED="1",
        PYTHONHASHSEED="0",
        QUANTKIT_PARENT_PID=str(os.getpid()),
    )
    return child


def _runs(process: Any) -> bool:
    """Whether a process is there and no zombie, which only its parent can remove."""
    import psutil

    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
