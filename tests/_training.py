"""What the tests of the training loop share: schedules of every kind, losses and steps by hand.

Steps of plain SGD without clipping expose the gradient: theta_1 = theta_0 - lr * grad. Float32
weights of order 0.1 then agree to 1e-6 with a gradient that was summed in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from _tiny import (
    OBJECTIVES,
    PAD_ID,
    assert_moved,
    make_policy,
    make_trainer,
    plain_sgd,
)

from llm.loss.objectives import Row
from llm.train.trainer import JointTrainer
from theory.schedulers import Alright, Alternate, Importance, Maxright, Mix, Sequential, Single
from theory.scheduling import Scheduler
from theory.tasks import Task

# One step of SGD on weights of order 0.1 with learning rate 1: a few roundings of float32.
ONE_STEP = 1e-6
SCHEDULERS: dict[str, Scheduler] = {
    "sequential": Sequential(6, "sft_then_dpo"),
    "mix": Mix(0.3),
    "alright": Alright(0.5, seed=4),
    "maxright": Maxright(0.8, (0.1, 2.0), refresh_every=4),
    "importance": Importance(0.3, 0.6, seed=4),
    "alternate": Alternate(0.5, 3),
    "dpo": Single(Task.DPO),
    "sft": Single(Task.SFT),
}


def own_decisions(scheduler: Scheduler, num_steps: int) -> list[list[float]]:
    """What the scheduler decides when nobody trains."""

    def no_probe() -> Any:
        raise AssertionError("this scheduler needs no losses")

    decisions, state = [], scheduler.init()
    for _ in range(num_steps):
        weights, state = scheduler.select(state, no_probe)
        decisions.append(weights.tolist())
        state = scheduler.observe(state)
    return decisions


def first_batch(trainer: JointTrainer, task: Task, micro_batches: int = 1) -> list[Row]:
    """The rows of the next step of `task`."""
    batches = trainer.streams[task].peek(micro_batches)
    return [trainer.train_rows[task][i] for batch in batches for i in batch]


def loss_on(model: torch.nn.Module, task: Task, rows: list[Row]) -> torch.Tensor:
    objective = OBJECTIVES[task]
    return objective(model, objective.collate(rows, PAD_ID)).total / objective.items(rows)


def stepped(scheduler: Scheduler, tmp_path: Path, **options: Any) -> JointTrainer:
    """The trainer after one plain SGD step with learning rate 1."""
    trainer = make_trainer(scheduler, tmp_path, **(plain_sgd() | options))
    trainer.train()
    assert_moved(trainer.model, make_policy())
    return trainer
