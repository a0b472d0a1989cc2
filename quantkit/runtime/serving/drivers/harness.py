"""lm-eval inside an engine's own environment, with the harness's backend for that engine.

Batching, chat template, stop strings and tensor parallelism are then those of the two themselves.
lm-eval need not be installed there: its packages are taken from quantkit's, after the engine's own.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from pathlib import Path
from typing import Any

from quantkit.runtime.serving.drivers.base import EngineOrder, pin


class _Harness:
    """The backend starts the engine when it is asked, so that nothing is loaded before."""

    name = ""
    seeded = True
    """Whether a request can have a seed of its own; where not, every run draws on."""

    def __init__(self, order: EngineOrder) -> None:
        pin(order.device)
        sys.path.append(order.packages)
        self._order = order
        self.prepare()
        engine = import_module(self.name).__version__
        self._settings = self.settings()  # vLLM tells what it runs on by its distribution's name
        self._named = name_distribution(self.name, engine)
        self.version = f"lm-eval {version('lm_eval')} with {self.name} {engine}"

    def prepare(self) -> None:
        """What must be said before the engine is imported."""

    def settings(self) -> dict[str, Any]:
        """What the backend's class takes."""
        raise NotImplementedError

    def thinking(self, asked: bool | None, end: str) -> dict[str, Any]:  # noqa: ARG002
        """What the class takes besides, where the chat template is told of thinking; `end` is what
        thoughts end with."""
        return {}

    def tasks(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Of each of the `settings` of answers a run: `results`, `higher_is_better` and `samples`
        of `lm_eval.simple_evaluate`, as JSON has them: of a sample its filter, its metrics' names
        and their values."""
        from lm_eval.api.registry import get_model
        from lm_eval.tasks import TaskManager

        told = self._settings | self.thinking(asked["answers"]["thinking"], asked["thoughts_end"])
        more = {"batch_size": "auto", "max_batch_size": None, "device": None}
        model: Any = get_model(self.name).create_from_arg_obj(told, more)
        manager = TaskManager(
            include_path=list(asked["folders"]) or None, include_defaults=asked["bundled"]
        )
        return {"runs": [self._run(model, manager, asked, how) for how in asked["settings"]]}

    def _run(
        self, model: Any, manager: Any, asked: Mapping[str, Any], how: Mapping[str, Any]
    ) -> dict[str, Any]:
        import lm_eval

        found: Any = lm_eval.simple_evaluate(
            model=model,
            tasks=list(asked["names"]),
            task_manager=manager,
            limit=asked["limit"],
            num_fewshot=asked["fewshot"],
            apply_chat_template=asked["chat"],
            gen_kwargs={k: v for k, v in how.items() if k != "seed" or self.seeded} or None,
            bootstrap_iters=0,
            log_samples=True,
        )
        return {
            "results": {task: _numbers(row) for task, row in found["results"].items()},
            "higher_is_better": found["higher_is_better"],
            "samples": {
                task: [
                    _numbers({name: row[name] for name in row["metrics"]})
                    | {"filter": row["filter"], "metrics": list(row["metrics"])}
                    for row in rows
                ]
                for task, rows in found["samples"].items()
            },
        }

    def kernels(self) -> dict[str, int]:
        return {}

    def memory_bytes(self) -> int:
        return 0

    def close(self) -> None:
        """The engine ends with this process."""


class VllmHarness(_Harness):
    """lm-eval's `vllm` (`lm_eval.models.vllm_causallms.VLLM`)."""

    name = "vllm"

    def prepare(self) -> None:
        space = str(ceil(self._order.cache_bytes / 2**30))
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", space)
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

    def settings(self) -> dict[str, Any]:
        from quantkit.runtime.serving.drivers.vllm import settings_here

        order = self._order
        return {
            "pretrained": order.model,
            "max_model_len": order.length,
            "seed": 0,
            **settings_here(),
            **order.arguments,
        }

    def thinking(self, asked: bool | None, end: str) -> dict[str, Any]:
        ends = {"think_end_token": end} if asked else {}
        return ends if asked is None else {"enable_thinking": asked, **ends}


class SglangHarness(_Harness):
    """lm-eval's `sglang` (`lm_eval.models.sglang_causallms.SGLangLM`)."""

    name = "sglang"
    seeded = False

    def settings(self) -> dict[str, Any]:
        return {
            "pretrained": self._order.model,
            "context_length": self._order.length,
            "trust_remote_code": False,
            **self._order.arguments,
        }


def name_distribution(name: str, engine: str) -> tempfile.TemporaryDirectory[str] | None:
    """A distribution of the engine's own name, where it was installed under another (vllm-cpu):
    lm-eval asks for its version by that name. It is there as long as what is returned."""
    try:
        version(name)
    except PackageNotFoundError:
        folder = tempfile.TemporaryDirectory(prefix="quantkit-")
        described = Path(folder.name, f"{name}-{engine}.dist-info")
        described.mkdir()
        (described / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {engine}\n", encoding="utf-8"
        )
        sys.path.append(folder.name)
        return folder
    return None


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of any kind (numpy's) as Python's; what is none is left out."""
    found = {}
    for name, value in values.items():
        whole = value.item() if hasattr(value, "item") else value
        if isinstance(whole, int | float):
            found[name] = whole
    return found
