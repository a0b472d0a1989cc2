"""A checkpoint to the Hugging Face Hub: only what verifies now and whose gates held.

Large files go first, one by one, and the Hub keeps what it has of them; one commit then makes the
repository whole. A push that was stopped sends, when repeated, only what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.backends.process.job import Reporter
from quantkit.checkpoint.hub import hub_error
from quantkit.checkpoint.provenance import CARD, NOT_SEALED, PROVENANCE, Provenance, read
from quantkit.errors import CheckError, InputError, command
from quantkit.verification import verify

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

_WEIGHTS = (".safetensors", ".gguf")
SHIPPED = "## Shipped without proof"
"""The section of the card that says why a push was forced."""


@dataclass(frozen=True)
class Pushed:
    """Where it is now, and which commit holds it; `forced` is what spoke against it."""

    repo: str
    url: str
    commit: str
    private: bool
    files: tuple[str, ...]
    forced: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The document of `quantkit push --json`."""
        return {
            "schema_version": 1,
            "repo": self.repo,
            "url": self.url,
            "commit": self.commit,
            "private": self.private,
            "files": list(self.files),
            "forced": list(self.forced),
        }


def push(directory: Path, repo: str, ui: Reporter, *, public: bool, force: str = "") -> Pushed:
    """Send a checkpoint of quantkit to the model repository `repo`, made where there is none.

    `force` is the reason for sending what is not proven, which the card then states.

    Raises InputError for a directory that quantkit did not make, a name that is none, a public
    repository that was not asked for, and what the Hub refuses; CheckError for a checkpoint that
    does not verify, was not validated or failed a gate, unless forced.
    """
    check_name(repo)
    provenance = read(directory)
    if provenance is None:
        raise InputError(
            f"{directory} has no {PROVENANCE}: nothing says how it was made.",
            hint="quantkit quantize MODEL --method rtn_w8a16 --out DIR  # makes one that says it",
            code="push.no_provenance",
        )
    ui.stage("verify")
    against = _faults(directory, provenance)
    if against and not force:
        raise CheckError(
            f"{directory} is not pushed: {'; '.join(against)}.",
            hint=f"{command('validate', directory)}; or --force with the reason, which the card "
            "then states",
            code="push.not_proven",
        )
    card = (directory / CARD).read_text(encoding="utf-8") if (directory / CARD).is_file() else ""
    if against:
        card = _with_reason(card, force, against)
    from huggingface_hub import CommitOperationAdd, HfApi

    names = _files(directory, provenance)
    operations = [
        CommitOperationAdd(name, card.encode() if name == CARD else str(directory / name))
        for name in names
    ]
    try:
        url = prepare(HfApi(), repo, public=public)
        commit = _send(HfApi(), repo, operations, provenance, directory, ui)
    except InputError:
        raise
    except Exception as error:
        raise hub_error(_cause(error), f"The repository {repo}", _HINT) from error
    return Pushed(repo, url, commit, not public, tuple(names), tuple(against))


def _cause(error: Exception) -> Exception:
    """Why an upload failed: the Hub's library wraps it in a RuntimeError."""
    inner = error.__cause__
    return inner if isinstance(error, RuntimeError) and isinstance(inner, Exception) else error


_HINT = "set HF_TOKEN to a token that may write (or run: hf auth login), then push again"


def check_name(repo: str) -> None:
    """InputError for what is no name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(
            f"{repo!r} is no name of a repository on the hub.",
            hint="ORGANISATION/NAME",
            code="push.bad_name",
        ) from error


def prepare(api: HfApi, repo: str, *, public: bool) -> str:
    """The repository, made where there is none; its address. Raises InputError for one that is
    public where that was not asked for, and what the Hub's library raises."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        there = api.model_info(repo)
    except RepositoryNotFoundError:
        return str(api.create_repo(repo, private=not public, exist_ok=True))
    if not there.private and not public:
        raise InputError(
            f"{repo} exists and is public.",
            hint="--public, or another name: a push is private unless told otherwise",
            code="push.public",
        )
    return f"{api.endpoint}/{repo}"


def _faults(directory: Path, provenance: Provenance) -> list[str]:
    """What speaks against shipping it."""
    report = verify(directory)
    found = []
    if not report.ok:
        more = f" and {len(report.errors) - 1} more" if len(report.errors) > 1 else ""
        found.append(f"it does not verify ({report.errors[0].message.removesuffix('.')}{more})")
    measured = provenance.results.validation
    if measured is None:
        found.append("it was not validated")
    elif not measured.get("ok"):
        bad = [gate["metric"] for gate in measured.get("gates", ()) if gate["verdict"] == "fail"]
        found.append(f"gates failed ({', '.join(bad)})" if bad else "its validation did not pass")
    return found


def _files(directory: Path, provenance: Provenance) -> list[str]:
    """Weights, what was sealed with them, quantkit.json and the card; nothing that lies beside."""
    known = {*(provenance.files or ()), *NOT_SEALED, PROVENANCE, CARD}
    return sorted(
        path.name
        for path in directory.iterdir()
        if path.is_file() and (path.name in known or path.suffix in _WEIGHTS)
    )


def _send(
    api: HfApi,
    repo: str,
    operations: Sequence[CommitOperationAdd],
    provenance: Provenance,
    directory: Path,
    ui: Reporter,
) -> str:
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    sizes = [(directory / one.path_in_repo).stat().st_size for one in operations]
    ui.stage("push", sum(sizes), "bytes")
    quiet, sent = are_progress_bars_disabled(), 0
    disable_progress_bars()
    try:
        for operation, size in zip(operations, sizes, strict=True):
            api.preupload_lfs_files(repo, [operation])
            sent += size
            ui.advance(sent)
        title = f"{provenance.method or 'checkpoint'} by quantkit {provenance.quantkit_version}"
        done = api.create_commit(repo, operations, commit_message=title)
    finally:
        if not quiet:
            enable_progress_bars()
    return str(done.oid)


def _with_reason(card: str, reason: str, against: Sequence[str]) -> str:
    """The card with the reason of a forced push, in place of that of an earlier one."""
    before = card.partition(f"\n{SHIPPED}\n")[0].rstrip()
    told = " ".join(reason.split())
    return f"{before}\n\n{SHIPPED}\n\n{'; '.join(against)}. Pushed all the same: {told}\n"
