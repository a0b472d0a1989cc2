"""Data sets of the Hugging Face hub, streamed row by row with `datasets`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from quantkit.calibration.config import HubSource
from quantkit.calibration.documents import Corpus, Document, Dropped, from_row
from quantkit.calibration.rows import INSTALL, check_fields
from quantkit.checkpoint.hub import hub_error
from quantkit.errors import InputError

OFFLINE = (
    "without a network use --calibration default, or a file (--calibration FILE.jsonl) that was "
    "exported where there is one"
)
SHUFFLE_BUFFER = 1000
"""Rows that the stream holds to draw from: more mixes better and downloads more."""


def open_hub(source: HubSource) -> Corpus:
    """The corpus of a data set; its digest is the commit, so that a pinned one needs no network.

    Raises InputError when `datasets` is missing or the hub does not give the data set.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", source.revision):
        commit = _commit(source)
    else:
        commit = source.revision

    def read(seed: int) -> Iterator[Document | Dropped]:
        _commit(source)  # fails at once where streaming would retry for half a minute
        return _stream(source, commit, seed)

    return Corpus(commit, read)


def _commit(source: HubSource) -> str:
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(source.name, revision=source.revision, timeout=10)
    except Exception as error:
        raise hub_error(error, f"The data set {source.name}", OFFLINE) from error
    assert info.sha is not None
    return info.sha


def _stream(source: HubSource, commit: str, seed: int) -> Iterator[Document | Dropped]:
    import httpx

    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"The calibration source {source.name} needs the library `datasets`.",
            hint=INSTALL,
            code="calibration.needs_datasets",
        ) from error
    try:
        stream = datasets.load_dataset(
            source.name, source.config, split=source.split, revision=commit, streaming=True
        ).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        for number, row in enumerate(stream):
            if number == 0:
                check_fields(source.name, source.fields, list(row))
            yield from from_row(row, f"{source.name} row {number + 1} of the stream", source)
    except InputError:
        raise
    except (httpx.HTTPError, ConnectionError) as error:
        raise hub_error(error, f"The data set {source.name}", OFFLINE) from error
    except Exception as error:  # the library raises ValueError, OSError, pyarrow's and its own
        raise InputError(
            f"The data set {source.name} (config {source.config}, split {source.split}) cannot be "
            f"read: {' '.join(str(error).split())}",
            hint="set config, split and revision of the source to what the data set has",
            code="calibration.bad_dataset",
        ) from error
