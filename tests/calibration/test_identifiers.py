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
    "chess": "1. e4 e5 2. Nf3 Nc6 3. Bb5 a6 4. Ba4 Nf6",
    "symbols": "x_1 + x_2 = y_12",
    "numbers": "1024 2048 4096\n1.25 3.5 7.75",
    "an answer": "72",
    "a formula": "E=mc2",
    "versions": "torch==2.13.0\nnumpy==2.2.6",
    "assembly": "mov eax, [rbp-8]\nadd rax, rbx",
    "rows of names": "| gene_1 | 0.5 | 0.25 |\n| gene_2 | 0.75 | 1.25 |",
    "a date in Chinese": "今天是2024年1月3日",
    "a date in Japanese": "2024年に発表された",
    "verses": "Genesis 1:1 In the beginning",
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
        "row-000123",
        "sample_17",
        "identity_0",
        "flan.564327",
        "conv_0001_turn_3",
        "train/00001234",
        "chatcmpl-9XyZ12abCD",
        "3f2a9c1b",
        "00012345",
        "aGVsbG8gd29ybGQ=",
        "row-1 row-2 row-3",
        json.dumps(["sample_1", "sample_2", "sample_3"]),
    ],
)
def test_identifiers(text: str) -> None:
    assert is_identifiers(text)


def test_a_long_line_of_any_script_takes_no_time() -> None:
    assert not is_identifiers("敏捷的棕色狐狸" * 100_000)


@pytest.mark.parametrize("kind", TEXTS)
def test_text_is_none(kind: str) -> None:
    assert not is_identifiers(TEXTS[kind])
