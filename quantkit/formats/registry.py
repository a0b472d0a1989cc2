"""Which layout a checkpoint has, and whether it is quantized at all (no torch here)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.checkpoint.schemes import Scheme
from quantkit.errors import InputError
from quantkit.formats import (
    ascend,
    auto_round,
    awq,
    compressed_tensors,
    fp8,
    gptq,
    modelopt,
    mxfp4,
    quark,
)
from quantkit.formats.base import Format, WritableFormat
from quantkit.formats.compressed_tensors_config import packing_of
from quantkit.formats.stale_settings import quantized_tensor, refuse_conflict, refuse_stale

if TYPE_CHECKING:
    from quantkit.checkpoint.directory import Checkpoint

FORMATS: tuple[Format, ...] = (
    modelopt, compressed_tensors, gptq, awq, auto_round, ascend, fp8, mxfp4, quark
)  # fmt: skip
"""Every layout; a checkpoint must be recognised by exactly one."""


def detect(checkpoint: Checkpoint) -> Format:
    """The layout of a quantized checkpoint, from its configuration files.

    Raises InputError: `format.none` when nothing says that it is quantized, `format.unknown` for a
    `quant_method` without a layout here, `format.contradiction` when two layouts are claimed.
    """
    refuse_conflict(checkpoint)
    found = [layout for layout in FORMATS if layout.recognises(checkpoint)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(layout.NAME for layout in FORMATS)
    if found:
        claims = " and ".join(layout.NAME for layout in found)
        raise InputError(
            f"The configuration files of {checkpoint.path} claim two layouts: {claims}.",
            hint="remove the file that does not belong to this export",
            code="format.contradiction",
        )
    config = checkpoint.quantization_config
    if config is None:
        raise InputError(
            f"{checkpoint.path} has no quantization_config in config.json and no file beside it.",
            hint=f"give a quantized checkpoint; layouts: {known}",
            code="format.none",
        )
    refuse_stale(checkpoint)
    raise InputError(
        f"quant_method {config.get('quant_method')!r} of {checkpoint.path} is not supported.",
        hint=f"supported: {known}",
        code="format.unknown",
    )


def writer_named(name: str) -> WritableFormat:
    """The layout of that name, of those that are written here."""
    writers: dict[str, WritableFormat] = {
        "compressed-tensors": compressed_tensors, "gptq": gptq, "awq": awq
    }  # fmt: skip
    return writers[name]


def packing(scheme: Scheme, layout: str) -> str:
    """The variant of a written layout that holds a scheme."""
    return (
        packing_of(scheme)
        if layout == "compressed-tensors"
        else {"gptq": "gptq", "awq": "gemm"}[layout]
    )


def is_quantized(checkpoint: Checkpoint) -> str | None:
    """What the checkpoint is quantized to already, in a few words, or None for a 16-bit one.

    The configuration files are asked first; where they are silent the tensors' names and dtypes
    are, since some exports carry scales and say nothing.
    """
    config = checkpoint.quantization_config
    if config:
        algorithm = config.get("quant_algo") or config.get("format") or config.get("fmt")
        method = str(config.get("quant_method") or "quantization_config without quant_method")
        return f"{method} {algorithm}" if algorithm else method
    for layout in FORMATS:
        if layout.recognises(checkpoint):
            return layout.NAME
    return quantized_tensor(checkpoint)
