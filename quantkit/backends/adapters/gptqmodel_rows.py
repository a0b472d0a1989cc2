"""GPTQModel's definitions of models with towers, for rows of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gptqmodel.models.auto import (
    MODEL_MAP,
    SUPPORTED_MODELS,
    check_and_get_model_definition,
)
from gptqmodel.models.base import BaseQModel

from quantkit.backends.process.job import Job

_KIN = {"idefics3": "smolvlm"}
"""Families that the library does not know → known ones, whose modules have the same names."""

_IN_MEMORY = frozenset({"llama4", "mistral3"})
"""Families that the library takes with all weights in memory alone. It reads Llama 4's experts from
the disk without turning them around, and asks Mistral 3's mask, which has no values then, for some.
"""


def offloads(job: Job, config: Any) -> bool:
    """Whether decoder blocks that are not worked on lie on the disk."""
    return job.placement == "layerwise" and config.model_type not in _IN_MEMORY


@contextmanager
def taking_rows(job: Job, config: Any) -> Iterator[None]:
    """Take rows of tokens for a model with towers too.

    For these the library loads a processor (which may need torchvision, or other packages) and asks
    for conversations that this one prepares; rows have no use for it.
    """
    family = config.model_type
    if family in _KIN and family not in SUPPORTED_MODELS:
        MODEL_MAP[family] = MODEL_MAP[_KIN[family]]
        SUPPORTED_MODELS.append(family)
    definition: Any = check_and_get_model_definition(job.model, job.trust_remote_code)
    changed: dict[str, Any] = {}
    if config.get_text_config() is not config and definition is not BaseQModel:
        changed["prepare_dataset"] = BaseQModel.prepare_dataset
        if definition.require_load_processor:
            changed |= {"require_load_processor": False, "require_pkgs": None}
    before = {name: vars(definition)[name] for name in changed if name in vars(definition)}
    for name, value in changed.items():
        setattr(definition, name, value)
    try:
        yield
    finally:
        for name in changed:
            if name in before:
                setattr(definition, name, before[name])
            else:
                delattr(definition, name)
