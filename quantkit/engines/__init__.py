"""What the serving engines do with a checkpoint, known without running them.

The engines are data (`versions/*.yaml`); `judge` replays for each what it does with the names, the
schemes and the shapes of a candidate: a finished checkpoint, or a plan for one.
"""

from quantkit.engines.gpus import Gpu, gpu_named
from quantkit.engines.judge import Verdict, engine_named, judge
from quantkit.engines.loadable import LayerPart, Loadable
from quantkit.engines.reasons import Reason
from quantkit.engines.rules import EngineRules, engines
from quantkit.engines.support import NAMES, SILENT_GARBAGE, Support, support

__all__ = [
    "NAMES",
    "SILENT_GARBAGE",
    "EngineRules",
    "Gpu",
    "LayerPart",
    "Loadable",
    "Reason",
    "Support",
    "Verdict",
    "engine_named",
    "engines",
    "gpu_named",
    "judge",
    "support",
]
