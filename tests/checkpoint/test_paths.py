"""Where the cache lies: what the user says, where it was, or where this system keeps caches."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.checkpoint.paths import cache_dir


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("QUANTKIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return tmp_path


def test_cache_lies_in_the_users_cache_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_dir() == home / ".cache" / "quantkit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "scratch"))
    assert cache_dir() == home / "scratch" / "quantkit"


def test_an_earlier_cache_is_still_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "scratch"))
    earlier = home / ".cache" / "quantkit"
    earlier.mkdir(parents=True)
    assert cache_dir() == earlier


def test_what_the_user_says_wins(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".cache" / "quantkit").mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "scratch"))
    monkeypatch.setenv("QUANTKIT_CACHE", "~/mine")
    assert cache_dir() == home / "mine"
    monkeypatch.setenv("QUANTKIT_CACHE", "")
    assert cache_dir() == home / ".cache" / "quantkit"
