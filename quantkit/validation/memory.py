"""Whether a model fits before it is loaded: an estimate of what it needs, and what there is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from quantkit.backends.environments.device import resolve_devices
from quantkit.backends.environments.room import device_room, host_room
from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.gguf import GgufFile
from quantkit.checkpoint.network.language import text_config
from quantkit.errors import BackendError, InputError
from quantkit.validation.preflight import Candidate
from quantkit.validation.subjects.builtin import BATCH_TOKENS


def needed_bytes(held: Checkpoint | GgufFile, *, expanded: bool) -> int:
    """Bytes that measuring a model takes: weights, the largest tensor once more, one batch.

    `expanded`: its codes become 16-bit weights at load (kernel "dequantized"), as those of GGUF
    always do, by way of float32. A batch holds its logits in 16 bit, a part of them in float32, and
    some activations.
    """
    if isinstance(held, GgufFile):
        weights = 2 * sum(tensor.elements for tensor in held.tensors.values())
        largest = 4 * max((tensor.elements for tensor in held.tensors.values()), default=0)
        embedding = held.tensors.get("token_embd.weight")
        vocabulary = embedding.shape[0] if embedding else 0
        wide = int(held.metadata.get(f"{held.architecture}.feed_forward_length") or 0)
    else:
        weights = _bytes_at_16_bit(held) if expanded else held.weight_bytes
        largest = max((info.bytes for info in held.tensors.values()), default=0)
        config = text_config(held.config)
        vocabulary = int(config.get("vocab_size") or 0)
        wide = int(config.get("intermediate_size") or 0)
    batch = BATCH_TOKENS * (2 * vocabulary + 12 * wide) + 256 * 12 * vocabulary
    return weights + largest + batch


def available_bytes(device: str) -> int | None:
    """Bytes that are free for a model on a device; None where nothing tells. Of several, which get
    equal parts, the least that one has free counts for each."""
    if "," in device:
        rooms = [device_room(one) for one in resolve_devices(device)]
        known = [room for room in rooms if room is not None]
        return min(known) * len(rooms) if known else None
    if device.startswith("cuda"):
        import torch

        free: int = torch.cuda.mem_get_info(torch.device(device))[0]
        return free
    return host_room()


def refuse_too_large(what: str, needed: int, device: str) -> None:
    """InputError when `needed` bytes are more than the device has free."""
    available = available_bytes(device)
    if available is not None and needed > available:
        raise InputError(
            f"{what} needs about {needed / 1e9:.1f} GB on {device}, where {available / 1e9:.1f} GB "
            "are free.",
            hint="free memory, choose another --device, or validate on a larger machine",
            code="validate.memory",
        )


def check_memory(candidate: Candidate, kernel: str, device: str) -> tuple[int, int]:
    """Bytes that the baseline and the checkpoint need, one after the other; refused if too many."""
    base = candidate.baseline
    needs = (
        needed_bytes(base, expanded=False),
        needed_bytes(candidate.held, expanded=kernel == "dequantized"),
    )
    refuse_too_large(f"The baseline {base.path}", needs[0], device)
    refuse_too_large(str(candidate.path), needs[1], device)
    return needs


@contextmanager
def explained(what: str, needed: int) -> Iterator[None]:
    """Turn a failed allocation inside the block into a BackendError that says what was needed."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's out-of-memory errors are RuntimeErrors
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, RuntimeError) and "allocate" not in first:
            raise
        raise BackendError(
            f"{what} ran out of memory; about {needed / 1e9:.1f} GB were expected to do: {first}",
            hint="free memory, or validate on a larger machine",
            code="validate.out_of_memory",
        ) from error


def _bytes_at_16_bit(held: Checkpoint) -> int:
    from quantkit.formats.quantized import examine
    from quantkit.formats.registry import detect, is_quantized

    if is_quantized(held) is None:
        return held.weight_bytes
    subject = examine(held, detect(held))
    coded = sum(held.tensors[name].bytes for name in subject.owned)
    layers = subject.declaration.layers.values()
    elements = sum(s.shape[0] * s.shape[1] * max(s.experts or 1, 1) for s in layers)
    return held.weight_bytes - coded + 2 * elements
