"""A child and all that it starts: what it tells, how it ended, and that nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantkit.backends.child_process import Child, log_text
from tests.support.processes import DAEMON, is_alive, wait_until_gone


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reads, writes = os.pipe()
    yield reads, writes
    os.close(reads)


def start(code: str, log: Path, *more: object, descriptors: tuple[int, ...] = ()) -> Child:
    with log.open("wb") as handle:
        return Child(
            [sys.executable, "-c", code, *map(str, more)], log=handle, descriptors=descriptors
        )


def heard(code: str, log: Path, pipe: tuple[int, int]) -> list[dict[str, Any]]:
    reads, writes = pipe
    with start(code, log, writes, descriptors=(writes,)) as child:
        return list(child.events(reads))


def test_events_come_whole_however_they_are_cut(tmp_path: Path, pipe: tuple[int, int]) -> None:
    code = (
        "import json, os, sys, time\n"
        "lines = [json.dumps({'n': n, 'x': 'é' * n}).encode() + b'\\n' for n in range(900)]\n"
        "lines = b''.join(lines)\n"
        "out = int(sys.argv[1])\n"
        "for at in range(0, len(lines), 7777): os.write(out, lines[at : at + 7777])\n"
    )
    events = heard(code, tmp_path / "log", pipe)
    assert events == [{"n": n, "x": "é" * n} for n in range(900)]


def test_the_last_words_of_a_child_whose_grandchild_holds_the_pipe(
    tmp_path: Path, pipe: tuple[int, int]
) -> None:
    code = (
        "import os, sys, time\n"
        "if os.fork() == 0: time.sleep(600)\n"
        'os.write(int(sys.argv[1]), b\'{"event": "last"}\\n\')\n'
    )
    assert heard(code, tmp_path / "log", pipe) == [{"event": "last"}]


@pytest.mark.parametrize(
    ("code", "status", "killer"),
    [
        ("print('bye'); raise SystemExit(3)", 3, ""),
        ("import os; os.kill(os.getpid(), 9)", -9, "SIGKILL"),
        ("import os; os.kill(os.getpid(), 40)", -40, "signal 40"),
    ],
)
def test_how_a_child_ended(code: str, status: int, killer: str, tmp_path: Path) -> None:
    with start(code, tmp_path / "log") as child:
        ending = child.ending()
    assert (ending.status, ending.killer) == (status, killer)
    assert log_text(tmp_path / "log") == ("bye\n" if status == 3 else "")


def test_a_child_that_cannot_be_started_keeps_no_descriptor(tmp_path: Path) -> None:
    reads, writes = os.pipe()
    with (tmp_path / "log").open("wb") as log, pytest.raises(FileNotFoundError):
        Child([str(tmp_path / "absent")], log=log, descriptors=(writes,))
    assert os.read(reads, 1) == b""  # nobody holds the other end
    os.close(reads)


def test_a_child_that_leaves_by_itself_is_not_hurried(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time; from pathlib import Path\n"
        "signal.signal(signal.SIGTERM, lambda *_: Path(sys.argv[1]).write_text('told'))\n"
        "print('up', flush=True); time.sleep(0.3)\n"
    )
    note = tmp_path / "note"
    start(code, tmp_path / "log", note).end(patience=30)
    assert not note.exists()


def test_a_child_is_told_before_it_is_killed(tmp_path: Path, pipe: tuple[int, int]) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(Path(sys.argv[2]).write_text('')))\n"
        "os.write(int(sys.argv[1]), b'{}\\n')\n"
        "while True: signal.pause()\n"
    )
    note = tmp_path / "note"
    reads, writes = pipe
    child = start(code, tmp_path / "log", writes, note, descriptors=(writes,))
    next(child.events(reads))
    child.end()
    assert note.exists()


def test_a_stubborn_daemon_whose_parent_is_gone_is_killed(tmp_path: Path) -> None:
    note = tmp_path / "daemon"
    with start(f"{DAEMON}\nleave_daemon(sys.argv[1])", tmp_path / "log", note) as child:
        assert child.ending().status == 0
        daemon = int(note.read_text())
        assert is_alive(daemon)
        assert os.getsid(daemon) == daemon
    wait_until_gone([daemon])


def test_other_processes_are_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "600"]) as bystander:
        start("import time; time.sleep(600)", tmp_path / "log").end()
        assert bystander.poll() is None
        bystander.kill()


def test_an_interrupt_while_it_ends_kills_at_once(
    tmp_path: Path, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C does not wait for what ignores SIGTERM, and leaves nothing."""
    monkeypatch.setattr("quantkit.backends.child_process.TERM_SECONDS", 600.0)
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getppid(), signal.SIGINT))\n"
        "os.write(int(sys.argv[1]), b'{}\\n')\n"
        "while True: signal.pause()\n"
    )
    reads, writes = pipe
    child = start(code, tmp_path / "log", writes, descriptors=(writes,))
    next(child.events(reads))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            child.end()
    finally:
        signal.signal(signal.SIGINT, before)
    assert child.ending().killer == "SIGKILL"
