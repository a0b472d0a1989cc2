"""Processes that try to stay behind, and whether any does."""

from __future__ import annotations

import time
from pathlib import Path

DAEMON = """
import os, subprocess, sys
from pathlib import Path

def leave_daemon(note):
    "A shell that ignores SIGTERM, in a session of its own; its parent is gone when this returns."
    stubborn = 'trap "" TERM; echo $$ > "$0.new"; mv "$0.new" "$0"; sleep 600 & wait; wait'
    start = ["import subprocess, sys", "subprocess.Popen(sys.argv[1:], start_new_session=True)"]
    command = [sys.executable, "-I", "-c", "; ".join(start), "sh", "-c", stubborn, note]
    subprocess.run(command, check=True)
    while not Path(note).is_file():
        pass
"""
"""Source of `leave_daemon(note)`: a grandchild that its environment alone betrays."""


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    """Assert that none of the processes stays."""
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [pid for pid in pids if is_alive(pid)] == []
