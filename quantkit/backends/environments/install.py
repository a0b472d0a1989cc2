"""What fills a managed environment: uv where it is installed, pip otherwise.

torch always comes by pip: asked for an exact version, pip finds the build that an index keeps for
this machine, as one for CPUs, while uv looks into the first index alone.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

_ORIGINS = {"index-url", "extra-index-url", "find-links", "no-index"}
"""Settings of pip that say where packages come from. uv does not read them."""


def pip_install(python: Path, wheels: Path | None) -> list[str]:
    """The command to which requirements are added; from the folder `wheels` alone where given."""
    command = [str(python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    return [*command, *_source(wheels)]


def uv_install(python: Path, wheels: Path | None) -> list[str] | None:
    """The same of uv, or None where it is not installed or would ask elsewhere than pip does."""
    beside = str(Path(sys.executable).parent)
    uv = shutil.which("uv") or shutil.which("uv", path=beside)
    if uv is None or (wheels is None and _has_origins(python)):
        return None
    # Copies: with links, a file damaged here would be damaged in uv's cache and come back.
    return [uv, "pip", "install", "--python", str(python), "--link-mode", "copy", *_source(wheels)]


def _source(wheels: Path | None) -> list[str]:
    return ["--no-index", "--find-links", str(wheels.resolve())] if wheels else []


def _has_origins(python: Path) -> bool:
    """Whether pip's settings (files and environment) name an index or a folder of packages."""
    listed = subprocess.run(
        [str(python), "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    names = (line.partition("=")[0] for line in listed.stdout.splitlines())
    return listed.returncode != 0 or any(name.rpartition(".")[2] in _ORIGINS for name in names)
