"""Opening the sources of a mixture: an installed package, Python's own texts, files, the hub."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sysconfig
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate, count
from pathlib import Path

from quantkit.calibration.config import (
    FileSource,
    HubSource,
    PackageSource,
    PicturesSource,
    Source,
    StdlibSource,
)
from quantkit.calibration.documents import (
    Corpus,
    Document,
    Dropped,
    from_row,
    passages,
    shuffled,
)
from quantkit.calibration.hubdata import open_hub
from quantkit.calibration.picture_files import content_digest
from quantkit.calibration.pictures import VERSION, draw
from quantkit.calibration.rows import read_rows
from quantkit.errors import InputError


def open_source(source: Source) -> Corpus:
    """The corpus of a source.

    Raises InputError when the package, the file or the data set is missing or holds nothing.
    """
    if isinstance(source, HubSource):
        return open_hub(source)
    if isinstance(source, FileSource):
        return _open_files(source)
    if isinstance(source, PicturesSource):
        return Corpus(f"drawn {VERSION}", _drawn)
    if isinstance(source, StdlibSource):
        texts = _topics() if source.part == "topics" else _stdlib_source()
    else:
        texts = _package_files(source)
    return _open_texts(texts, source)


def _drawn(seed: int) -> Iterator[Document | Dropped]:
    for index in count():
        picture = draw(seed, index)
        asked = [{"type": "image"}, {"type": "text", "text": picture.question}]
        answered = [{"type": "text", "text": picture.answer}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        yield Document(f"picture {index}", turns, pictures=(picture.pixels,))


def _open_texts(texts: dict[str, Path | str], source: PackageSource | StdlibSource) -> Corpus:
    chosen = {name: text for name, text in texts.items() if re.search(source.match, name)}
    if not chosen:
        matching = f" match {source.match!r}" if source.match else ""
        raise _empty(source, f"of its {len(texts)} texts none{matching}")
    contents = {name: _text(text) for name, text in sorted(chosen.items())}
    total = hashlib.sha256()
    for name, text in contents.items():
        total.update(f"{name}\0{len(text)}\0{text}".encode())

    def read(seed: int) -> Iterator[Document | Dropped]:
        parts = [
            (Path(name).stem, part)
            for name, text in contents.items()
            for part in passages(text, source.passage_chars)
        ]
        for index in shuffled(len(parts), seed):
            name, part = parts[index]
            if source.prompt is None:
                yield Document(name, part)
            else:
                yield Document(
                    name,
                    [
                        {"role": "user", "content": source.prompt.replace("{name}", name)},
                        {"role": "assistant", "content": part},
                    ],
                )

    return Corpus(total.hexdigest(), read)


def _text(text: Path | str) -> str:
    if isinstance(text, str):
        return text
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{text} cannot be read as UTF-8 text: {error}.",
            hint="convert the file, or leave it out of the calibration",
            code="calibration.unreadable_data",
        ) from error


def _package_files(source: PackageSource) -> dict[str, Path | str]:
    try:
        spec = importlib.util.find_spec(source.package)
    except ValueError:  # a module of that name runs without a spec, as __main__ does
        spec = None
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise InputError(
            f"The calibration source {source.package!r} is no installed Python package.",
            hint=f"pip install {source.package}",
            code="calibration.missing_package",
        )
    return {
        path.name: path
        for folder in folders
        for path in sorted(Path(folder).glob(source.files))
        if path.is_file()
    }


def _topics() -> dict[str, Path | str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return {str(name): str(text) for name, text in topics.items()}


def _stdlib_source() -> dict[str, Path | str]:
    return {path.name: path for path in Path(sysconfig.get_path("stdlib")).glob("*.py")}


def files_of(source: FileSource) -> list[Path]:
    """The files that a source names. Raises InputError when there is none."""
    path = Path(source.path)
    paths = sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
    paths = [file for file in paths if file.is_file()]
    if not paths:
        found = "is a directory, not a file" if path.is_dir() else "does not exist"
        raise InputError(
            f"The calibration source {path} {found}.",
            hint="paths are relative to the calibration file; correct the source's path",
            code="calibration.missing",
        )
    return paths


def _open_files(source: FileSource) -> Corpus:
    paths = files_of(source)
    total = hashlib.sha256()
    for file in paths:
        with file.open("rb") as handle:
            total.update(hashlib.file_digest(handle, "sha256").digest())
    if source.image_field:
        for file in paths:
            rows = read_rows(file, source.fields, source.more_fields)
            total.update(content_digest(rows, source.image_field, file.parent))
    reader = _texts_reader if paths[0].suffix.lower() == ".txt" else _rows_reader
    return Corpus(total.hexdigest(), reader(paths, source))


Reader = Callable[[int], Iterator[Document | Dropped]]


def _texts_reader(paths: list[Path], source: FileSource) -> Reader:
    def read(seed: int) -> Iterator[Document | Dropped]:
        parts = [
            (file.stem, part)
            for file in paths
            for part in passages(_text(file), source.passage_chars)
        ]
        for index in shuffled(len(parts), seed):
            yield Document(*parts[index])

    return read


def _rows_reader(paths: list[Path], source: FileSource) -> Reader:
    def read(seed: int) -> Iterator[Document | Dropped]:
        tables = [read_rows(file, source.fields, source.more_fields) for file in paths]
        ends = list(accumulate(len(rows) for rows in tables))
        for index in shuffled(ends[-1], seed):
            table = bisect_right(ends, index)
            row = index - (ends[table - 1] if table else 0)
            name = f"{paths[table].name} row {row + 1}"
            yield from from_row(tables[table][row], name, source, paths[table].parent)

    return read


def _empty(source: Source, what: str) -> InputError:
    return InputError(
        f"The calibration source {source.label} is empty: {what}.",
        hint="correct the source's files and match, or remove the source",
        code="calibration.empty_source",
    )
