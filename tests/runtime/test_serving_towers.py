"""Models with towers in the real vLLM, on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantkit import quantize
from quantkit.checkpoint.wrap_vision import wrap_vision
from quantkit.validation.subjects.base import Opening
from quantkit.validation.subjects.engines import opener


@pytest.mark.slow
@pytest.mark.usefixtures("vllm_python")
def test_vllm_loads_a_model_with_a_tower(small_model: Path, tmp_path: Path) -> None:
    """Tower and connector too; its placeholders for pictures want a tokenizer.

    A cut network's log-probabilities are large, and rounded activations move each by a few percent,
    up as often as down.
    """
    source = wrap_vision(small_model, tmp_path / "wrapped")
    made = tmp_path / "made"
    quantize(source, method="rtn_w8a8_dynamic", out=made)
    windows = np.array([range(5, 37), range(105, 137)])
    builtin, vllm = opener("builtin")(made, Opening("cpu")), opener("vllm")(made, Opening("cpu"))
    try:
        assert sum(vllm.kernels().values()) > 0
        ours = builtin.logprobs(windows)
        apart = vllm.logprobs(windows) - ours
    finally:
        vllm.close()
    assert np.abs(apart).mean() < 0.05 * np.abs(ours).mean()
    assert abs(apart.mean()) < 3 * apart.std() / apart.size**0.5
