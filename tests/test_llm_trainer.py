"""llm.trainer: decisions, draws, gradients, stages, probes and checkpoints against hand-made ones.

Steps of plain SGD without clipping expose the gradient: theta_1 = theta_0 - lr * grad. Float32
weights of order 0.1 then agree to 1e-6 with a gradient that was summed in another order.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _tiny import (
    BATCH_SIZES,
    OBJECTIVES,
    PAD_ID,
    assert_moved,
    assert_same_weights,
    eval_rows,
    make_policy,
    make_trainer,
    plain_sgd,
    train_rows,
)
from safetensors.torch import load_file
from transformers import TrainerCallback

from llm.collate import collate_sft
from llm.objectives import DPOObjective, Row
from llm.trainer import STATE_KEY, JointTrainer, steps_per_epoch
from theory.cli import UserError
from theory.schedulers import (
    REGISTRY,
    Alright,
    Alternate,
    Importance,
    Maxright,
    Mix,
    Scheduler,
    Sequential,
    Single,
)
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


def test_tokens_seen_counts_the_tokens_of_the_drawn_rows(tmp_path: Path) -> None:
    trainer = make_trainer(Mix(0.5), tmp_path, max_steps=4)
    expected = {}
    for task in Task:
        rows = first_batch(trainer, task, micro_batches=4)
        keys = [key for key in rows[0] if key.endswith("_ids")]
        expected[task] = sum(len(row[key]) for row in rows for key in keys)
    trainer.train()
    assert trainer.tokens_seen == expected


def test_a_batch_of_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes one run"):
        make_trainer(Alright((0.5, 0.5), (0, 1)), tmp_path)


def test_an_epoch_is_one_pass_over_the_data_set_of_more_steps(tmp_path: Path) -> None:
    # 11 pairs by 2 are 6 steps, 17 demonstrations by 3 are 6 steps, by 9 they are 2.
    trainer = make_trainer(Mix(0.5), tmp_path, max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 12
    sizes = {Task.DPO: 11, Task.SFT: 17}
    assert steps_per_epoch(sizes, {Task.DPO: 2, Task.SFT: 9}, trainer.args) == 6
    trainer.args.gradient_accumulation_steps = 4
    assert steps_per_epoch(sizes, {Task.DPO: 2, Task.SFT: 9}, trainer.args) == 2
    assert steps_per_epoch({Task.SFT: 17}, {Task.SFT: 1}, trainer.args) == 5


# --- gradients


def stepped(scheduler: Scheduler, tmp_path: Path, **options: Any) -> JointTrainer:
    """The trainer after one plain SGD step with learning rate 1."""
    trainer = make_trainer(scheduler, tmp_path, **(plain_sgd() | options))
    trainer.train()
    assert_moved(trainer.model, make_policy())
    return trainer


@pytest.mark.parametrize(
    ("scheduler", "weights"),
    [
        (Mix(0.3), {Task.DPO: 0.3, Task.SFT: 0.7}),
        (Single(Task.SFT), {Task.SFT: 1.0}),
        (Single(Task.DPO), {Task.DPO: 1.0}),
        (Importance(0.3, 0.999, seed=0), {Task.DPO: 0.3 / 0.999}),
        (
            Maxright(0.3, (0.0, 0.0), scale_steps=True),
            {Task.SFT: 0.7},  # 0.7 * log 77 > 0.3 * log 2
        ),
    ],
    ids=["mix", "sft", "dpo", "importance", "scaled maxright"],
)
def test_a_step_descends_the_weighted_sum_of_the_objectives(
    scheduler: Scheduler, weights: dict[Task, float], tmp_path: Path
) -> None:
    trainer = stepped(scheduler, tmp_path)
    by_hand = make_policy()
    fresh = make_trainer(scheduler, tmp_path)
    total = sum(
        weight * loss_on(by_hand, task, first_batch(fresh, task))
        for task, weight in weights.items()
    )
    assert isinstance(total, torch.Tensor)
    total.backward()
    with torch.no_grad():
        for parameter in by_hand.parameters():
            parameter -= parameter.grad
    assert_same_weights(trainer.model, by_hand, ONE_STEP)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total.item(), rel=1e-6)


def test_a_step_that_is_not_taken_leaves_the_weights(tmp_path: Path) -> None:
    """lam = 0 is SFT alone, lam = 1 DPO alone: bit for bit, and no draw of the other."""
    for lam, task in ((0.0, Task.SFT), (1.0, Task.DPO)):
        mixed, alone = make_trainer(Mix(lam), tmp_path), make_trainer(Single(task), tmp_path)
        mixed.train()
        alone.train()
        assert_same_weights(mixed.model, alone.model)
        assert mixed.streams[task.other].consumed == 0


@pytest.mark.parametrize("name", ["sft", "dpo", "mix"])
@pytest.mark.parametrize("accumulation", [2, 3])
def test_accumulation_equals_one_large_batch(name: str, accumulation: int, tmp_path: Path) -> None:
    """Micro-batches of different numbers of tokens weigh by their tokens."""
    scheduler = SCHEDULERS[name]
    whole = stepped(
        scheduler,
        tmp_path,
        batch_sizes={task: size * accumulation for task, size in BATCH_SIZES.items()},
    )
    parts = stepped(scheduler, tmp_path, gradient_accumulation_steps=accumulation)
    tokens = [
        OBJECTIVES[Task.SFT].items([parts.train_rows[Task.SFT][i] for i in batch])
        for batch in make_trainer(scheduler, tmp_path).streams[Task.SFT].peek(accumulation)
    ]
    assert len(set(tokens)) > 1  # a mean of means would differ
    assert_same_weights(parts.model, whole.model, ONE_STEP)
    logs = [trainer.state.log_history[0] for trainer in (parts, whole)]
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-6)
    losses = [{key: log[key] for key in log if key in ("dpo_loss", "sft_loss")} for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0]


def test_sft_is_plain_causal_lm_training(tmp_path: Path) -> None:
    """Ten AdamW steps equal a hand-written loop around transformers' own loss."""
    # The bias of the keys has a zero gradient. With the usual epsilon AdamW would blow its rounding
    # noise (1e-9) up to whole steps; with 1e-3 it stays below lr * 1e-6.
    options = {"learning_rate": 1e-2, "weight_decay": 0.0, "adam_epsilon": 1e-3}
    trainer = make_trainer(Single(Task.SFT), tmp_path, max_grad_norm=0.0, **options)
    batches = [
        [trainer.train_rows[Task.SFT][i] for i in batch]
        for batch in trainer.streams[Task.SFT].peek(10)
    ]
    by_hand = make_policy().train()
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-2, weight_decay=0.0, eps=1e-3)
    losses = []
    for rows in batches:
        loss = by_hand(**collate_sft(rows, PAD_ID)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    trainer.train()
    assert_moved(trainer.model, make_policy())
    logged = [log["sft_loss"] for log in trainer.state.log_history if "sft_loss" in log]
    assert logged == pytest.approx(losses, rel=1e-6)
    assert_same_weights(trainer.model, by_hand, 1e-5)


def test_the_step_loss_is_the_weighted_sum_of_the_logged_losses(tmp_path: Path) -> None:
    trainer = make_trainer(Mix(0.3), tmp_path, gradient_accumulation_steps=2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 10
    for log in logs:
        expected = 0.3 * log["dpo_loss"] + 0.7 * log["sft_loss"]
        assert log["loss"] == pytest.approx(expected, rel=1e-6)


def test_logged_means_do_not_depend_on_how_often_is_logged(tmp_path: Path) -> None:
    often, rarely = (make_trainer(Alternate(0.5, 2), tmp_path, logging_steps=n) for n in (1, 10))
    often.train()
    rarely.train()
    (summary,) = [log for log in rarely.state.log_history if "loss" in log]
    for name in ("dpo_loss", "sft_loss", "dpo_reward_margin"):
        values = [log[name] for log in often.state.log_history if name in log]
        assert len(values) == 5
        assert summary[name] == pytest.approx(np.mean(values), rel=1e-5, abs=1e-7)
    assert (summary["dpo_steps"], summary["sft_steps"]) == (5, 5)


# --- sequential: two runs in one


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
    sequential = make_trainer(Sequential(first_steps), tmp_path, **options)
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


# --- MAXRIGHT: probes


class Watch(TrainerCallback):
    """Keeps a copy of the schedule's values after every step."""

    def __init__(self) -> None:
        self.trainer: JointTrainer
        self.values: list[list[float]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        values = self.trainer.schedule.values
        assert values is not None
        self.values.append(values.tolist())


@pytest.mark.parametrize(("refresh_every", "probes"), [(1, 10), (3, 4), (10, 1), (50, 1)])
def test_maxright_probes_once_per_period(refresh_every: int, probes: int, tmp_path: Path) -> None:
    trainer = make_trainer(Maxright(0.5, (0.0, 0.0), refresh_every=refresh_every), tmp_path)
    trainer.train()
    assert trainer.probes == probes == math.ceil(10 / refresh_every)


@pytest.mark.parametrize("lam", [0.2, 0.9])
def test_maxright_steps_on_the_larger_weighted_gap(lam: float, tmp_path: Path) -> None:
    """At step 0 the losses are those of the initial policy on the next batches of each stream."""
    optimum = (0.1, 1.0)
    trainer = make_trainer(Maxright(lam, optimum, refresh_every=4), tmp_path)
    watch = Watch()
    watch.trainer = trainer
    trainer.add_callback(watch)
    with torch.no_grad():
        model = make_policy().eval()
        losses = [loss_on(model, task, first_batch(trainer, task)).item() for task in Task]
    heights = [
        weight * (loss - best)
        for weight, loss, best in zip((lam, 1 - lam), losses, optimum, strict=True)
    ]
    trainer.train()
    first = Task.DPO if heights[Task.DPO] >= heights[Task.SFT] else Task.SFT
    assert trainer.decisions[0][first] == 1.0
    # The step's own loss replaces the probed one, on the same batch: they agree without dropout.
    assert watch.values[0] == pytest.approx(losses, rel=1e-6)
    for before, after, decision in zip(
        watch.values[:3], watch.values[1:4], trainer.decisions[1:4], strict=True
    ):
        chosen = [w * (v - b) for w, v, b in zip((lam, 1 - lam), before, optimum, strict=True)]
        task = Task.DPO if chosen[0] >= chosen[1] else Task.SFT
        assert decision[task] == 1.0
        assert after[task.other] == before[task.other]  # stale until the next probe
        assert after[task] != before[task]  # renewed by the step itself
    last = [log for log in trainer.state.log_history if "loss" in log][-1]
    task = Task.DPO if trainer.decisions[-1][Task.DPO] else Task.SFT
    assert trainer.schedule.values[task] == pytest.approx(last["loss"], rel=1e-6)


def test_maxright_takes_both_objectives_when_their_gaps_cross(tmp_path: Path) -> None:
    trainer = make_trainer(
        Maxright(0.85, (0.0, 0.0), refresh_every=2), tmp_path, max_steps=30, learning_rate=3e-2
    )
    trainer.train()
    assert min(trainer.steps_taken.values()) > 0


def test_a_probe_consumes_no_rows_and_moves_no_weights(tmp_path: Path) -> None:
    """MAXRIGHT that always selects SFT trains bit for bit like SFT alone, dropout or not."""
    options: dict[str, Any] = {"hidden_dropout": 0.1}
    scheduler = Maxright(0.0, (0.0, 0.0), refresh_every=1)
    probed = make_trainer(scheduler, tmp_path, model=make_policy(**options))
    probed.train()
    alone = make_trainer(Single(Task.SFT), tmp_path, model=make_policy(**options))
    alone.train()
    assert probed.probes == 10
    assert probed.streams[Task.DPO].consumed == 0
    assert_same_weights(probed.model, alone.model)


def test_a_probe_covers_every_micro_batch_of_the_step(tmp_path: Path) -> None:
    scheduler = Maxright(0.5, (0.0, 0.0), refresh_every=1)
    whole = make_trainer(
        scheduler,
        tmp_path,
        max_steps=1,
        batch_sizes={task: 2 * n for task, n in BATCH_SIZES.items()},
    )
    parts = make_trainer(scheduler, tmp_path, max_steps=1, gradient_accumulation_steps=2)
    whole.train()
    parts.train()
    np.testing.assert_allclose(parts.schedule.values, whole.schedule.values, rtol=1e-6)


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


def checkpointed(name: str, output_dir: Path, at: int, **options: Any) -> JointTrainer:
    """Twelve steps in one go, with a checkpoint after `at` of them."""
    trainer = make_trainer(
        RESUMED[name],
        output_dir,
        model=make_policy(hidden_dropout=0.1),
        max_steps=12,
        save_strategy="steps",
        save_steps=at,
        save_total_limit=None,
        **(RESUME_OPTIONS | options),
    )
    trainer.train()
    return trainer


def resumed(name: str, output_dir: Path, at: int, **options: Any) -> JointTrainer:
    """A new trainer with other initial weights that continues from the checkpoint."""
    trainer = make_trainer(
        RESUMED[name],
        output_dir,
        model=make_policy(seed=9, hidden_dropout=0.1),
        max_steps=12,
        **(RESUME_OPTIONS | options),
    )
    trainer.train(resume_from_checkpoint=str(output_dir / f"checkpoint-{at}"))
    return trainer


RESUMED = {
    **SCHEDULERS,
    "sequential": Sequential(7, "dpo_then_sft"),
    "maxright": Maxright(0.85, (0.0, 0.0), refresh_every=4),
}
RESUME_OPTIONS = {"lr_scheduler_type": "linear", "warmup_steps": 2, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("alright", 6),
        ("mix", 6),
        ("maxright", 6),  # between two refreshes, at 4 and 8
        ("maxright", 8),  # at a refresh
        ("sequential", 4),  # in the first stage
        ("sequential", 7),  # at the boundary
        ("sequential", 9),  # in the second stage
        ("alternate", 5),
        ("importance", 5),
        ("dpo", 6),
        ("sft", 6),
    ],
)
def test_a_resumed_run_is_the_straight_run_bit_for_bit(name: str, at: int, tmp_path: Path) -> None:
    straight = checkpointed(name, tmp_path, at)
    saved = json.loads((tmp_path / f"checkpoint-{at}" / "trainer_state.json").read_text())
    state = saved["stateful_callbacks"][STATE_KEY]
    assert state["schedule"]["step"] == len(state["decisions"]) == at
    continued = resumed(name, tmp_path, at)
    assert_moved(continued.model, make_policy(seed=9))
    assert_same_weights(continued.model, straight.model)
    assert continued.state_to_json() == straight.state_to_json()
    assert len(continued.decisions) == 12
    losses = [
        [log["loss"] for log in trainer.state.log_history if "loss" in log]
        for trainer in (continued, straight)
    ]
    assert losses[0] == losses[1]


def test_a_run_resumes_with_accumulation_across_an_epoch(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 3}  # an epoch is 2 steps
    straight = checkpointed("alright", tmp_path, 5, **options)
    continued = resumed("alright", tmp_path, 5, **options)
    assert_same_weights(continued.model, straight.model)
    assert continued.state_to_json() == straight.state_to_json()


def test_the_trained_head_of_gpt_neox_is_restored(tmp_path: Path) -> None:
    """Upstream's resume leaves it behind: the checkpoint calls it embed_out, the model lm_head."""
    straight = checkpointed("sft", tmp_path, 6)
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert "embed_out.weight" in saved  # else upstream has renamed it and the override can go
    fresh = make_trainer(RESUMED["sft"], tmp_path, model=make_policy(seed=9))
    fresh._load_from_checkpoint(str(tmp_path / "checkpoint-6"))
    assert torch.equal(fresh.model.lm_head.weight, saved["embed_out.weight"])
    assert not torch.equal(straight.model.lm_head.weight, saved["embed_out.weight"])


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


def test_a_checkpoint_without_a_schedule_is_refused(tmp_path: Path) -> None:
    checkpointed("alright", tmp_path, 6)
    path = tmp_path / "checkpoint-6" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"][STATE_KEY]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="not written by this trainer"):
        resumed("alright", tmp_path, 6)


def test_a_checkpoint_holds_plain_data(tmp_path: Path) -> None:
    trainer = checkpointed("maxright", tmp_path, 6)
    state = trainer.state_to_json()
    assert json.loads(json.dumps(state)) == state


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"scheduler": Alright(0.6, seed=4)}, "schedule"),
        ({"scheduler": Alright(0.5, seed=5)}, "schedule"),
        ({"scheduler": Single(Task.DPO), "tasks": [Task.DPO]}, "schedule|sft"),
        ({"objectives": OBJECTIVES | {Task.DPO: DPOObjective(beta=0.2)}}, "dpo loss"),
        ({"rows": {task: rows[1:] for task, rows in train_rows().items()}}, "dpo data"),
        ({"rows": train_rows() | {Task.SFT: train_rows()[Task.SFT][::-1]}}, "sft data"),
        ({"data_seed": 7}, "dpo order"),
    ],
    ids=["lam", "seed", "algorithm", "beta", "fewer rows", "other order of rows", "data seed"],
)
def test_a_checkpoint_of_another_run_is_refused(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    checkpointed("alright", tmp_path, 6)
    options: dict[str, Any] = {"scheduler": RESUMED["alright"], "max_steps": 12} | changes
    other = make_trainer(options.pop("scheduler"), tmp_path, **options)
    with pytest.raises(UserError, match=f"belongs to another run: its ({named}) is"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_a_run_may_be_continued_for_longer(tmp_path: Path) -> None:
    checkpointed("alright", tmp_path, 6)
    longer = make_trainer(RESUMED["alright"], tmp_path, max_steps=20)
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert longer.decisions == own_decisions(RESUMED["alright"], 20)


# --- several processes

ONE_OF_TWO_RANKS = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
from _tiny import make_trainer
from test_llm_trainer import ON_TWO_RANKS
trainer = make_trainer(**ON_TWO_RANKS, output_dir=Path({out!r}))
assert trainer.args.world_size == 2
trainer.train()
log = trainer.state.log_history
torch.save([trainer.model.state_dict(), trainer.state_to_json(), log],
           Path({out!r}) / f"rank{{trainer.args.process_index}}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()  # gloo's threads must be gone before the interpreter
"""
ON_TWO_RANKS: dict[str, Any] = {
    "scheduler": Maxright(0.85, (0.0, 0.0), refresh_every=3),
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.3,
    "optim": "sgd",
    "max_steps": 8,
}


def test_two_ranks_train_like_one_with_twice_the_batch(tmp_path: Path) -> None:
    """Same decisions without talking, same gradients, same logged means; in real processes."""
    tests = Path(__file__).parent
    program = ONE_OF_TWO_RANKS.format(root=str(tests.parent), tests=str(tests), out=str(tmp_path))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-2000:]
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    alone = make_trainer(
        **ON_TWO_RANKS,
        output_dir=tmp_path,
        batch_sizes={task: 2 * size for task, size in BATCH_SIZES.items()},
    )
    alone.train()
    assert min(alone.steps_taken.values()) > 0  # both objectives took part
    expected_logs = [log for log in alone.state.log_history if "loss" in log]
    for rank in range(2):
        weights, state, logs = torch.load(tmp_path / f"rank{rank}.pt")
        # Eight steps with a learning rate of 0.3 from sums in another order.
        torch.testing.assert_close(weights, alone.model.state_dict(), rtol=1e-5, atol=1e-5)
        for name in ("decisions", "consumed", "steps_taken", "probes"):
            assert state[name] == alone.state_to_json()[name]
        for log, expected in zip((x for x in logs if "loss" in x), expected_logs, strict=True):
            names = expected.keys() - {"grad_norm", "epoch"}
            assert {name: log[name] for name in names} == pytest.approx(
                {name: expected[name] for name in names}, rel=1e-4, abs=1e-5
            )
