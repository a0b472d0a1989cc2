"""GPTQModel's definitions of models with towers, for rows of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from gptqmodel.models.auto import (
    MODEL_MAP,
    SUPPORTED_MODELS,
    check_and_get_model_definition,
)
from gptqmodel.models.base import BaseQModel

from quantkit.backends.process.job import Job

_FAMILIES: dict[str, Any] = yaml.safe_load(
    Path(__file__).with_name("gptqmodel_families.yaml").read_text(encoding="utf-8")
)


def offloads(job: Job, config: Any) -> bool:
    """Whether decoder blocks that are not worked on lie on the disk."""
    return job.placement == "layerwise" and config.model_type not in _FAMILIES["in_memory"]


@contextmanager
def taking_rows(job: Job, config: Any) -> Iterator[None]:
    """Take rows of tokens for a model with towers too.

    For these the library loads a processor (which may need torchvision, or other packages) and asks
    for conversations that this one prepares; rows have no use for it.
    """
    family, kin = config.model_type, _FAMILIES["kin"]
    if family in kin and family not in SUPPORTED_MODELS:
        MODEL_MAP[family] = MODEL_MAP[kin[family]]
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
