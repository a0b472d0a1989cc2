"""Conversations about drawn pictures, which both models are shown.

The pictures are those of the calibration room, from a seed that no calibration has, each with one
question and its answer. The baseline's processor and chat template prepare them once: both models
see the same pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from quantkit.calibration.chat import Render, compile_template
from quantkit.calibration.documents import Document
from quantkit.calibration.picture_files import with_pictures
from quantkit.calibration.picture_samples import Arrays, Look, looker
from quantkit.calibration.pictures import draw
from quantkit.calibration.tokenizer import Tokenizer, read_tokenizer_info
from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.gguf import GgufFile
from quantkit.errors import InputError
from quantkit.validation.preflight import Candidate

MOST = 16
SEED = 15_485_863
"""Calibrations count up from the seed of their mixture."""
LONGEST = 8192
"""Tokens of a conversation with its picture, where the network has no limit."""


@dataclass(frozen=True)
class PicturePrompt:
    """A conversation about a drawn picture.

    ids: all its tokens. inputs: what the picture became. words: how many tokens come after it.
    """

    question: str
    answer: str
    ids: list[int]
    inputs: Arrays
    words: int


@dataclass(frozen=True)
class PicturePrompts:
    """The conversations of a run; none of a model without a vision tower, nor where `why` says why
    pictures cannot be shown to one that has a tower."""

    prompts: tuple[PicturePrompt, ...] = ()
    why: str = ""

    @cached_property
    def digest(self) -> str:
        """SHA-256 over tokens, pixels and what else the processor made."""
        total = hashlib.sha256(json.dumps([[p.ids, p.words] for p in self.prompts]).encode())
        for prompt in self.prompts:
            for name, array in sorted(prompt.inputs.items()):
                total.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
        return total.hexdigest()


NONE = PicturePrompts()


def sees(held: Checkpoint | GgufFile) -> bool:
    """Whether a checkpoint holds a vision tower, as its config says."""
    return isinstance(held, Checkpoint) and isinstance(held.config.get("vision_config"), dict)


def picture_prompts(
    candidate: Candidate, engine: str, tokenizer: Tokenizer, count: int, longest: int | None
) -> PicturePrompts:
    """`count` conversations (at most `MOST`) for a checkpoint with a vision tower, of at most
    `longest` tokens each, as its baseline prepares them."""
    if not sees(candidate.held):
        return PicturePrompts()
    if engine != "builtin":
        return PicturePrompts(why=f"{engine} is shown no pictures here")
    model = candidate.baseline.path
    try:
        info = read_tokenizer_info(model)
        render = None
        if info.chat_template is not None:
            render = compile_template(info.chat_template, info.special_tokens)
        look = looker(model, render)
        assert render is not None
        made = [
            _prompt(number, look, render, tokenizer, longest or LONGEST)
            for number in range(min(count, MOST))
        ]
    except InputError as error:
        return PicturePrompts(why=error.message.removesuffix("."))
    except Exception as error:  # every family's processor fails in its own way
        told = " ".join(str(error).split())[:200] or type(error).__name__
        return PicturePrompts(why=f"the processor cannot prepare pictures: {told}")
    return PicturePrompts(tuple(made))


def _prompt(
    number: int, look: Look, render: Render, tokenizer: Tokenizer, longest: int
) -> PicturePrompt:
    drawn = draw(SEED, number)
    said = [
        {"role": "user", "content": drawn.question},
        {"role": "assistant", "content": drawn.answer},
    ]
    shown = Document("picture", with_pictures(said, 1), pictures=(drawn.pixels,))
    ids, inputs = look(shown, longest)
    blind = tokenizer.encode(render(with_pictures(said, 0)), True)
    words = _same_end(ids, blind)
    if not 0 < words < len(ids):
        raise ValueError("which tokens follow the picture cannot be told")
    arrays = {name: np.asarray(value) for name, value in inputs.items()}
    if odd := [name for name, array in arrays.items() if array.dtype.kind not in "biuf"]:
        raise ValueError(f"{odd[0]} holds no numbers")
    return PicturePrompt(drawn.question, drawn.answer, ids, arrays, words)


def _same_end(one: Sequence[int], other: Sequence[int]) -> int:
    """How many of the last ids are the same."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
