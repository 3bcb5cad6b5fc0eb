"""llm.train.gram: schedules that weigh the step's own gradients, against autograd by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _gram import MinNorm, min_norm
from _tiny import assert_same_weights, make_policy, make_trainer, plain_sgd
from _training import ONE_STEP, first_batch, loss_on

from llm.train.gram import TwoGradients
from theory.cli import UserError
from theory.schedulers import Mix
from theory.tasks import Task


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("packing", [True, False])
def test_a_step_is_what_the_schedule_makes_of_its_own_gradients(
    micro_batches: int, packing: bool, tmp_path: Path
) -> None:
    options = plain_sgd() | {"gradient_accumulation_steps": micro_batches, "packing": packing}
    scheduler = MinNorm(with_losses=True)
    trainer = make_trainer(scheduler, tmp_path, **options)
    rows = {task: first_batch(trainer, task, micro_batches) for task in Task}
    by_hand = make_policy()
    losses = [loss_on(by_hand, task, rows[task]) for task in Task]
    parameters = list(by_hand.parameters())
    gradients = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses]
    values = [loss.item() for loss in losses]
    flat = [torch.cat([x.flatten() for x in g if x is not None]).double() for g in gradients]
    expected = np.array([float(flat[i] @ flat[j]) for i, j in ((0, 0), (0, 1), (1, 1))])

    trainer.train()
    memory: Any = trainer.schedule.memory
    # Sums of thousands of float32 products.
    np.testing.assert_allclose(memory["gram"], expected, rtol=1e-4)
    np.testing.assert_allclose(memory["losses"], values, rtol=1e-5)
    weights = min_norm(expected)
    np.testing.assert_allclose(trainer.decisions[0], weights, rtol=1e-3)
    with torch.no_grad():
        for parameter, dpo, sft in zip(parameters, *gradients, strict=True):
            for weight, gradient in zip(trainer.decisions[0], (dpo, sft), strict=True):
                if gradient is not None:
                    parameter -= weight * gradient
    assert_same_weights(trainer.model, by_hand, ONE_STEP)
    logged = next(log for log in trainer.state.log_history if "loss" in log)
    total = np.dot(trainer.decisions[0], values)
    assert logged["loss"] == pytest.approx(total, rel=1e-4)


def test_nothing_is_kept_for_a_schedule_that_does_not_ask(tmp_path: Path) -> None:
    trainer = make_trainer(Mix(0.5), tmp_path, **plain_sgd())
    trainer.train()
    assert "gradients" not in vars(trainer)


def test_two_gradients_stay_apart_and_are_let_go() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)
    unused = torch.nn.Parameter(torch.ones(3))
    both = TwoGradients([weight, frozen, unused])
    for _ in range(2):  # of two micro-batches, gradients add up
        for task, direction in ((Task.DPO, [1.0, 0.0]), (Task.SFT, [1.0, 1.0])):
            with both.of(task):
                (weight @ torch.tensor(direction)).backward()
            assert weight.grad is None
    assert both.gram().tolist() == [4.0, 4.0, 8.0]
    both.combine([0.5, 2.0])
    assert weight.grad is not None
    assert weight.grad.tolist() == [5.0, 4.0]
    assert unused.grad is None
    assert not both._held


def test_precision_that_scales_gradients_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(MinNorm(), tmp_path)
    monkeypatch.setattr(trainer.args, "fp16", True)
    with pytest.raises(UserError, match="--fp16"):
        trainer._check_what_the_schedule_needs(trainer.args)
