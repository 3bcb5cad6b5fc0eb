"""llm.train.trainer: the step is the gradient of the weighted sum, however it is divided up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _tiny import (
    BATCH_SIZES,
    OBJECTIVES,
    PAD_ID,
    assert_moved,
    assert_same_weights,
    make_policy,
    make_trainer,
)
from _training import ONE_STEP, SCHEDULERS, first_batch, loss_on, stepped

from llm.loss.collate import collate_sft
from theory.schedulers import Importance, Maxright, Mix, Single
from theory.scheduling import Scheduler
from theory.tasks import Task


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
