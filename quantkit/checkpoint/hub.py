"""Models by name: a local directory as it is, or a snapshot from the Hugging Face hub."""

from __future__ import annotations

import errno
import shlex
from pathlib import Path

from quantkit.checkpoint.directory import Checkpoint, TensorInfo
from quantkit.checkpoint.gguf_source import dequantized, gguf_source
from quantkit.checkpoint.headers import check_tiling, tensor_entry
from quantkit.checkpoint.weight_files import refuse_adapter, snapshots
from quantkit.checkpoint.without_weights import from_gguf, open_headers, remote_checkpoint
from quantkit.errors import InputError

FILES = [
    "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt",
    "README.md", "LICENSE*",
]  # fmt: skip
NEVER = [
    "*.bin", "*.pt", "*.pth", "*.msgpack", "*.h5", "*.onnx", "*.gguf", "*.ckpt",
    "consolidated*.safetensors", "original/*", "onnx/*",
]  # fmt: skip


def resolve_model(name: str, *, weights: bool = True, trust_remote_code: bool = False) -> Path:
    """The directory of a model: `name` itself when it exists, else a hub snapshot.

    Of a folder of the hub's cache it is the only snapshot, of a GGUF file its dequantized copy.

    `name` on the hub is NAME or NAME@REVISION. Fetched are config, tokenizer, templates, licence
    and, with `weights`, *.safetensors; never pickled weights, and *.py only with
    `trust_remote_code`. Raises InputError (`hub.*`) for a path that does not exist, and for a
    model that is not found, is gated, or cannot be reached.
    """
    if Path(name).expanduser().exists():
        path = _local(Path(name).expanduser())
        file = gguf_source(path)
        return dequantized(file) if file else path
    repository, _, revision = name.partition("@")
    if _looks_local(repository):
        raise InputError(
            f"The model directory {name} does not exist.",
            hint="check the path; a model on the hub is named ORGANISATION/NAME",
            code="hub.missing_directory",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    allowed = FILES + ["*.safetensors"] * weights + ["*.py"] * trust_remote_code
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=allowed,
                ignore_patterns=NEVER,
            )
        )
    except HFValidationError as error:
        raise InputError(
            f"{name!r} is neither a directory here nor a possible name on the hub.",
            hint="give a model directory, or ORGANISATION/NAME",
            code="hub.bad_name",
        ) from error
    except Exception as error:
        raise hub_error(error, f"The model {name}", _model_hint(repository)) from error


def _local(path: Path) -> Path:
    """A path as it is; of a folder of the hub's cache its only snapshot."""
    cached = snapshots(path)
    if len(cached) > 1:
        listed = " or ".join(shlex.quote(str(entry)) for entry in cached[:3])
        raise InputError(
            f"{path} is a folder of the Hugging Face cache with {len(cached)} snapshots.",
            hint=f"give one of them: {listed}",
            code="hub.several_snapshots",
        )
    return cached[0] if cached else path


def open_for_plan(name: str, *, trust_remote_code: bool = False) -> Checkpoint:
    """A model for planning: of a directory what is there (see `open_headers`); of a GGUF file what
    its header says; of a hub name the config and, by range requests of a few kilobytes, the headers
    of its shards.

    Raises InputError as `resolve_model` and `open_headers`.
    """
    local = Path(name).expanduser().exists()
    file = gguf_source(_local(Path(name).expanduser())) if local else None
    if file is not None:
        return from_gguf(file)
    path = resolve_model(name, weights=False, trust_remote_code=trust_remote_code)
    refuse_adapter(path)
    if local or any(path.glob("*.safetensors")):
        return open_headers(path)
    repository, _, revision = name.partition("@")
    try:
        return remote_checkpoint(path, _remote_headers(repository, revision or None, path))
    except Exception as error:
        raise hub_error(error, f"The model {name}", _model_hint(repository)) from error


def _remote_headers(repository: str, revision: str | None, path: Path) -> dict[str, TensorInfo]:
    """Headers by range requests, which do not tell a file's size: only its end goes unchecked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    try:
        metadata = HfApi().get_safetensors_metadata(repository, revision=revision)
    except (NotASafetensorsRepoError, SafetensorsParsingError, TypeError, AttributeError) as error:
        raise InputError(
            f"The weights of {repository} on the hub are not safetensors that can be read: {error}",
            hint="plan for a model whose weights are intact safetensors",
            code="hub.bad_header",
        ) from error
    found: dict[str, TensorInfo] = {}
    for file, held in metadata.files_metadata.items():
        shard = path / file
        tensors = {
            name: tensor_entry(
                shard,
                name,
                {
                    "dtype": info.dtype,
                    "shape": list(info.shape),
                    "data_offsets": list(info.data_offsets),
                },
                0,
            )
            for name, info in held.tensors.items()
        }
        check_tiling(shard, tensors.values(), 0, None)
        found |= tensors
    return found


def hub_error(error: Exception, what: str, offline_hint: str) -> InputError:
    """The user's view of a failed request to the hub; other exceptions are raised again.

    `what` begins the sentence ("The model x/y"); `offline_hint` is what to do without the hub.
    """
    import httpx
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return InputError(
            f"{what} is gated on the hub, and this account has no access to it.",
            hint="accept its terms on its hub page, then set HF_TOKEN (or run: hf auth login)",
            code="hub.gated",
        )
    if isinstance(error, RevisionNotFoundError):
        return InputError(
            f"{what} exists on the hub, but not at this revision.",
            hint="name a branch, tag or commit of its repository",
            code="hub.no_revision",
        )
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"{what} is neither here nor on the hub (or it is private).",
            hint="check the spelling; for a private one set HF_TOKEN (or run: hf auth login)",
            code="hub.not_found",
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return InputError(
            f"{what} does not fit on this disk: {error}.",
            hint="free space, or set HF_HOME to a directory on a larger disk",
            code="hub.no_space",
        )
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return InputError(
            f"{what} was not sent: the hub answered {error.response.status_code}.",
            hint=f"try again later; {offline_hint}",
            code="hub.refused",
        )
    if isinstance(error, OfflineModeIsEnabled) or _offline_mode():
        return InputError(
            f"{what} is not on this machine, and HF_HUB_OFFLINE forbids fetching it.",
            hint=f"unset HF_HUB_OFFLINE; {offline_hint}",
            code="hub.offline",
        )
    if isinstance(error, httpx.HTTPError | OSError):
        return InputError(
            f"{what} is not on this machine, and the hub cannot be reached: {_cause(error)}.",
            hint=offline_hint,
            code="hub.unreachable",
        )
    raise error


def _model_hint(repository: str) -> str:
    return (
        f"where there is a network: hf download {repository} --local-dir DIR; "
        "then give DIR instead of the name"
    )


def _looks_local(name: str) -> bool:
    parts = name.split("/")
    return (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or len(parts) > 2
        or not parts[-1]
        or (len(parts) == 2 and Path(parts[0]).is_dir())
    )


def _offline_mode() -> bool:
    from huggingface_hub.constants import is_offline_mode

    return is_offline_mode()


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    first = str(error).strip().splitlines()
    return first[0].rstrip(".") if first else type(error).__name__
