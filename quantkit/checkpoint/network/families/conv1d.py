"""GPT-2 and its kin: linear layers of Transformers' Conv1D class, stored as [in, out]."""

from quantkit.checkpoint.network.families.base import Family

FAMILIES = (
    Family(types=("gpt2", "openai-gpt"), transposed=True, tied=True),
    Family(types=("imagegpt", "decision_transformer"), transposed=True),
)  # fmt: skip
