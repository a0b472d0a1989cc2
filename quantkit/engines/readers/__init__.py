"""How engines read the quantization settings of a layout, one function a rule."""

from __future__ import annotations

from collections.abc import Callable

from quantkit.engines.loadable import Loadable
from quantkit.engines.readers.ascend import ascend
from quantkit.engines.readers.base import SettingsReader
from quantkit.engines.readers.compressed_tensors import compressed_tensors
from quantkit.engines.readers.integers import auto_round, awq, gptq
from quantkit.engines.readers.listed import fp8, mxfp4, quark
from quantkit.engines.readers.modelopt import modelopt
from quantkit.engines.rules import EngineFamily, EngineRules


def reader(engine: EngineRules, family: EngineFamily, candidate: Loadable) -> SettingsReader | None:
    """The rule by which `engine` reads this candidate's settings; None for a layout it does not
    know. Layers that a family builds in 16 bit whatever the settings say are not asked for."""
    rule = engine.match.get(candidate.layout)
    return None if rule is None else READERS[rule](family, candidate)


READERS: dict[str, Callable[[EngineFamily, Loadable], SettingsReader]] = {
    "exact_or_regex": lambda f, c: compressed_tensors(f, c, suffix=False),
    "suffix_or_regex": lambda f, c: compressed_tensors(f, c, suffix=True),
    "path_or_glob_or_substring": lambda f, c: modelopt(f, c, substring=True),
    "path_or_glob": lambda f, c: modelopt(f, c, substring=False),
    "stored": lambda f, c: gptq(f, c, stored=True),
    "dynamic": lambda f, c: gptq(f, c, stored=False),
    "substring": lambda f, c: awq(f, c, whole=False),
    "whole_substring": lambda f, c: awq(f, c, whole=True),
    "extra_config": auto_round,
    "description": lambda _, c: ascend(c),
    "fp8_names": lambda f, c: fp8(f, c, path=False),
    "fp8_paths": lambda f, c: fp8(f, c, path=True),
    "experts_only": mxfp4,
    "quark_exclude": quark,
}
"""The names that the data files use under `match`."""
