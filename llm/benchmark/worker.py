"""One contender in a process of its own: trains, and reports every round.

It is sent the job and its rows, builds the trainer and says that it is ready. Then it does one
round for every message and answers with what the round took, and with its memory at the end. The
pace is kept from inside `Trainer.train()`, between two optimiser steps, so that drawing and
collating the first batch of a round counts like those of all others.
"""

from __future__ import annotations

from dataclasses import replace
from multiprocessing.connection import Connection
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl

from llm.benchmark.contenders import builder
from llm.benchmark.device import now, peak_mib, used_mib
from llm.benchmark.plan import Job
from llm.benchmark.shared import RowSets
from theory.tasks import Task


class Pacing(TrainerCallback):
    """Waits for a message before each round and answers after it."""

    def __init__(self, device: torch.device, connection: Connection) -> None:
        self.device, self.connection = device, connection
        self.trainer: Any = None
        self.steps = 0
        self.forwards = 0
        self._begin = 0.0
        self._done = 0
        self._probes_before_step = 0
        self._winners: list[list[float]] = []

    def attach(self, trainer: Any, steps: int) -> None:
        self.trainer, self.steps = trainer, steps
        trainer.model.register_forward_pre_hook(self._count)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._wait()

    def on_step_end(
        self, args: Any, state: Any, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self._done += 1
        probes = getattr(self.trainer, "probes", 0)
        if probes > self._probes_before_step:
            self._winners.append(self.trainer.decisions[-1])
        self._probes_before_step = probes
        if self._done % self.steps == 0:
            self._report()
            if state.global_step < state.max_steps:
                self._wait()
        return control

    def _report(self) -> None:
        seconds = now(self.device) - self._begin
        answer: dict[str, Any] = {"seconds": seconds, "steps": self.steps}
        if hasattr(self.trainer, "decisions"):
            decisions = self.trainer.decisions[-self.steps :]
            for task in Task:
                answer[f"{task.label}_steps"] = sum(weights[task] > 0.0 for weights in decisions)
            answer |= {"probes": len(self._winners), "forwards": self.forwards}
            answer["dpo_wins"] = sum(weights[Task.DPO] > 0.0 for weights in self._winners)
        self.connection.send(answer)

    def _wait(self) -> None:
        self._winners, self.forwards = [], 0
        self._probes_before_step = getattr(self.trainer, "probes", 0)
        self.connection.recv()
        self._begin = now(self.device)

    def _count(self, *_: Any) -> None:
        self.forwards += 1


def serve(connection: Connection) -> None:
    job, rows = connection.recv()
    with TemporaryDirectory() as folder:
        train(replace(job, folder=folder), rows, connection)


def train(job: Job, rows: RowSets, connection: Connection) -> None:
    torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    pacing = Pacing(device, connection)
    build = builder(job.side)
    before = used_mib(device)
    built = build(job, rows, pacing)
    pacing.attach(built.trainer, built.steps)
    connection.send({"before_mib": before, "notes": built.notes})
    built.trainer.train()
    connection.recv()
    connection.send({"peak_mib": peak_mib(device)})
