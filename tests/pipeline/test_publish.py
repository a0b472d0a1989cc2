"""The output directory: nothing half-made, nothing of the user's overwritten."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.errors import InputError
from quantkit.pipeline.publish import check_space, staged

HOLD = """
import sys, time
from pathlib import Path
from quantkit.pipeline.publish import staged
with staged(Path(sys.argv[1]), overwrite=False) as partial:
    (partial / "half").write_text("half")
    print("holding", flush=True)
    time.sleep(60)
"""


def test_a_good_end_publishes_under_the_name(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with staged(target, overwrite=False) as partial:
        (partial / "a").write_text("new")
        assert not target.exists()
    assert (target / "a").read_text() == "new"
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with staged(tmp_path / "out", overwrite=False) as partial:
            (partial / "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_survives_a_failed_overwrite(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    (target / "quantkit.json").write_text("{}")
    with pytest.raises(InputError, match="exists"), staged(target, overwrite=False):
        pass
    with pytest.raises(ValueError, match="broken"), staged(target, overwrite=True):
        raise ValueError("broken")
    assert (target / "old").read_text() == "old"
    with staged(target, overwrite=True) as partial:
        (partial / "new").write_text("new")
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def holding(target: Path) -> subprocess.Popen[str]:
    """A real other process that holds the output."""
    run = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(target)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert run.stdout is not None
    assert run.stdout.readline() == "holding\n"
    return run


def test_a_second_run_is_told_and_a_killed_one_is_taken_over(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with holding(target) as first:
        with (
            pytest.raises(InputError, match="Another quantkit run"),
            staged(target, overwrite=True),
        ):
            pass
        first.kill()
    assert (tmp_path / "out.partial" / "half").exists()
    with staged(target, overwrite=False) as partial:
        assert list(partial.iterdir()) == []
        (partial / "a").write_text("new")
    assert [p.name for p in target.iterdir()] == ["a"]


def test_an_interrupted_run_leaves_no_partial(tmp_path: Path) -> None:
    with holding(tmp_path / "out") as run:
        run.send_signal(signal.SIGINT)
        run.wait(10)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="not a directory"),
        staged(tmp_path / "file" / "out", overwrite=False),
    ):
        pass


def test_space_is_checked_with_the_numbers(tmp_path: Path) -> None:
    stat = os.statvfs(tmp_path)
    with pytest.raises(InputError, match="GB free"):
        check_space(tmp_path / "out", stat.f_bavail * stat.f_frsize + 10**12, "the checkpoint")


@pytest.mark.parametrize("resumable", [False, True])
def test_a_disk_that_becomes_full_at_the_end_is_told(resumable: bool, tmp_path: Path) -> None:
    """/dev/full answers every write as a full disk does."""

    def run() -> None:
        with staged(tmp_path / "out", overwrite=False, resumable=resumable) as partial:
            (partial / "weights").write_text("done")
            Path("/dev/full").write_text("the last file")

    with pytest.raises(InputError, match="No space is left") as caught:
        run()
    assert caught.value.code == "output.no_space"
    assert ("--resume" in caught.value.hint) == resumable
    assert (tmp_path / "out.partial" / "weights").exists() == resumable
