"""What the serving engines do with a checkpoint, known without running them.

The engines are data (`data/*.yaml`); `judge` replays for each what it does with the names, the
schemes and the shapes of a candidate: a finished checkpoint, or a plan for one.
"""

from quantkit.engines.candidate import Candidate, Part
from quantkit.engines.data import Engine, engines
from quantkit.engines.gpus import Gpu, gpu_named
from quantkit.engines.reasons import Reason
from quantkit.engines.support import NAMES, SILENT_GARBAGE, Support, support
from quantkit.engines.verdict import Verdict, engine_named, judge

__all__ = [
    "NAMES", "SILENT_GARBAGE", "Candidate", "Engine", "Gpu", "Part", "Reason", "Support", "Verdict",
    "engine_named", "engines", "gpu_named", "judge", "support",
]  # fmt: skip
