"""One contender in a process of its own: trains, and reports every round on its standard output.

Reads one line of JSON (the job and its rows) and builds the trainer. Then it answers with one line
when it is ready, and for every line that it reads does one round and writes what the round took.
The pace is kept from inside `Trainer.train()`, between two optimiser steps, so that drawing and
collating the first batch of a round counts like those of all others.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from tempfile import TemporaryDirectory
from typing import Any, TextIO

import torch
from transformers import TrainerCallback, TrainerControl

from llm.benchmark.contenders import builder
from llm.benchmark.device import now, peak_mib, used_mib
from llm.benchmark.plan import Job
from llm.benchmark.shared import RowSets
from theory.tasks import Task


class Pacing(TrainerCallback):
    """Waits for a line before each round and writes one after it."""

    def __init__(self, device: torch.device, commands: TextIO, answers: TextIO) -> None:
        self.device, self.commands, self.answers = device, commands, answers
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

    def say(self, **answer: Any) -> None:
        self.answers.write(json.dumps(answer) + "\n")
        self.answers.flush()

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
        self.say(**answer)

    def _wait(self) -> None:
        self._winners, self.forwards = [], 0
        self._probes_before_step = getattr(self.trainer, "probes", 0)
        if not self.commands.readline():
            raise SystemExit(0)  # the parent is gone
        self._begin = now(self.device)

    def _count(self, *_: Any) -> None:
        self.forwards += 1


def run(commands: TextIO, answers: TextIO) -> None:
    message = json.loads(commands.readline())
    rows = {Task[label.upper()]: rows for label, rows in message["rows"].items()}
    with TemporaryDirectory() as folder:
        train(Job(**message["job"] | {"folder": folder}), rows, commands, answers)


def train(job: Job, rows: RowSets, commands: TextIO, answers: TextIO) -> None:
    torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    pacing = Pacing(device, commands, answers)
    try:
        build = builder(job.side)
        before = used_mib(device)
        built = build(job, rows, pacing)
        pacing.attach(built.trainer, built.steps)
        pacing.say(ready=True, before_mib=before, notes=built.notes)
        built.trainer.train()
        pacing.say(peak_mib=peak_mib(device))
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        pacing.say(failed=f"{type(error).__name__}: {lines[0]}")


def main() -> None:
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run(sys.stdin, answers)


if __name__ == "__main__":
    main()
