"""llm.train.clipping: one factor for both objectives, and no step beyond the limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _tiny import (
    BATCH_SIZES,
    assert_moved,
    assert_same_weights,
    make_policy,
    make_trainer,
    plain_sgd,
)
from _training import SCHEDULERS, first_batch, loss_on
from transformers import Trainer, TrainerCallback

from llm.flags.parse import parse
from llm.loss.objectives import Row, Terms
from llm.train.clipping import OUTLIER, RATE, StepNorms
from llm.train.trainer import JointTrainer
from theory.cli import UserError
from theory.schedulers import Alternate, Importance
from theory.scheduling import Scheduler
from theory.tasks import Task

# Lengths of steps of order 0.1 to 1, taken from differences of float32 weights of order 1.
LENGTH = 1e-4
NORMS = {Task.DPO: 10.0, Task.SFT: 1.0}


@dataclass(frozen=True)
class Linear:
    """A linear objective: its gradient has the norm `slope`, everywhere and on every batch."""

    task: Task
    slope: float
    packing: bool = False

    def collate(self, rows: Sequence[Row], pad_token_id: int) -> dict[str, torch.Tensor]:
        return {"rows": torch.tensor(len(rows))}

    def items(self, rows: Sequence[Row]) -> int:
        return len(rows)

    def __call__(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Terms:
        weight = next(model.parameters())
        return Terms(batch["rows"] * self.slope * weight.sum() / math.sqrt(weight.numel()))


class StepLengths(TrainerCallback):
    """How far each step has moved the weights."""

    def __init__(self) -> None:
        self.lengths: list[float] = []

    def on_step_begin(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        self.before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()

    def on_step_end(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        after = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        self.lengths.append(float((after - self.before).double().norm()))


def step_lengths(
    scheduler: Scheduler, output_dir: Path, **options: Any
) -> list[tuple[Task, float]]:
    """(objective, length) of each step of SGD with learning rate 1 on linear objectives."""
    objectives: Any = {task: Linear(task, norm) for task, norm in NORMS.items()}
    options = plain_sgd(max_steps=20, max_grad_norm=1.0) | {"objectives": objectives} | options
    trainer = make_trainer(scheduler, output_dir, **options)
    watch = StepLengths()
    trainer.add_callback(watch)
    trainer.train()
    tasks = [Task.DPO if weights[Task.DPO] else Task.SFT for weights in trainer.decisions]
    assert set(tasks) == set(Task)
    return list(zip(tasks, watch.lengths, strict=True))


# --- the ratio between the objectives


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_ratio_of_the_gradients_survives(accumulation: int, tmp_path: Path) -> None:
    """Gradients of 10 and 1 under a limit of 1: steps of 1 and 0.1 once both have been seen."""
    lengths = step_lengths(Alternate(0.5, 4), tmp_path, gradient_accumulation_steps=accumulation)
    assert [task for task, _ in lengths[:4]] == [Task.DPO] * 2 + [Task.SFT] * 2
    for task, length in lengths:
        assert length == pytest.approx(NORMS[task] / 10.0, rel=LENGTH)


def test_per_step_clipping_makes_the_objectives_equal(tmp_path: Path) -> None:
    """What the paper's code does: the gradient of 10 counts as the gradient of 1."""
    for _, length in step_lengths(Alternate(0.5, 4), tmp_path, clipping="per_step"):
        assert length == pytest.approx(1.0, rel=LENGTH)


def test_a_weighted_step_counts_with_its_weight(tmp_path: Path) -> None:
    """Importance sampling steps on w_i / p_i grad f_i: those lengths keep their ratio."""
    lam, p = 0.2, 0.8
    expected = {
        Task.DPO: lam / p * NORMS[Task.DPO],
        Task.SFT: (1 - lam) / (1 - p) * NORMS[Task.SFT],
    }
    assert expected[Task.SFT] > expected[Task.DPO] > 1.0  # the weights turn the order round
    lengths = step_lengths(Importance(lam, p, seed=1), tmp_path)
    first = {task: [t for t, _ in lengths].index(task) for task in Task}
    for task, length in lengths[max(first.values()) :]:
        assert length == pytest.approx(expected[task] / expected[Task.SFT], rel=LENGTH)


def test_short_gradients_are_left_alone(tmp_path: Path) -> None:
    for task, length in step_lengths(Alternate(0.5, 2), tmp_path, max_grad_norm=20.0):
        assert length == pytest.approx(NORMS[task], rel=LENGTH)


@pytest.mark.parametrize("clipping", ["global", "per_step"])
def test_no_step_is_longer_than_the_limit(clipping: str, tmp_path: Path) -> None:
    limit, watch = 0.05, StepLengths()
    options = plain_sgd(max_steps=12, max_grad_norm=limit, clipping=clipping)
    trainer = make_trainer(SCHEDULERS["alright"], tmp_path, **options)
    trainer.add_callback(watch)
    trainer.train()
    assert max(watch.lengths) <= limit * (1 + LENGTH)
    assert max(watch.lengths) > 0.9 * limit  # it was the limit that held them


# --- where there is nothing to distort, nothing changes


