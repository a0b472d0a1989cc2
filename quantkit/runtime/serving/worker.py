"""Child process entry: `PYTHON …/quantkit/runtime/serving/worker.py order.json REQUESTS_FD
EVENTS_FD`.

Runs where quantkit is not installed: the standard library, then the engine. Loads the model, says
`ready`, and answers requests until their pipe closes. Requests and events are one JSON object a
line: `{"call": …, …}` in, `{"event": "advance" | "ready" | "value" | "error", …}` out. stdout and
stderr are the log.
"""

from __future__ import annotations

import sys

sys.path[:] = [entry for entry in sys.path if entry != __file__.rpartition("/")[0]]

import faulthandler  # noqa: E402
import importlib  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    from quantkit.runtime.serving.drivers.base import Driver


class Channel:
    """The pipe to the parent."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._pipe = os.fdopen(descriptor, "w", encoding="utf-8")

    def send(self, event: str, **values: object) -> None:
        self._pipe.write(json.dumps({"event": event, **values}) + "\n")
        self._pipe.flush()

    def advance(self, done: int, total: int) -> None:
        self.send("advance", done=done, total=total)


def main(order_file: str, requests: int, events: int) -> int:
    """Serve one parent; 0 when it closed its pipe."""
    shared = _shared_worker()
    shared.die_with_parent()
    shared.bind_package()
    faulthandler.enable()
    os.set_inheritable(requests, False)
    channel = Channel(events)
    try:
        start = time.monotonic()
        driver = _open(Path(order_file))
        channel.send(
            "ready",
            version=driver.version,
            kernels=driver.kernels(),
            memory_bytes=driver.memory_bytes(),
            load_seconds=time.monotonic() - start,
        )
        with os.fdopen(requests, encoding="utf-8") as lines:
            for line in lines:
                channel.send("value", value=answer(driver, json.loads(line), channel))
        driver.close()
    except BaseException as error:
        traceback.print_exc()
        channel.send(
            "error",
            type=type(error).__name__,
            message=str(error),
            missing=getattr(error, "name", None) if isinstance(error, ImportError) else None,
            out_of_memory=shared.is_out_of_memory(error),
        )
        return 1
    return 0


def answer(driver: Driver, request: dict[str, Any], channel: Channel) -> object:
    """What the driver gives for one request; `seconds` is how long one batch took."""
    call = request["call"]
    if call == "logprobs":
        return driver.logprobs(request["windows"], channel.advance)
    if call == "top_logprobs":
        windows, count, file = (request[name] for name in ("windows", "count", "file"))
        driver.top_logprobs(windows, count, file, channel.advance)
        return None
    if call == "tasks":
        return driver.tasks(request)  # type: ignore[attr-defined]
    if call == "generate":
        return driver.generate(request["prompts"], request["new_tokens"])
    assert call == "seconds", call
    start = time.monotonic()
    driver.run(request["prompts"], request["new_tokens"])
    return time.monotonic() - start


def _open(order_file: Path) -> Driver:
    from quantkit.runtime.serving.drivers.base import EngineOrder

    order = EngineOrder.read(order_file)
    module, _, attribute = order.driver.partition(":")
    driver: Driver = getattr(importlib.import_module(module), attribute)(order)
    return driver


def _shared_worker() -> Any:
    """The module `quantkit/backends/process/worker.py`, by its path: quantkit itself is bound by
    it."""
    path = Path(__file__).resolve().parents[2] / "backends" / "process" / "worker.py"
    spec = importlib.util.spec_from_file_location("_quantkit_worker", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__mp_main__":  # a process that an engine spawned finds quantkit as this one does
    _shared_worker().bind_package()

if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
