"""Models and data sets by hub name: the real clients against a small local server, and none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.checkpoint.hub import resolve_model
from quantkit.errors import InputError
from tests.support.hubserver import COMMIT, serve

pytestmark = pytest.mark.broad

NOWHERE = "http://127.0.0.1:9"
ROWS = [{"text": f"Row {i} speaks of the number {i * i}. " * 12} for i in range(60)]
MODEL_FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": b"weights",
    "consolidated.safetensors": b"weights again",
    "pytorch_model.bin": b"pickle",
    "modeling_own.py": b"code",
    "README.md": b"card",
}


def run(home: Path, endpoint: str, *code: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HOME": str(home / "hf"), "HF_ENDPOINT": endpoint, **more}
    environment.pop("HF_HUB_CACHE", None)  # it would be stronger than HF_HOME
    environment["QUANTKIT_CACHE"] = str(home / "cache")
    return subprocess.run(
        [sys.executable, *code], capture_output=True, text=True, check=False, env=environment
    )


def resolve(home: Path, endpoint: str, call: str, **more: str) -> subprocess.CompletedProcess[str]:
    code = (
        "from quantkit.checkpoint.hub import resolve_model\n"
        "from quantkit.errors import InputError\n"
        f"try:\n    print(*sorted(p.name for p in resolve_model({call}).iterdir()))\n"
        "except InputError as error:\n    print(error.code, error.message, error.hint)"
    )
    return run(home, endpoint, "-c", code, **more)


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./models/x", "/no/such/model", "~/no-such-model", "a/b/c", "x/"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(InputError, match="does not exist") as caught:
        resolve_model(name)
    assert caught.value.code == "hub.missing_directory"


def test_an_impossible_name() -> None:
    with pytest.raises(InputError) as caught:
        resolve_model("two words/model")
    assert caught.value.code == "hub.bad_name"


def test_models_by_name(tmp_path: Path) -> None:
    with serve({"models/org/model": MODEL_FILES}) as hub:
        plain = resolve(tmp_path / "1", hub, "'org/model'").stdout.split()
        assert plain == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
        light = resolve(tmp_path / "2", hub, "'org/model@main', weights=False").stdout.split()
        assert light == ["README.md", "config.json", "tokenizer.json"]
        trusted = resolve(tmp_path / "3", hub, "'org/model', trust_remote_code=True").stdout
        assert "modeling_own.py" in trusted.split()
        assert "pytorch_model.bin" not in trusted
        for name, code in {
            "org/none": "hub.not_found",
            "org/model-gated": "hub.gated",
            "org/model@v9": "hub.no_revision",
        }.items():
            said = resolve(tmp_path / "4", hub, repr(name)).stdout
            assert said.startswith(f"{code} The model {name}")
            assert "HF_TOKEN" in said or code == "hub.no_revision"
    cached = resolve(tmp_path / "1", NOWHERE, "'org/model'").stdout.split()
    assert cached == plain


def test_models_without_a_hub(tmp_path: Path) -> None:
    said = resolve(tmp_path, NOWHERE, "'org/model'").stdout
    assert said.startswith("hub.unreachable The model org/model")
    assert "hf download org/model" in said
    said = resolve(tmp_path, NOWHERE, "'org/model'", HF_HUB_OFFLINE="1").stdout
    assert said.startswith("hub.offline")


BUILD = """
import sys
from pathlib import Path
from quantkit.calibration import build_tokens, load_calibration
from quantkit.errors import InputError
for change in sys.argv[3:]:
    key, _, value = change.partition("=")
    config = load_calibration(sys.argv[1], {key: value} if value else {})
    try:
        tokens = build_tokens(config, Path(sys.argv[2]))
        part = tokens.summary["sources"][0]
        print(tokens.digest, part["content_digest"], part["preview"][:4])
    except InputError as error:
        print(error.code, error.message)
"""


def test_a_data_set_is_streamed_and_then_cached(tmp_path: Path, small_model: Path) -> None:
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(
        "samples: 8\nsequence_length: 64\nsources:\n"
        f"  - {{type: hub, name: org/set, revision: {COMMIT}}}\n"
    )
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    build = ["-c", BUILD, str(mixture), str(small_model)]
    changes = ["", "sources.0.text_field=body", "sources.0.split=test", "sources.0.name=org/none"]
    with serve({"datasets/org/set": {"train.jsonl": lines}}) as hub:
        good, *refusals = run(tmp_path, hub, *build, *changes).stdout.splitlines()
    assert good.endswith(f" {COMMIT} Row ")
    for said, wanted in zip(
        refusals,
        (
            "calibration.no_field org/set has no field 'body'; its fields are text.",
            "calibration.bad_dataset The data set org/set (config None, split test) cannot be read",
            "hub.not_found The data set org/none is neither here nor on the hub",
        ),
        strict=True,
    ):
        assert said.startswith(wanted)
    assert run(tmp_path, NOWHERE, *build, "").stdout.splitlines() == [good]


def test_a_data_set_without_a_hub(tmp_path: Path, small_model: Path) -> None:
    done = run(
        tmp_path, NOWHERE, "-m", "quantkit", "calibration", "build", "c4",
        "--model", str(small_model),
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: The data set allenai/c4" in done.stderr
    assert "--calibration default" in done.stderr
