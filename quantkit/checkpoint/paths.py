"""Where things lie: what quantkit can make again (its cache), and the bundled YAML files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal


def cache_dir() -> Path:
    """`$QUANTKIT_CACHE`, or the user's cache folder of this system; not created here.

    `~/.cache/quantkit`, where earlier versions kept it, stays in use where it exists.
    """
    chosen = os.environ.get("QUANTKIT_CACHE")
    if chosen:
        return Path(chosen).expanduser().resolve()
    earlier = Path.home() / ".cache" / "quantkit"
    if earlier.is_dir():
        return earlier
    from platformdirs import user_cache_path

    return user_cache_path("quantkit")


def write_whole(file: Path, content: bytes) -> None:
    """Readers see whole files; a cache that cannot be written is no reason to fail."""
    import secrets

    staged = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        staged.write_bytes(content)
        staged.replace(file)
    except OSError:
        staged.unlink(missing_ok=True)


def keep_first(staged: Path, target: Path) -> None:
    """Give a finished directory its name in the cache, unless another process was faster: then its
    own is as good.

    Raises OSError when there is no `target` afterwards.
    """
    try:
        staged.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def new_log(kind: str) -> Path:
    """An empty file `logs/KIND-….log` in the cache; where that cannot be written, a temporary one.

    Raises OSError when neither can.
    """
    import tempfile

    logs = cache_dir() / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{kind}-", suffix=".log", dir=logs)
    except OSError:
        handle, name = tempfile.mkstemp(prefix=f"quantkit-{kind}-", suffix=".log")
    os.close(handle)
    return Path(name)


def data_dir(kind: Literal["recipes", "calibration"]) -> Path:
    """The directory of the bundled YAML files of one kind: beside the package in a source tree,
    inside it in a wheel."""
    package = Path(__file__).parent.parent
    packed = package / f"_{kind}"
    return packed if packed.is_dir() else package.parent / kind