@pytest.mark.parametrize("name", ["dpo", "sft", "mix", "sequential"])
def test_one_objective_or_both_in_each_step_are_clipped_as_everywhere(
    name: str, tmp_path: Path
) -> None:
    """Bit for bit, with the stages of a sequence apart."""
    trained = []
    for clipping in ("global", "per_step"):
        trainer = make_trainer(SCHEDULERS[name], tmp_path, max_grad_norm=0.05, clipping=clipping)
        trainer.train()
        trained.append(trainer.model)
    assert_moved(trained[0], make_policy())
    assert_same_weights(trained[0], trained[1])


def test_deepspeed_has_clipped_by_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It clips inside its own step and leaves no gradient to look at."""
    trainer = make_trainer(SCHEDULERS["dpo"], tmp_path)
    trainer.step_weights = np.array([1.0, 0.0])
    trainer.is_deepspeed_enabled = True
    monkeypatch.setattr(Trainer, "_clip_grad_norm", lambda self, model: "its own norm")
    assert trainer._clip_grad_norm(trainer.model) == "its own norm"
    assert trainer.step_norms.values.tolist() == [0.0, 0.0]


def test_per_step_clipping_is_that_of_torch(tmp_path: Path) -> None:
    """Ten steps equal a hand-written loop around clip_grad_norm_."""
    options = plain_sgd(max_steps=10, learning_rate=0.3, max_grad_norm=0.05, clipping="per_step")
    scheduler = SCHEDULERS["alternate"]
    trainer = make_trainer(scheduler, tmp_path, **options)
    by_hand, fresh = make_policy(), make_trainer(scheduler, tmp_path, **options)
    trainer.train()
    for weights in trainer.decisions:
        task = Task.DPO if weights[Task.DPO] else Task.SFT
        by_hand.zero_grad()
        loss_on(by_hand, task, first_batch(fresh, task)).backward()
        fresh.streams[task].advance(1)
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.05)
        with torch.no_grad():
            for parameter in by_hand.parameters():
                parameter -= 0.3 * parameter.grad
    assert_moved(trainer.model, make_policy())
    assert_same_weights(trainer.model, by_hand, 1e-6)


# --- state


def clipped(output_dir: Path, seed: int = 0, **options: Any) -> JointTrainer:
    """Twelve AdamW steps with a limit below every gradient."""
    return make_trainer(
        SCHEDULERS["alright"],
        output_dir,
        model=make_policy(seed),
        max_steps=12,
        max_grad_norm=0.05,
        **options,
    )


def test_a_resumed_run_clips_like_the_straight_run(tmp_path: Path) -> None:
    straight = clipped(tmp_path, save_strategy="steps", save_steps=7)
    straight.train()
    assert (straight.step_norms.values > 0.05).all()
    continued = clipped(tmp_path, seed=9)
    continued.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert_same_weights(continued.model, straight.model)
    assert continued.state_to_json() == straight.state_to_json()


def test_accumulation_clips_like_one_large_batch(tmp_path: Path) -> None:
    """Twelve steps of SGD; sums in another order differ by a few roundings a step."""
    sgd = {"optim": "sgd", "learning_rate": 1.0}
    parts = clipped(tmp_path, gradient_accumulation_steps=2, **sgd)
    sizes = {task: 2 * size for task, size in BATCH_SIZES.items()}
    whole = clipped(tmp_path, batch_sizes=sizes, **sgd)
    parts.train()
    whole.train()
    assert_moved(parts.model, make_policy())
    assert_same_weights(parts.model, whole.model, 1e-5)


def reference(norms: StepNorms, task: Task, norm: float) -> float:
    return float(norms.reference(task, torch.tensor(norm)))


def test_the_running_norm_follows_and_is_not_thrown() -> None:
    norms = StepNorms(torch.device("cpu"))
    assert reference(norms, Task.DPO, 4.0) == 4.0
    assert reference(norms, Task.DPO, 1.0) == 1.0  # one objective: its own norm
    dpo = 4.0 + RATE * (1.0 - 4.0)
    assert reference(norms, Task.SFT, 2.0) == pytest.approx(dpo)
    assert reference(norms, Task.SFT, 1e6) == 1e6  # the explosion itself is cut,
    sft = 2.0 + RATE * (OUTLIER * 2.0 - 2.0)  # and remembered as a moderate one
    assert norms.to_json() == pytest.approx({"dpo": dpo, "sft": sft})
    for overflow in (math.inf, math.nan):
        assert not math.isfinite(reference(norms, Task.SFT, overflow))
    assert norms.to_json() == pytest.approx({"dpo": dpo, "sft": sft})
    copy = StepNorms(torch.device("cpu"))
    copy.restore(norms.to_json())
    assert torch.equal(copy.values, norms.values)
    norms.forget()
    assert reference(norms, Task.SFT, 0.5) == 0.5


# --- flags


def test_a_clipping_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="--clipping is not used with --max_grad_norm 0"):
        parse(["--use_cpu", "true", "--max_grad_norm", "0", "--clipping", "global"])
    assert parse(["--use_cpu", "true"]).training.clipping == "global"
