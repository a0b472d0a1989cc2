"""What a plan is calibrated with: the mixture that its recipe names, texts or pictures too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.network.multimodal import is_multimodal
from quantkit.errors import InputError
from quantkit.pipeline.plan import Plan

if TYPE_CHECKING:
    from quantkit.calibration import CalibrationConfig


def mixture_asked(plan: Plan) -> CalibrationConfig | None:
    """The calibration that the method will be shown, None where it needs none."""
    choice = plan.recipe.calibration
    if not plan.method.calibrated or choice is None:
        return None
    from quantkit.calibration import load_calibration
    from quantkit.calibration.config import FileSource
    from quantkit.calibration.sources import files_of

    config = load_calibration(choice.name, choice.overrides())
    for source in config.sources:
        if isinstance(source, FileSource):
            files_of(source)
    return config


def refuse_pictures(config: CalibrationConfig, source: Checkpoint, plan: Plan) -> None:
    """InputError (`calibration.pictures`) for a mixture with pictures where the model takes none,
    or the library only texts, and (`BACKEND.mixed_samples`) for one with texts too where the
    library takes either."""
    if not config.has_pictures:
        return
    takes = "" if is_multimodal(source.config) else f"{source.path} takes text alone"
    if not plan.backend.pictures:
        takes = f"{plan.backend.distribution} is calibrated with texts here"
    if takes:
        raise InputError(
            f"The calibration {config.name} has pictures; {takes}.",
            hint="choose another: quantkit calibration list",
            code="calibration.pictures",
        )
    mixed = plan.backend.mixed_pictures
    reason = mixed(plan.recipe) if mixed and config.mixes_pictures else None
    if reason:
        raise InputError(
            reason,
            hint="a calibration with pictures in every sample, or in none: quantkit calibration "
            "list",
            code=f"{plan.backend.name}.mixed_samples",
        )


def text_only_note(source: Checkpoint, plan: Plan) -> str | None:
    """What to say of a model that takes more than text and is calibrated with text; else None."""
    config = mixture_asked(plan) if is_multimodal(source.config) else None
    if config is None or config.has_pictures:
        return None
    return "calibrated with text only: no picture or sound reaches the language model"
