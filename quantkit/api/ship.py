"""The function that ships: push."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.api.progress import ProgressCallback, Told

if TYPE_CHECKING:
    from quantkit.pipeline.push import Pushed


def push(
    directory: str | Path,
    repo: str,
    *,
    public: bool = False,
    force: str = "",
    progress: ProgressCallback | None = None,
) -> Pushed:
    """Send a checkpoint to the model repository `repo` of the Hugging Face Hub.

    It must verify now, and its gates must have held when `validate` measured it; `force` is the
    reason for sending it all the same, which its card then states. What the Hub has already is not
    sent again.

    Raises CheckError for what is not proven, and InputError as `quantkit.pipeline.push`.
    """
    from quantkit.pipeline.push import push as run

    return run(Path(directory), repo, Told(progress), public=public, force=force)
