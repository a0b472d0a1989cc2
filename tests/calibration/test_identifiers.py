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
    "paths": "/srv/Ada/Projects/Qwen3-8B-W4A16/model-00001-of-00004.safetensors\n"
    "src/main/java/org/Example2/InternalFrameInternalFrameTitlePane3.java",
    "links": "https://github.com/Example-Org/LongProjectName2/pull/48606/Files/Changed4Lines",
    "names": "Qwen3OmniMoeConvNeXtBlock MobileNetV2DeepLabV3Plus GetHTTPResponseCode2XXFromURL",
    "models": "Qwen/Qwen3-Omni-30B-A3B-Instruct google/gemma-4-26B-A4B-it-assistant2",
    "constants": "X509_STORE_CTX_get_ex_data2 Cryptography_HAS_110_VERIFICATION_PARAMS",
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
        base64.b64encode(b"Once upon a time there was a fox; it was quick.").decode(),
        base64.b64encode(DIGEST * 8).decode(),
        json.dumps([DIGEST.hex()] * 3),
    ],
)
def test_identifiers(text: str) -> None:
    assert is_identifiers(text)


def test_a_long_line_of_any_script_takes_no_time() -> None:
    assert not is_identifiers("敏捷的棕色狐狸" * 100_000)


@pytest.mark.parametrize("kind", TEXTS)
def test_text_is_none(kind: str) -> None:
    assert not is_identifiers(TEXTS[kind])
