"""llm.train.trainer: decisions, draws, evaluation, and losses that are not numbers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from _tiny import (
    BATCH_SIZES,
    assert_same_weights,
    eval_rows,
    make_policy,
    make_trainer,
    train_rows,
)
from _training import SCHEDULERS, own_decisions

from llm.loss.objectives import Row
from llm.train.streams import open_streams, steps_per_epoch
from theory.cli import UserError
from theory.schedulers import (
    REGISTRY,
    Alright,
    Mix,
    Single,
)
from theory.tasks import Task

# --- decisions and draws


def test_every_algorithm_is_tested_here() -> None:
    assert set(SCHEDULERS) == set(REGISTRY)


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - {"maxright"}))
def test_decisions_are_the_schedulers_own(name: str, tmp_path: Path) -> None:
    scheduler = SCHEDULERS[name]
    trainer = make_trainer(scheduler, tmp_path)
    trainer.train()
    assert trainer.decisions == own_decisions(scheduler, 10)
    assert trainer.probes == 0


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_objective_draws_exactly_what_it_trains_on(name: str, tmp_path: Path) -> None:
    """consumed == steps * batch size * accumulation: zero weight, zero rows."""
    trainer = make_trainer(SCHEDULERS[name], tmp_path, gradient_accumulation_steps=2)
    trainer.train()
    weights = np.array(trainer.decisions)
    assert len(weights) == trainer.schedule.step == 10
    for task in Task:
        steps = int(np.count_nonzero(weights[:, task]))
        assert trainer.steps_taken[task] == steps
        assert trainer.streams[task].consumed == steps * BATCH_SIZES[task] * 2


def test_an_algorithm_of_one_objective_needs_no_data_of_the_other(tmp_path: Path) -> None:
    for task in Task:
        trainer = make_trainer(Single(task), tmp_path, tasks=[task])
        trainer.train()
        assert trainer.steps_taken == {task: 10}


def test_a_selected_objective_without_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="selected dpo, but it has no training data"):
        make_trainer(Mix(0.5), tmp_path, tasks=[Task.SFT]).train()


def test_a_batch_of_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes one run"):
        make_trainer(Alright((0.5, 0.5), (0, 1)), tmp_path)


def test_an_epoch_is_one_pass_over_the_data_set_of_more_steps(tmp_path: Path) -> None:
    # 11 pairs by 2 are 6 steps, 17 demonstrations by 3 are 6 steps, by 9 they are 2.
    trainer = make_trainer(Mix(0.5), tmp_path, max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 12
    rows, sizes = train_rows(), {Task.DPO: 2, Task.SFT: 9}
    assert steps_per_epoch(open_streams(rows, sizes, trainer.args), trainer.args) == 6
    trainer.args.gradient_accumulation_steps = 4
    assert steps_per_epoch(open_streams(rows, sizes, trainer.args), trainer.args) == 2
    by_one = open_streams({Task.SFT: rows[Task.SFT]}, {Task.SFT: 1}, trainer.args)
    assert steps_per_epoch(by_one, trainer.args) == 5


# --- evaluation


def test_metrics_are_named_after_their_objective(tmp_path: Path) -> None:
    trainer = make_trainer(
        Mix(0.5), tmp_path, held_out=eval_rows(), eval_strategy="steps", eval_steps=5
    )
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_dpo_loss" in log]
    assert [log["step"] for log in evaluations] == [5, 10]
    names = {f"eval_dpo_{name}" for name in ("loss", "reward_accuracy", "reward_margin")}
    names |= {"eval_dpo_chosen_logps", "eval_dpo_rejected_logps"}
    names |= {"eval_sft_loss", "eval_sft_sequence_loss"}
    assert {name for name in evaluations[0] if name.startswith("eval_")} == names
    held_out = trainer.held_out()
    assert {f"eval_{name}": value for name, value in held_out.items()} == pytest.approx(
        {name: evaluations[-1][name] for name in names}, rel=1e-6
    )


def test_evaluation_has_no_effect_on_training(tmp_path: Path) -> None:
    plain, evaluated = (
        make_trainer(
            Alright(0.5, 4),
            tmp_path,
            model=make_policy(hidden_dropout=0.1),
            held_out=eval_rows(),
            eval_strategy=strategy,
            eval_steps=2,
        )
        for strategy in ("no", "steps")
    )
    # Both policies exist by now: training starts from the same random state.
    for trainer in (plain, evaluated):
        torch.manual_seed(0)
        trainer.train()
    assert sum("eval_sft_loss" in log for log in evaluated.state.log_history) == 5
    assert_same_weights(evaluated.model, plain.model)


# --- a loss that is not a number


def rows_without_a_number() -> dict[Task, list[Row]]:
    rows = train_rows()
    for row in rows[Task.DPO]:
        row["ref_chosen_logps"] = math.nan
    return rows


@pytest.mark.parametrize("logging_steps", [1, 500])
def test_a_nan_loss_stops_the_run_with_one_line(logging_steps: int, tmp_path: Path) -> None:
    """Also where the run ends before its first log."""
    trainer = make_trainer(
        Mix(0.5), tmp_path, rows=rows_without_a_number(), logging_steps=logging_steps
    )
    with pytest.raises(UserError, match="the loss is nan") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert trainer.state.global_step == min(logging_steps, 10)


def test_a_nan_loss_is_never_saved(tmp_path: Path) -> None:
    trainer = make_trainer(
        Mix(0.5),
        tmp_path,
        rows=rows_without_a_number(),
        logging_steps=500,
        save_strategy="steps",
        save_steps=2,
    )
    with pytest.raises(UserError, match="dpo_reward_margin is nan at step 2"):
        trainer.train()
    assert list(tmp_path.glob("checkpoint-*")) == []


# --- checkpoints


def test_the_best_model_at_the_end_has_its_own_head(tmp_path: Path) -> None:
    """The same trap as on resume: the best checkpoint is loaded with its trained head."""
    trainer = make_trainer(
        Single(Task.DPO),
        tmp_path,
        tasks=[Task.DPO],
        held_out={Task.SFT: eval_rows()[Task.SFT]},  # gets worse from the start on
        max_steps=4,
        learning_rate=0.1,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="sft_loss",
    )
    trainer.train()
    losses = [log["eval_sft_loss"] for log in trainer.state.log_history if "eval_sft_loss" in log]
    best = int(np.argmin(losses)) + 1
    assert best < 4
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.held_out()["sft_loss"] == pytest.approx(min(losses), rel=1e-6)
