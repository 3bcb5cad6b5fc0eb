"""The parent's side: worker processes, and rounds that are taken in turn.

On a CPU all contenders of a group are alive at once and take their rounds in turn, so that what
disturbs the machine for a while disturbs them alike, and a ratio is one of two rounds side by side.
On CUDA they run one after the other: each is to have the memory for itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from llm.benchmark.plan import Job
from llm.benchmark.worker import serve
from llm.loss.objectives import Row
from llm.processes import Failed, Process, limited
from theory.cli import UserError
from theory.tasks import Task

Record = dict[str, Any]
Say = Callable[[str], None]


class Worker:
    """A contender's process. `record` fills while it answers; `failed` says why it stopped."""

    def __init__(self, name: str, job: Job) -> None:
        self.name, self.job = name, job
        self.record: Record = {"steps_per_round": job.steps, "seconds": [], "rounds": []}
        self._process = Process(serve, environment=limited(job.threads))

    def begin(self, rows: Mapping[Task, Sequence[Row]]) -> None:
        """Build the trainer: so far the process has only imported what all contenders need."""
        self._process.send((self.job, {task: list(rows[task]) for task in rows}))

    def wait(self) -> None:
        """Until the trainer stands, or cannot."""
        self.record |= self._answer()

    @property
    def failed(self) -> str | None:
        return self.record.get("failed")

    def round(self, warm_up: bool) -> None:
        if self.failed:
            return
        self._process.send("go")
        answer = self._answer()
        if self.failed:
            return
        self.record["steps_per_round"] = answer["steps"]
        if warm_up:
            self.record["warm_up_seconds"] = answer["seconds"]
        else:
            self.record["seconds"].append(answer.pop("seconds"))
            self.record["rounds"].append(answer)

    def finish(self) -> None:
        if not self.failed:
            self._process.send("finish")
            self.record |= self._answer()

    def close(self) -> None:
        self._process.close()

    def _answer(self) -> Record:
        """The answer, or nothing from a process that has failed."""
        try:
            return dict(self._process.answer())
        except (Failed, UserError) as error:
            self.record["failed"] = str(error)
            return {}


def measure(
    jobs: Mapping[str, Job],
    rows: Mapping[Task, Sequence[Row]],
    say: Say,
    deadline: float = float("inf"),
) -> Iterator[dict[str, Record]]:
    """The records so far, whenever some are complete.

    A contender that the deadline (of time.monotonic) leaves out fails.
    """
    together = all(job.device == "cpu" for job in jobs.values())
    records: dict[str, Record] = {}
    workers: list[Worker] = []
    try:
        for name, job in jobs.items():
            workers.append(Worker(name, job))
        for part in [workers] if together else [[worker] for worker in workers]:
            if time.monotonic() > deadline:
                late: Record = {"failed": "not run: the time limit was reached"}
                records |= {worker.name: late for worker in part}
            else:
                _measure_in_turn(part, rows, say)
                records |= {worker.name: worker.record for worker in part}
            for worker in part:
                worker.close()
                if "failed" in records[worker.name]:
                    say(f"  {worker.name}: {records[worker.name]['failed']}")
            yield dict(records)
    finally:
        for worker in workers:
            worker.close()


def _measure_in_turn(
    workers: Sequence[Worker], rows: Mapping[Task, Sequence[Row]], say: Say
) -> None:
    for worker in workers:
        worker.begin(rows)
    for worker in workers:
        worker.wait()
    rounds = max(worker.job.rounds for worker in workers)
    for number in range(rounds + 1):
        taking = [worker for worker in workers if number <= worker.job.rounds]
        for worker in taking:
            worker.round(warm_up=number == 0)
        say(f"  round {number} of {rounds}: {', '.join(map(_last_round, taking))}")
    for worker in workers:
        worker.finish()


def _last_round(worker: Worker) -> str:
    if worker.failed:
        return f"{worker.name} failed"
    seconds = [worker.record["warm_up_seconds"], *worker.record["seconds"]][-1]
    return f"{worker.name} {seconds:.2f} s"
