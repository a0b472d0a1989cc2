"""A calibration as data: which sources, how much of each, how they become samples."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Source(_Strict):
    """What every source has.

    `weight` is its share of the samples, in proportion to the other sources' weights; documents
    of fewer than `min_tokens` tokens are left out (and counted); text longer than
    `passage_chars` characters is cut at line or word ends into passages of at most that length,
    so that samples come from all over a long document. `without_template` says what a
    conversation becomes when the model has no chat template.
    """

    weight: float = Field(1.0, gt=0)
    min_tokens: int = Field(1, ge=1)
    passage_chars: int | None = Field(None, ge=200)
    without_template: Literal["error", "plain"] = "error"


class _NamedTexts(_Source):
    """Texts with a name. `prompt` makes each a conversation: the user says the prompt, in which
    {name} is the text's name, and the assistant answers with the text."""

    match: str = ""
    prompt: str | None = None

    @field_validator("match")
    @classmethod
    def _pattern(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value

    @field_validator("prompt")
    @classmethod
    def _only_name(cls, value: str | None) -> str | None:
        if value is not None and re.search(r"[{}]", value.replace("{name}", "")):
            raise ValueError("only {name} may stand in braces")
        return value


class PackageSource(_NamedTexts):
    """Text files of an installed Python package whose file names contain a match of `match`."""

    type: Literal["package"]
    package: str = Field(pattern=r"^[A-Za-z_]\w*$")
    files: str

    @field_validator("files")
    @classmethod
    def _inside(cls, value: str) -> str:
        path = PurePosixPath(value)
        if not path.parts or path.is_absolute() or ".." in path.parts:
            raise ValueError("must be a file name pattern inside the package, such as data/*.txt")
        return value

    @property
    def label(self) -> str:
        return f"package {self.package}"


class StdlibSource(_NamedTexts):
    """Text that comes with Python: `topics` are the language reference's sections
    (pydoc_data.topics), `source` the top-level modules' source code."""

    type: Literal["stdlib"]
    part: Literal["topics", "source"]

    @property
    def label(self) -> str:
        return f"standard library {self.part}"


class PicturesSource(_Source):
    """Pictures that quantkit draws, each with a question and an answer that says what is in it:
    shapes to count, digits, small tables. For models that take pictures."""

    type: Literal["pictures"]

    @property
    def label(self) -> str:
        return "drawn pictures"


class _Rows(_Source):
    """Rows with a text in `text_field` (default: text), with a conversation in
    `messages_field`: a list of {role, content}, or with one turn each of user and assistant in
    `turn_fields`: the last is the answer, those before it are what was asked (of these only the
    first must be there). What `system_field` holds of a row comes first in its conversation; the
    pictures of `image_field` (paths beside the data file, or bytes) come before the first words of
    the user."""

    text_field: str | None = None
    messages_field: str | None = None
    turn_fields: list[str] | None = Field(None, min_length=2)
    system_field: str | None = None
    image_field: str | None = None

    @model_validator(mode="after")
    def _one_field(self) -> _Rows:
        given = [self.text_field, self.messages_field, self.turn_fields]
        if sum(map(bool, given)) > 1:
            raise ValueError("give one of text_field, messages_field and turn_fields")
        if self.passage_chars and not self.text_field and any(given):
            raise ValueError("passage_chars cuts texts; conversations stay whole")
        if self.system_field and not (self.messages_field or self.turn_fields):
            raise ValueError("system_field goes with messages_field or turn_fields")
        if self.image_field and not (self.messages_field or self.turn_fields):
            raise ValueError("image_field goes with messages_field or turn_fields")
        return self

    @property
    def fields(self) -> tuple[str, ...]:
        """What a row must have."""
        if self.turn_fields:
            return (self.turn_fields[0], self.turn_fields[-1])
        return (self.messages_field or self.text_field or "text",)

    @property
    def more_fields(self) -> tuple[str, ...]:
        """What is read of a row that has it."""
        between = tuple(self.turn_fields[1:-1]) if self.turn_fields else ()
        tools = ("tools",) if self.messages_field else ()
        named = (self.system_field, self.image_field)
        return (*between, *tools, *(name for name in named if name))


class FileSource(_Rows):
    """A local file, or several (`*` in `path`); relative to the calibration file's directory.

    A .txt file is one document; the others have rows.
    """

    type: Literal["file"]
    path: str

    @field_validator("path")
    @classmethod
    def _known(cls, value: str) -> str:
        if not value.lower().endswith(DATA_SUFFIXES):
            raise ValueError(f"must end in {', '.join(DATA_SUFFIXES)}")
        return value

    @model_validator(mode="after")
    def _no_field(self) -> FileSource:
        named = self.text_field or self.messages_field or self.turn_fields
        if self.path.lower().endswith(".txt") and named:
            raise ValueError("a .txt file has no fields")
        return self

    @property
    def label(self) -> str:
        return f"file {PurePosixPath(self.path).name}"


class HubSource(_Rows):
    """A data set on the Hugging Face hub, streamed with `datasets`."""

    type: Literal["hub"]
    name: str = Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")
    config: str | None = None
    split: str = "train"
    revision: str = "main"

    @property
    def label(self) -> str:
        return f"hub {self.name}"


Source = Annotated[
    PackageSource | StdlibSource | PicturesSource | FileSource | HubSource,
    Field(discriminator="type"),
]
SOURCE_TYPES: dict[str, type[BaseModel]] = {
    "package": PackageSource,
    "stdlib": StdlibSource,
    "pictures": PicturesSource,
    "file": FileSource,
    "hub": HubSource,
}


def _shows(source: Any) -> bool:
    return source.type == "pictures" or bool(getattr(source, "image_field", None))


class CalibrationConfig(_Strict):
    """A mixture of sources and the shape of its samples.

    `short` says what becomes of documents shorter than `sequence_length`: `pack` concatenates
    documents (end-of-text token between), `pad` makes each its own sample, padded on the right
    and masked, `drop` leaves them out and counts them. Fewer samples than asked for is an error
    unless `allow_fewer`. A conversation with pictures is always a sample of its own.
    """

    schema_version: Literal[1] = 1
    name: str
    description: str = ""
    licence: str = "unknown"
    samples: int = Field(128, gt=0)
    sequence_length: int = Field(512, ge=8)
    seed: int = Field(0, ge=0)
    short: Literal["pack", "pad", "drop"] = "pack"
    allow_fewer: bool = False
    sources: list[Source] = Field(min_length=1)

    @model_validator(mode="after")
    def _a_sample_each(self) -> CalibrationConfig:
        if self.samples < len(self.sources):
            raise ValueError(f"samples = {self.samples} for {len(self.sources)} sources")
        return self

    @property
    def has_pictures(self) -> bool:
        return any(map(_shows, self.sources))

    @property
    def mixes_pictures(self) -> bool:
        """Whether some sources have pictures and others only texts."""
        return self.has_pictures and not all(map(_shows, self.sources))

    def stored(self) -> dict[str, Any]:
        """The resolved mixture without directories of this machine."""
        data = self.model_dump()
        for source in data["sources"]:
            if "path" in source:
                source["path"] = PurePosixPath(source["path"]).name
        return data
