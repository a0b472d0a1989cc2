"""A configuration is read without the networks, generation and the compiler coming along."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch._dynamo", "transformers.generation.utils", "transformers.modeling_utils")
CODE = f"""
import sys
import transformers.utils as place
from quantkit.checkpoint.lean_transformers import without_docstrings
from transformers import AutoConfig
theirs = place.auto_docstring
with without_docstrings():
    config = AutoConfig.for_model("qwen2", hidden_size=64)
assert config.hidden_size == 64 and config.model_type == "qwen2"
assert place.auto_docstring is theirs
assert not [name for name in {HEAVY} if name in sys.modules]
"""


def test_a_configuration_brings_no_network() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True)
