"""One theory, two loops: the convex problems and the language models agree where they meet."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from _tiny import given, make_trainer
from numpy.typing import NDArray

import theory
from llm.loss.losses import dpo_loss, token_logps
from llm.loss.objectives import SFTObjective
from theory.objectives import LogisticDPO, Quadratic, SoftmaxSFT, response_log_probs
from theory.problems import Problem
from theory.schedulers import Alright, Alternate, Importance, Maxright, Mix, Sequential
from theory.scheduling import Scheduler
from theory.simulate import StepSize, simulate
from theory.tasks import Task

ROOT = Path(__file__).parents[1]
# Float64 sums of a few dozen terms of order 1 in another order.
EXACT = 1e-12


def quadratics() -> Problem:
    """Any problem will do: the decisions below do not depend on it."""
    dpo, sft = (Quadratic(np.eye(2), np.array([x, 0.0]), noise=0.1) for x in (1.0, -1.0))
    return Problem("two quadratics", (dpo, sft), radius=10.0, step_scale=0.1)


@pytest.mark.parametrize(
    "scheduler",
    [
        Alright(0.3, seed=0),
        Alright(0.7, seed=12345),
        Importance(0.3, 0.6, seed=7),
        Mix(0.25),
        Sequential(7, "sft_then_dpo"),
        Alternate(0.5, 4),
    ],
    ids=repr,
)
def test_both_loops_take_the_same_decisions(scheduler: Scheduler, tmp_path: Path) -> None:
    trace = simulate(
        quadratics(),
        scheduler,
        num_steps=20,
        step_size=StepSize(0.1),
        seeds=[0, 1],
        record_weights=True,
    )
    trainer = make_trainer(scheduler, tmp_path, max_steps=20)
    trainer.train()
    assert trace.weights is not None
    for run in range(2):
        np.testing.assert_array_equal(trace.weights[:, run], np.array(trainer.decisions))


def test_a_run_of_a_batched_simulation_decides_like_the_trainer(tmp_path: Path) -> None:
    """One run of the language model is run 2 of three in the theory."""
    trace = simulate(
        quadratics(),
        Alright((0.2, 0.5, 0.8), seed=(4, 5, 6)),
        num_steps=20,
        step_size=StepSize(0.1),
        seeds=[0, 0, 0],
        record_weights=True,
    )
    trainer = make_trainer(Alright(0.8, seed=6), tmp_path, max_steps=20)
    trainer.train()
    assert trace.weights is not None
    np.testing.assert_array_equal(trace.weights[:, 2], np.array(trainer.decisions))
    assert len({tuple(w) for w in trainer.decisions}) == 2


def test_both_loops_probe_equally_often(tmp_path: Path) -> None:
    # refresh_every = 1 reads no step losses, so every probe of the simulation is a refresh.
    scheduler = Maxright(0.5, (0.0, 0.0), refresh_every=1)
    trace = simulate(quadratics(), scheduler, num_steps=8, step_size=StepSize(0.1), seeds=[0])
    trainer = make_trainer(scheduler, tmp_path, max_steps=8)
    trainer.train()
    assert trainer.probes == 8
    assert trace.probes[-1, 0].tolist() == [8, 8]


# --- the objectives at response level


def features(rng: np.random.Generator) -> NDArray[np.float64]:
    """phi(x, y) of 6 prompts with 4 responses in 3 dimensions."""
    return rng.standard_normal((6, 4, 3))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_the_dpo_losses_agree(seed: int, beta: float) -> None:
    rng = np.random.default_rng(seed)
    phi, theta, theta_ref = features(rng), rng.standard_normal(3), rng.standard_normal(3)
    convex = LogisticDPO(phi[:, 0] - phi[:, 1], np.ones(6), beta, theta_ref)
    policy, reference = (
        torch.from_numpy(response_log_probs(phi, point)) for point in (theta, theta_ref)
    )
    terms = dpo_loss(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], beta=beta)
    assert terms.losses.dtype == torch.float64
    assert terms.losses.mean().item() == pytest.approx(float(convex.value(theta)), abs=EXACT)
    margins = beta * (phi[:, 0] - phi[:, 1]) @ (theta - theta_ref)
    rewards = (terms.chosen_rewards - terms.rejected_rewards).numpy()
    np.testing.assert_allclose(rewards, margins, rtol=0, atol=EXACT)


@pytest.mark.parametrize("seed", range(5))
def test_the_dpo_losses_agree_where_both_orders_occur(seed: int) -> None:
    """p_i between 0 and 1 is the mixture of the two orders of the pair."""
    rng = np.random.default_rng(seed)
    phi, theta, preference = features(rng), rng.standard_normal(3), rng.random(6)
    convex = LogisticDPO(phi[:, 0] - phi[:, 1], preference, 0.5, np.zeros(3))
    policy = torch.from_numpy(response_log_probs(phi, theta))
    reference = torch.from_numpy(response_log_probs(phi, np.zeros(3)))
    sides = (policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1])
    first = dpo_loss(*sides, beta=0.5).losses
    second = dpo_loss(sides[1], sides[0], sides[3], sides[2], beta=0.5).losses
    p = torch.from_numpy(preference)
    mixture = (p * first + (1 - p) * second).mean().item()
    assert mixture == pytest.approx(float(convex.value(theta)), abs=EXACT)


@pytest.mark.parametrize("seed", range(5))
def test_the_gradients_of_dpo_agree(seed: int) -> None:
    rng = np.random.default_rng(seed)
    phi, theta_ref = features(rng), rng.standard_normal(3)
    convex = LogisticDPO(phi[:, 0] - phi[:, 1], np.ones(6), 0.7, theta_ref)
    theta = torch.from_numpy(rng.standard_normal(3)).requires_grad_()
    policy = torch.log_softmax(torch.from_numpy(phi) @ theta, dim=-1)
    reference = torch.from_numpy(response_log_probs(phi, theta_ref))
    losses = dpo_loss(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], beta=0.7).losses
    (gradient,) = torch.autograd.grad(losses.mean(), theta)
    expected = convex.gradient(theta.detach().numpy())
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("seed", range(5))
def test_the_sft_losses_agree(seed: int) -> None:
    """A response of one token, whose logits are theta . phi(x, y): the same softmax policy."""
    rng = np.random.default_rng(seed)
    phi, theta = features(rng), rng.standard_normal(3)
    demonstrated = rng.integers(4, size=6)
    convex = SoftmaxSFT(phi, np.eye(4)[demonstrated])
    logits = torch.zeros(6, 2, 4, dtype=torch.float64)
    logits[:, 0] = torch.from_numpy(phi @ theta)
    labels = torch.full((6, 2), -100)
    labels[:, 1] = torch.from_numpy(demonstrated)
    logps, _ = token_logps(logits, labels)
    expected = response_log_probs(phi, theta)[np.arange(6), demonstrated]
    np.testing.assert_allclose(logps[:, 0].numpy(), expected, rtol=0, atol=EXACT)
    total, count = SFTObjective()(*given(logits, labels)).sums["sequence_loss"]
    assert total.item() / count == pytest.approx(float(convex.value(theta)), abs=EXACT)


# --- the one-way dependency


def test_the_theory_needs_neither_torch_nor_transformers() -> None:
    modules = [f"theory.{module.name}" for module in pkgutil.iter_modules(theory.__path__)]
    assert {"theory.schedulers", "theory.simulate", "theory.gap_experiment"} <= set(modules)
    program = (
        "import importlib, json, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-1000:]
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert "numpy" in loaded
    assert loaded & {"torch", "transformers", "accelerate", "datasets", "llm"} == set()


def test_the_order_of_the_objectives_exists_once() -> None:
    """Column 0 is DPO and column 1 SFT in a simulation and in a trainer: w = (lam, 1 - lam)."""
    weights, _ = Mix(0.3).select(Mix(0.3).init(), lambda: np.zeros(2))
    assert (weights[Task.DPO], weights[Task.SFT]) == (0.3, 0.7)
    assert list(Task) == [Task.DPO, Task.SFT] == [0, 1]
