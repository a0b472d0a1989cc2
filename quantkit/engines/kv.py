"""The KV cache of a checkpoint: on which GPUs it has kernels, and whether its scales are taken up.

An engine renames the scales of a checkpoint to those of its attention layers and passes over names
that its rules do not know; some model classes drop them all. The cache is then served at scale 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from quantkit.engines.gpus import Gpu
from quantkit.engines.loadable import Loadable
from quantkit.engines.reasons import Reason
from quantkit.engines.rules import EngineRules

_NO_SCALES = "measure with the cache quantized (quantkit validate), or --set kv_cache=none"


def check_gpu(engine: EngineRules, candidate: Loadable, gpu: Gpu | None) -> Iterator[Reason]:
    """Code `engine.kv_cache`: a format of the cache that the GPU has no kernels for."""
    able = engine.kv_cache.gpus.get(candidate.kv_cache)
    if gpu is None or able is None or (gpu.vendor == "nvidia" and gpu.capability in able):
        return
    yield Reason(
        "engine.kv_cache",
        f"{engine.name} has no kernels for an {candidate.kv_cache.upper()} KV cache on {gpu.name} "
        f"(it has them on {_generations(able)}{_later(engine, candidate)})",
        "--set kv_cache=fp8",
    )


def cautions(engine: EngineRules, candidate: Loadable, gpu: Gpu | None) -> Iterator[Reason]:
    """What does not stop the load and changes what is served: codes `engine.kv_cache` (no GPU is
    named) and `engine.kv_scales`."""
    rule = engine.kv_cache
    able = rule.gpus.get(candidate.kv_cache)
    if gpu is None and able is not None:
        yield Reason(
            "engine.kv_cache",
            f"{engine.name} has kernels for an {candidate.kv_cache.upper()} KV cache on "
            f"{_generations(able)} only{_later(engine, candidate)}",
            "name the GPU that it will be served on: --gpu",
        )
    if not candidate.kv_scales:
        return
    types = candidate.model_types
    dropped = next((kind for kind in types if kind in rule.dropped), None)
    if dropped:
        yield Reason(
            "engine.kv_scales",
            f"{engine.name} does not load the KV-cache scales of {dropped} models "
            f"({candidate.kv_scales[0]}) and serves the cache at scale 1",
            _NO_SCALES,
        )
        return
    for version, kinds in rule.dropped_before.items():
        kind = next((kind for kind in types if kind in kinds), None)
        if kind:
            yield Reason(
                "engine.kv_scales",
                f"{engine.name} before {version} does not load the KV-cache scales of {kind} "
                "models and serves the cache at scale 1",
                f"serve with {engine.name} {version} or newer",
            )
    patterns = [*rule.scales, *rule.scales_of.get(candidate.layout, ())]
    unknown = [n for n in candidate.kv_scales if not any(re.search(p, n) for p in patterns)]
    if unknown:
        yield Reason(
            "engine.kv_scales",
            f"{engine.name} does not take up {len(unknown)} of the {len(candidate.kv_scales)} "
            f"KV-cache scales ({unknown[0]}): no rule of its loader knows the name, and the cache "
            "is served at scale 1",
            "name them …self_attn.k_proj.k_scale and …self_attn.v_proj.v_scale, or "
            "--set kv_cache=none",
        )


def _generations(able: tuple[int, ...]) -> str:
    return " and ".join(f"SM{capability}" for capability in able)


def _later(engine: EngineRules, candidate: Loadable) -> str:
    added = engine.kv_cache.added.get(candidate.kv_cache)
    return f"; {added}" if added else ""
