"""Managed environments: made from wheels without an index, once for two runs, checked, removed."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from quantkit.backends.environments.install import uv_install
from quantkit.backends.environments.managed import (
    Spec,
    check,
    create,
    ready,
    remove,
    spec_named,
    specs,
)
from quantkit.errors import BackendError, InputError
from tests.support.cli import quantkit, refused

pytestmark = pytest.mark.broad

ROOT = Path(__file__).parents[2]
TINY = Spec("tiny", "tiny_library", "tests", ("tiny-library==1.0",))
SCRIPT = "tiny-hello"


def wheel(
    folder: Path, version: str = "1.0", code: str = "VALUE = 1\n", name: str = "tiny_library"
) -> Path:
    """A real wheel of one module and one script, made by hand (PEP 427)."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    project = name.replace("_", "-")
    files = {
        f"{name}.py": f"{code}\ndef main():\n    print('hello')\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[console_scripts]\n{SCRIPT} = {name}:main\n",
    }
    record = ""
    for file, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        record += f"{file},sha256={digest.decode()},{len(text)}\n"
    files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_two_runs_at_once_make_one_that_works_and_can_be_removed(tmp_path: Path) -> None:
    wheel(tmp_path / "wheels")
    said: list[str] = []
    assert check(TINY) == "it is not made yet"
    runs = [
        threading.Thread(target=create, args=(TINY, tmp_path / "wheels", said.append))
        for _ in range(2)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert said.count("making tiny (1 packages)") == 1
    assert "another run is making tiny; waiting for it" in said
    assert "tiny is ready" in said
    assert check(TINY) is None
    assert [path.name for path in TINY.path.parent.glob("tiny-*")] == [TINY.path.name]
    script = subprocess.run([TINY.path / "bin" / SCRIPT], capture_output=True, text=True)
    assert script.stdout == "hello\n"
    assert remove(TINY, said.append) == [TINY.path]
    assert not TINY.path.exists()
    assert check(TINY) == "it is not made yet"


def test_a_broken_environment_is_told_and_made_again(tmp_path: Path) -> None:
    wheel(tmp_path / "wheels")
    create(TINY, tmp_path / "wheels", print)
    module = next(TINY.path.rglob("tiny_library.py"))
    module.write_text("import does_not_exist\n")
    assert "does_not_exist" in str(check(TINY))
    create(TINY, tmp_path / "wheels", print)
    assert check(TINY) is None


def test_a_library_that_cannot_be_imported_leaves_no_environment(tmp_path: Path) -> None:
    wheel(tmp_path / "wheels", code="raise RuntimeError('no driver')")
    with pytest.raises(BackendError, match="no driver") as caught:
        create(TINY, tmp_path / "wheels", print)
    assert caught.value.code == "environment.broken"
    assert not list(TINY.path.parent.glob("tiny-*"))


def test_wheels_that_lack_a_pin_are_told(tmp_path: Path) -> None:
    wheel(tmp_path / "wheels", "2.0")
    with pytest.raises(BackendError, match=r"tiny-library==1\.0") as caught:
        create(TINY, tmp_path / "wheels", print)
    assert caught.value.code == "environment.create_failed"
    with pytest.raises(InputError, match="is not a directory"):
        create(TINY, tmp_path / "nowhere", print)
    assert not list(TINY.path.parent.glob("tiny-*"))


@pytest.fixture
def without_uv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(sys, "executable", str(python_alone(tmp_path)))


def python_alone(folder: Path) -> Path:
    """This interpreter in a folder of its own, where no uv lies beside it."""
    link = folder / "alone" / "bin" / "python"
    link.parent.mkdir(parents=True)
    link.symlink_to(Path(sys.executable).resolve())
    return link


def installers(spec: Spec) -> dict[str, str]:
    """What each package of the environment says that installed it (PEP 627)."""
    return {
        file.parent.name: file.read_text().strip()
        for file in spec.path.rglob("*.dist-info/INSTALLER")
        if not file.parent.name.startswith(("pip-", "setuptools-"))
    }


def test_uv_fills_an_environment_where_it_is_installed(tmp_path: Path) -> None:
    needs_uv()
    wheel(tmp_path / "wheels")
    create(TINY, tmp_path / "wheels", print)
    assert installers(TINY) == {"tiny_library-1.0.dist-info": "uv"}
    script = subprocess.run([TINY.path / "bin" / SCRIPT], capture_output=True, text=True)
    assert script.stdout == "hello\n"


def test_torch_comes_by_pip_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_uv()
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    wheels = tmp_path / "wheels"
    wheel(wheels)
    for build in ("2.13.0", "2.13.0+cpu"):
        wheel(wheels, build, name="torch")
    spec = Spec("tiny", "torch", "tests", ("torch==2.13.0", "tiny-library==1.0"))
    create(spec, wheels, print)
    assert installers(spec) == {
        "torch-2.13.0+cpu.dist-info": "pip", "tiny_library-1.0.dist-info": "uv",
    }  # fmt: skip


def test_pip_does_what_uv_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_uv()
    wheel(tmp_path / "wheels")
    monkeypatch.setenv("UV_CONFIG_FILE", str(tmp_path / "nowhere"))
    said: list[str] = []
    create(TINY, tmp_path / "wheels", said.append)
    assert "pip tries next" in said[1]
    assert installers(TINY) == {"tiny_library-1.0.dist-info": "pip"}


@pytest.mark.usefixtures("without_uv")
def test_pip_fills_an_environment_without_uv(tmp_path: Path) -> None:
    wheel(tmp_path / "wheels")
    create(TINY, tmp_path / "wheels", print)
    assert installers(TINY) == {"tiny_library-1.0.dist-info": "pip"}


def test_uv_asks_nowhere_else_than_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_uv()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    python = Path(sys.executable)
    assert uv_install(python, None) is not None
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert uv_install(python, None) is None
    assert uv_install(python, tmp_path) is not None


def needs_uv() -> None:
    if uv_install(Path(sys.executable), Path()) is None:
        pytest.skip("uv is not installed")


def test_the_key_follows_what_is_held() -> None:
    other = Spec("tiny", "tiny_library", "tests", ("tiny-library==1.1",))
    assert other.key != TINY.key
    assert other.path != TINY.path
    for spec in specs().values():
        assert all("==" in pin for pin in spec.pins)
        assert spec.path.name == f"{spec.name}-{spec.key}"


def test_the_command_line_lists_checks_and_refuses() -> None:
    listed = quantkit("env", "list", "--json").document["environments"]
    assert [row["name"] for row in listed] == sorted(specs())
    assert all(row["python"] is None for row in listed)
    run = quantkit("env", "check", "msmodelslim")
    assert run.code == 3
    assert "not made yet" in run.out
    refused(quantkit("env", "create", "nosuch"), 1, "msmodelslim")
    pins = ROOT / "quantkit" / "backends" / "environments" / "msmodelslim.txt"
    refused(
        quantkit("env", "create", "msmodelslim", "--wheels", "nowhere"), 1,
        f"hint: pip download --dest nowhere --requirement {pins}",
    )  # fmt: skip
    assert quantkit("env", "remove", "msmodelslim", "--json").document["removed"] == []
    assert ready("msmodelslim") is None
    assert spec_named("msmodelslim").library == "msmodelslim"
