"""The tensors of a checkpoint for loading: checked against its declaration, read one at a time.

Nothing is guessed: a layer that lacks a scale, a shape that does not fit or a NaN ends the load
with the finding that `quantkit verify` would report.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.tensors import read_tensor
from quantkit.errors import InputError, command
from quantkit.formats.base import LayerSpec, QuantWeight, is_kv_cache_tensor
from quantkit.formats.inventory import expert
from quantkit.formats.quantized import QuantizedCheckpoint, examine
from quantkit.formats.registry import detect, is_quantized
from quantkit.verification.configuration.completeness import check_completeness
from quantkit.verification.configuration.declared import check_declared
from quantkit.verification.findings import Finding
from quantkit.verification.weights.values import check_tensors, check_weight

FLOATS = frozenset({"BF16", "F16", "F32", "F64"})


@dataclass
class CheckpointReader:
    """A checkpoint being loaded; `subject` is None for a 16-bit one. `used` grows as it is read."""

    checkpoint: Checkpoint
    subject: QuantizedCheckpoint | None
    used: set[str] = field(default_factory=set)

    @property
    def layout(self) -> str | None:
        return None if self.subject is None else self.subject.declaration.quant_method

    @property
    def layers(self) -> Mapping[str, LayerSpec]:
        """Every module that is declared quantized."""
        return {} if self.subject is None else self.subject.declaration.layers

    @property
    def expanded(self) -> dict[str, str]:
        """Modules whose quantized weights `plain` gives dequantized, with their format's name."""
        return {}

    @property
    def names(self) -> Collection[str]:
        """Every tensor that the checkpoint holds."""
        return self.checkpoint.tensors.keys()

    def has(self, name: str) -> bool:
        return name in self.names

    def plain(self, name: str, shape: tuple[int, ...] | None, dtype: torch.dtype) -> torch.Tensor:
        """A 16- or 32-bit tensor in `dtype`; InputError when absent, mis-shaped, coded or NaN."""
        self.require(name)
        info = self.checkpoint.tensors[name]
        if shape is not None and info.shape != shape:
            raise wrong_shape(name, info.shape, shape)
        if info.dtype not in FLOATS:
            raise InputError(
                f"{name} is {info.dtype} and nothing declares it quantized.",
                hint="export the checkpoint again, with its quantization_config",
                code="runtime.unexpected_codes",
            )
        tensor = self._read(name).to(dtype)
        check_finite(name, tensor)
        return tensor

    def quantized(self, module: str, shape: tuple[int, int], bias: bool) -> QuantWeight:
        """A declared layer as a canonical weight, `shape` [out, in] being what the config asks for.

        Raises InputError for another shape, a missing bias, and scales that are NaN or wrongly 0.
        """
        spec = self.layers[module]
        if spec.shape != shape or spec.experts:
            raise wrong_shape(module, spec.shape, shape)
        weight = self._weight(module, self._parts(module), spec)
        if bias and weight.bias is None:
            self.require(f"{module}.bias")
        return weight

    def stacked(
        self, module: str, count: int, shape: tuple[int, int], bias: bool
    ) -> Iterator[QuantWeight]:
        """The `count` experts of a declared 3-D tensor, one after the other; see `quantized`."""
        spec = self.layers[module]
        if (spec.experts, spec.shape) != (count, shape):
            raise wrong_shape(module, (spec.experts, *spec.shape), (count, *shape))
        tensors = self._parts(module)
        for number in range(count):
            weight = self._weight(module, expert(tensors, spec, number), spec)
            if bias and weight.bias is None:
                self.require(f"{module}_bias")
            yield weight

    def _parts(self, module: str) -> dict[str, torch.Tensor]:
        """The tensors of a declared layer, by suffix, checked."""
        assert self.subject is not None
        parts, wanted = self.subject.parts[module], self.subject.expected[module]
        names = {suffix: parts[suffix].name for suffix in wanted if suffix in parts}
        tensors = {suffix: self._read(name) for suffix, name in names.items()}
        refuse(self.checkpoint, check_tensors(module, tensors, wanted))
        return tensors

    def _weight(
        self, module: str, tensors: Mapping[str, torch.Tensor], spec: LayerSpec
    ) -> QuantWeight:
        assert self.subject is not None
        weight = self.subject.layout.read(tensors, spec)
        refuse(self.checkpoint, check_weight(module, weight, spec, None))
        return weight

    def bias(
        self, module: str, rows: int, dtype: torch.dtype, required: bool
    ) -> torch.Tensor | None:
        """The bias of a 16-bit layer, where the checkpoint has one."""
        name = f"{module}.bias"
        return self.plain(name, (rows,), dtype) if required or self.has(name) else None

    def unused(self) -> list[str]:
        """Tensors that no part of the model took; KV-cache scales aside."""
        left = self.checkpoint.tensors.keys() - self.used
        return sorted(name for name in left if not is_kv_cache_tensor(name))

    def leave(self, module: str) -> None:
        """Count the tensors of a module as used, which the network does not compute."""
        self.used.update(name for name in self.names if name.startswith(f"{module}."))

    def require(self, name: str) -> None:
        """InputError when the checkpoint has no such tensor."""
        if not self.has(name):
            plain = "compare its tensor names with the original's; download or save the model again"
            raise InputError(
                f"{self.checkpoint.path} has no tensor {name}.",
                hint=plain if self.layout is None else command("verify", self.checkpoint.path),
                code="runtime.missing_tensor",
            )

    def _read(self, name: str) -> torch.Tensor:
        self.used.add(name)
        return read_tensor(self.checkpoint.tensors[name])


def open_source(checkpoint: Checkpoint) -> CheckpointReader:
    """Understand the checkpoint, and refuse it by name where declaration and tensors disagree.

    Raises InputError with the code of the first finding (`format.*`, `declared.*`, …).
    """
    if is_quantized(checkpoint) is None:
        return CheckpointReader(checkpoint, None)
    subject = examine(checkpoint, detect(checkpoint))
    findings, _ = check_declared(subject)
    errors = [f for f in (*findings, *check_completeness(subject, None)) if f.severity == "error"]
    if not subject.declaration.layers and subject.declaration.kv_cache == "none":
        errors.append(
            Finding(
                "declared.nothing",
                "error",
                f"the {subject.declaration.quant_method} configuration declares no quantized layer",
                "quantize the model, or remove quantization_config from config.json",
            )
        )
    refuse(checkpoint, errors)
    return CheckpointReader(checkpoint, subject)


def wrong_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> InputError:
    """The refusal of a tensor that the config has no place for."""
    return InputError(
        f"{name} has shape {list(found)}; the config asks for {list(wanted)}.",
        hint="put the config.json of the model that these weights belong to beside them",
        code="runtime.wrong_shape",
    )


def refuse(checkpoint: Checkpoint, findings: Sequence[Finding]) -> None:
    """InputError with the code of the first of the findings; nothing where there are none."""
    if findings:
        more = f" (and {len(findings) - 1} more errors)" if len(findings) > 1 else ""
        raise InputError(
            f"{checkpoint.path} cannot be loaded: {findings[0].message}{more}.",
            hint=f"{findings[0].hint}; {command('verify', checkpoint.path)}  # lists everything",
            code=findings[0].code,
        )


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """InputError (`tensor.nonfinite`) when a value is NaN or infinite."""
    low, high = torch.aminmax(tensor)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise InputError(
            f"{name} holds NaN or infinite values.",
            hint="quantize the model again; a checkpoint with such values answers garbage",
            code="tensor.nonfinite",
        )
