"""Put shards together from the works that a crew does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from quantkit.backends.streaming.crew import Crew
from quantkit.backends.streaming.job import ShardRecord, ShardTask, Work, WorkOrder, WorkRecord
from quantkit.backends.streaming.rows_out import ShardFile
from quantkit.checkpoint.progress import BytesDone

Finished = Callable[[ShardRecord], None]


def run_tasks(
    crew: Crew,
    tasks: Sequence[ShardTask],
    out: Path,
    known: Mapping[str, str],
    progress: BytesDone,
    finished: Finished,
) -> None:
    """Write every task's file into `out`.

    `known` are digests of source tensors that need not be hashed again; `progress` gets the source
    bytes done; `finished` gets each file's record once the file has its final name.
    """
    shards = [_Shard(task, out) for task in tasks]
    jobs = [(shard, work) for shard, task in zip(shards, tasks, strict=True) for work in task.works]

    def orders() -> Iterable[WorkOrder]:
        for number, (shard, work) in enumerate(jobs):
            yield shard.order(number, work, hashed=work.tensor.name not in known)

    def answered(number: int, record: WorkRecord) -> None:
        shard, work = jobs[number]
        if work.tensor.name in known:
            record.source[work.tensor.name] = known[work.tensor.name]
        if shard.add(record):
            finished(shard.record)

    try:
        crew.do(orders(), answered, progress)
    finally:
        for shard in shards:
            shard.abandon()


class _Shard:
    """A task under way: its file is made by its first order and named by its last answer."""

    def __init__(self, task: ShardTask, out: Path) -> None:
        self.record = ShardRecord(task.file)
        self._task, self._out = task, out
        self._left = len(task.works)
        self._file: ShardFile | None = None

    def order(self, number: int, work: Work, *, hashed: bool) -> WorkOrder:
        if self._file is None:
            self._file = ShardFile(self._out, self._task)
        places = {name: self._file.places[name] for name in work.outputs}
        return WorkOrder(number, work, self._file.path, places, hashed)

    def add(self, part: WorkRecord) -> bool:
        """Take in what one work did; whether it was the last."""
        assert self._file is not None
        self.record.done.take(part)
        self._left -= 1
        if self._left:
            return False
        self.record.size = self._file.size
        self._file.path.rename(self._out / self._task.file)
        self._file = None
        return True

    def abandon(self) -> None:
        if self._file is not None:
            self._file.path.unlink(missing_ok=True)
