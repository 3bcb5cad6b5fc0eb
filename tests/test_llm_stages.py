"""llm.train.steps: a sequential run is two runs in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _tiny import (
    assert_moved,
    assert_same_weights,
    eval_rows,
    make_policy,
    make_trainer,
)

from theory.cli import UserError
from theory.schedulers import (
    Alternate,
    Sequential,
    Single,
)
from theory.tasks import Task


@pytest.mark.parametrize("order", ["dpo_then_sft", "sft_then_dpo"])
def test_sequential_equals_two_separate_runs(order: str, tmp_path: Path) -> None:
    """Bit for bit: weights, momenta and the learning rate start anew at the boundary."""
    options = {"lr_scheduler_type": "linear", "warmup_steps": 2, "weight_decay": 0.1}
    scheduler = Sequential(6, order)
    together = make_trainer(scheduler, tmp_path, max_steps=10, **options)
    together.train()
    tasks = (Task.DPO, Task.SFT) if order == "dpo_then_sft" else (Task.SFT, Task.DPO)
    model: torch.nn.Module = make_policy()
    rates, losses = [], []
    for task, steps in zip(tasks, (6, 4), strict=True):
        single = make_trainer(Single(task), tmp_path, model=model, max_steps=steps, **options)
        single.train()
        model = single.model
        rates += [log["learning_rate"] for log in single.state.log_history if "loss" in log]
        losses += [log["loss"] for log in single.state.log_history if "loss" in log]
    assert_moved(together.model, make_policy())
    assert_same_weights(together.model, model)
    logs = [log for log in together.state.log_history if "loss" in log]
    assert [log["loss"] for log in logs] == losses
    assert [log["learning_rate"] for log in logs] == pytest.approx(rates, rel=1e-12)


def test_the_learning_rate_warms_up_and_decays_in_each_stage(tmp_path: Path) -> None:
    trainer = make_trainer(
        Sequential(6), tmp_path, lr_scheduler_type="linear", warmup_steps=2, learning_rate=1.0
    )
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]
    stage_1 = [0, 1 / 2, 4 / 4, 3 / 4, 2 / 4, 1 / 4]
    stage_2 = [0, 1 / 2, 2 / 2, 1 / 2]
    assert rates == pytest.approx(stage_1 + stage_2, abs=1e-12)


def test_a_warm_up_ratio_counts_the_steps_of_its_stage(tmp_path: Path) -> None:
    trainer = make_trainer(
        Sequential(4), tmp_path, lr_scheduler_type="constant_with_warmup", warmup_steps=0.5
    )
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]
    warm_up = [0, 1 / 2, 1, 1, 0, 1 / 3, 2 / 3, 1, 1, 1]
    assert rates == pytest.approx([1e-2 * factor for factor in warm_up], abs=1e-12)


def test_other_schedules_have_one_learning_rate_curve(tmp_path: Path) -> None:
    trainer = make_trainer(Alternate(0.5, 4), tmp_path, lr_scheduler_type="linear")
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]
    assert rates == pytest.approx([1e-2 * (10 - t) / 10 for t in range(10)])


@pytest.mark.parametrize("first_steps", [0, 10])
def test_a_stage_without_steps_changes_nothing(first_steps: int, tmp_path: Path) -> None:
    options = {"lr_scheduler_type": "linear", "warmup_steps": 2}
    sequential = make_trainer(Sequential(first_steps, "dpo_then_sft"), tmp_path, **options)
    single = make_trainer(Single(Task.SFT if first_steps == 0 else Task.DPO), tmp_path, **options)
    sequential.train()
    single.train()
    assert_same_weights(sequential.model, single.model)


def test_a_learning_rate_that_cannot_restart_is_refused(tmp_path: Path) -> None:
    options = {"lr_scheduler_type": "reduce_lr_on_plateau"}
    options |= {"eval_strategy": "steps", "eval_steps": 5, "metric_for_best_model": "sft_loss"}
    trainer = make_trainer(Sequential(5), tmp_path, held_out=eval_rows(), **options)
    with pytest.raises(UserError, match="cannot restart at a stage boundary"):
        trainer.train()
