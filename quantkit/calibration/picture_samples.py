"""Conversations with pictures as samples: ids, and the other arguments of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.calibration.chat import Render
from quantkit.calibration.documents import Document
from quantkit.calibration.processor import load_processor, processor_digest
from quantkit.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Arrays", "Look", "looker", "processor_digest"]

Arrays = dict[str, "NDArray[np.generic]"]
"""Arguments of a forward pass beside ids and mask, by name."""

Look = Callable[[Document, int], tuple[list[int], Arrays]]
"""From a document and the length of samples to its ids and arguments."""


def looker(model: Path, render: Render | None) -> Look:
    """What makes samples of conversations with pictures, by the model's template and processor.

    Raises InputError (`calibration.no_processor`, `calibration.no_template`); the function does
    (`calibration.picture_too_long`) for a conversation that is longer than a sample, which cannot
    be cut within a picture.
    """
    processor = load_processor(model)
    if render is None:
        raise InputError(
            f"{model} has no chat template, which says where pictures stand in a conversation.",
            hint="copy chat_template.jinja of the base model into it",
            code="calibration.no_template",
        )

    def look(document: Document, length: int) -> tuple[list[int], Arrays]:
        from PIL import Image

        assert not isinstance(document.content, str)
        images = [Image.fromarray(pixels) for pixels in document.pictures]
        made: Mapping[str, Any] = processor(
            text=[render(document.content)], images=[images], return_tensors="np"
        )
        ids = [int(number) for number in made["input_ids"][0]]
        if len(ids) > length:
            raise InputError(
                f"A conversation with its picture has {len(ids)} tokens; samples have {length}.",
                hint=f"--set calibration.sequence_length={1 << (len(ids) - 1).bit_length()}",
                code="calibration.picture_too_long",
            )
        rest = {k: v for k, v in made.items() if k not in ("input_ids", "attention_mask")}
        return ids, rest

    return look
