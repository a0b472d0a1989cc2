"""Identifiers are told from text, whatever its script or subject."""

import base64
import hashlib
import json
import uuid

import pytest

from quantkit.calibration.identifiers import is_identifiers

DIGEST = hashlib.sha256(b"a").digest()
TEXTS = {
    "prose": "The quick brown fox jumps over the lazy dog.",
    "code": "def read_messages_of_a_conversation(self):\n    return self.tokens_of_sources[0x1F]",
    "chinese": "敏捷的棕色狐狸跳过了懒狗。今天天气很好。",
    "japanese": "素早い茶色の狐はのろまな犬を飛び越える。",
    "maths": "\\int_0^1 x^2 dx = 1/3, a_{12} + b_{34} = 271828182845904523536",
    "table": "| 1024 | 2048 | 4096 |\n| 1.25 | 3.50 | 7.75 |",
    "a digest": "The commit " + DIGEST.hex() + " mends what the earlier one broke on slow disks.",
    "long word": "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
}


@pytest.mark.parametrize(
    "text",
    [
        str(uuid.UUID(int=12345 << 64)),
        DIGEST.hex(),
        base64.b64encode(DIGEST).decode(),
        json.dumps([DIGEST.hex()] * 3),
    ],
)
def test_identifiers(text: str) -> None:
    assert is_identifiers(text)


@pytest.mark.parametrize("kind", TEXTS)
def test_text_is_none(kind: str) -> None:
    assert not is_identifiers(TEXTS[kind])
