"""Which interpreter runs a backend, and the refusals that come before any work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.backends.environments import find_interpreter, library_versions
from quantkit.backends.registry import MODELOPT
from quantkit.errors import BackendError, InputError


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with nothing but the standard library."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return folder / "bin" / "python"


def test_the_current_interpreter_is_taken_without_importing_the_library() -> None:
    code = (
        "import sys; from quantkit.backends.environments import find_interpreter\n"
        "from quantkit.backends.registry import MODELOPT\n"
        "print(find_interpreter(MODELOPT), [m for m in ('modelopt', 'torch') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"{sys.executable} []"


def test_a_named_interpreter_must_have_the_library(bare_python: Path) -> None:
    with pytest.raises(BackendError) as caught:
        find_interpreter(MODELOPT, str(bare_python))
    assert caught.value.code == "environment.missing_library"
    assert str(bare_python) in caught.value.message
    assert caught.value.hint == f"{bare_python} -m pip install nvidia-modelopt"
    package = next(bare_python.parent.parent.glob("lib/python3*/site-packages")) / "modelopt"
    package.mkdir()
    with pytest.raises(BackendError):  # a folder of that name is no library
        find_interpreter(MODELOPT, str(bare_python))
    (package / "__init__.py").write_text("")
    assert find_interpreter(MODELOPT, str(bare_python)) == bare_python


def test_a_name_that_is_no_interpreter_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("not a program")
    for file, permissions in ((tmp_path / "absent", None), (broken, 0o644), (broken, 0o755)):
        if permissions:
            file.chmod(permissions)
        with pytest.raises(InputError) as caught:
            find_interpreter(MODELOPT, str(file))
        assert caught.value.code == "environment.no_interpreter"


def test_versions_of_this_and_of_another_interpreter(bare_python: Path) -> None:
    here = library_versions(Path(sys.executable), ["torch", "no-such-distribution"])
    assert set(here) == {"torch"}
    assert library_versions(bare_python, ["torch"]) == {}
