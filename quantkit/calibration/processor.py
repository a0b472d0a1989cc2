"""A model's processor, which prepares pictures for its forward pass."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from pathlib import Path
from typing import Any

from quantkit.checkpoint.directory import read_json
from quantkit.errors import InputError

_FILES = ("preprocessor_config.json", "processor_config.json", "image_processor_config.json")


def processor_digest(model: Path) -> str:
    """SHA-256 over the files that say how pictures are prepared."""
    total = hashlib.sha256()
    for name in _FILES:
        if (model / name).is_file():
            total.update(name.encode() + (model / name).read_bytes())
    return total.hexdigest()


def load_processor(model: Path) -> Any:
    """The processor of a model directory, without code of its own.

    Raises InputError (`calibration.no_processor`) where there is none, or none that works here.
    """
    from transformers import AutoProcessor

    if not any((model / name).is_file() for name in _FILES):
        raise _none(model, "it has no preprocessor_config.json")
    try:
        return AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            model, local_files_only=True
        )
    except (ImportError, ValueError, OSError) as error:
        try:
            return _with_pillow(model)
        except (ImportError, KeyError, TypeError, ValueError, OSError):
            raise _none(model, " ".join(str(error).split())[:300]) from error


def _with_pillow(model: Path) -> Any:
    """The processor around the image processor that needs no torchvision.

    Transformers 5.17 takes some of these for such that need it, by a word in their files.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto import image_processing_auto
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    config = AutoConfig.from_pretrained(model, local_files_only=True)
    family = config.model_type.replace("-", "_")
    known_names: Any = image_processing_auto
    name = known_names.IMAGE_PROCESSOR_MAPPING_NAMES[config.model_type]["pil"]
    module = importlib.import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    pictures = getattr(module, name).from_pretrained(model, local_files_only=True)
    kind: Any = PROCESSOR_MAPPING[type(config)]
    known = inspect.signature(kind).parameters
    stored = model / "processor_config.json"
    stated = read_json(stored) if stored.is_file() else {}
    settings = {key: value for key, value in stated.items() if key in known}
    template = model / "chat_template.jinja"
    if template.is_file():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    return kind(pictures, tokenizer, **settings)


def _none(model: Path, why: str) -> InputError:
    return InputError(
        f"The processor of {model} cannot prepare pictures: {why}.",
        hint="copy the processor's files of the base model there, install torchvision where it "
        "asks for it, or calibrate with text",
        code="calibration.no_processor",
    )
