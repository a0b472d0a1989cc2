"""The built wheel carries recipes and calibrations, and works from an empty folder."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.cli import QUICK

pytestmark = pytest.mark.library

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target),
         str(ROOT)],
        check=True, capture_output=True,
    )  # fmt: skip
    return next(target.glob("*.whl"))


def test_the_wheel_carries_its_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for kind in ("recipes", "calibration"):
        for file in (ROOT / kind).glob("*.yaml"):
            assert f"quantkit/_{kind}/{file.name}" in names
    assert "quantkit/py.typed" in names


def test_an_installed_wheel_quantizes_from_an_empty_folder(
    wheel: Path, small_model: Path, tmp_path: Path
) -> None:
    """A fresh environment with quantkit from the wheel; its dependencies are the ones at hand."""
    home = tmp_path / "env"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet",
         "--disable-pip-version-check", "--no-deps", str(wheel)],
        check=True, capture_output=True,
    )  # fmt: skip
    site = next((home / "lib").glob("python*")) / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    where = subprocess.run(
        [str(python), "-c", "import quantkit; print(quantkit.__file__)"],
        capture_output=True, text=True, check=True, cwd=empty,
    )  # fmt: skip
    assert where.stdout.startswith(str(site))
    done = subprocess.run(
        [str(home / "bin" / "quantkit"), "quantize", str(small_model), "--method", "modelopt_fp8",
         "--out", "out", *QUICK],
        capture_output=True, text=True, cwd=empty, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (empty / "out" / "quantkit.json").is_file()
