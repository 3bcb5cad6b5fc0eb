"""The optimiser rules: torch's own optimisers, norms, and a clean slate at every stage."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from _asserts import EXACT
from numpy.typing import NDArray

from theory.optimizers import Adam, Clip, Momentum, Rule
from theory.problems import Problem, make_problem, quadratic
from theory.schedulers import Mix, Sequential
from theory.simulate import StepSize, simulate
from theory.tasks import Task

Array = NDArray[np.float64]

RUNS, DIM, STEPS, ALPHA = 3, 4, 50, 0.1
RULES = [Momentum(0.8), Adam(), Clip(0.3), Clip(0.3, Adam(0.8, 0.95)), Clip(0.3, Momentum())]


def directions(rule: Rule, gradients: Array) -> Array:
    """What the rule makes of gradients (steps, runs, d)."""
    memory, out = rule.init(*gradients.shape[1:]), []
    for step, gradient in enumerate(gradients):
        direction = gradient.copy()
        rule.apply(direction, memory, np.full(len(gradient), step))
        out.append(direction)
    return np.array(out)


def some_gradients(seed: int = 0) -> Array:
    """Of very different sizes, so that clipping, scaling and epsilon all matter."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((STEPS, RUNS, DIM)) * 10.0 ** rng.uniform(-4, 1, (STEPS, RUNS, 1))


def noise_free() -> Problem:
    return replace(quadratic(dim=DIM, noise=0.0), radius=100.0)


def rule_descent(problem: Problem, task: Task, count: int, rule: Rule, start: Array) -> Array:
    """One run of `count` exact steps on one objective with fresh memory, from start (1, d)."""
    theta, memory = start.copy(), rule.init(1, DIM)
    for step in range(count):
        gradient = problem.objectives[task].gradient(theta)
        rule.apply(gradient, memory, np.array([step]))
        theta -= ALPHA * gradient
    return theta


# --- against torch, on the same gradients


def torch_path(name: str, gradients: Array, **options: float | tuple[float, float]) -> Array:
    torch = pytest.importorskip("torch")
    parameter = torch.zeros(gradients.shape[1:], dtype=torch.float64, requires_grad=True)
    optimizer = getattr(torch.optim, name)([parameter], **options)
    path = []
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        path.append(parameter.detach().numpy().copy())
    return np.array(path)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_momentum_is_torch_s_with_the_step_size_times_one_minus_m(momentum: float) -> None:
    """torch keeps u <- m u + g, so that v = (1 - m) u."""
    gradients = some_gradients()
    path = -ALPHA * np.cumsum(directions(Momentum(momentum), gradients), axis=0)
    expected = torch_path("SGD", gradients, lr=ALPHA * (1.0 - momentum), momentum=momentum)
    np.testing.assert_allclose(path, expected, rtol=1e-10, atol=EXACT)


@pytest.mark.parametrize("rule", [Adam(), Adam(0.5, 0.9, 1e-3), Adam(0.0, 0.99)])
def test_adam_is_torch_s(rule: Adam) -> None:
    gradients = some_gradients()
    path = -ALPHA * np.cumsum(directions(rule, gradients), axis=0)
    betas = (rule.beta1, rule.beta2)
    expected = torch_path("Adam", gradients, lr=ALPHA, betas=betas, eps=rule.epsilon)
    np.testing.assert_allclose(path, expected, rtol=1e-10, atol=EXACT)


def test_a_simulation_under_adam_is_torch_s_adam_on_f_mix() -> None:
    torch = pytest.importorskip("torch")
    problem, lam = noise_free(), 0.3
    trace = simulate(
        problem, Mix(lam), num_steps=40, step_size=StepSize(ALPHA, decay=False), seeds=[0],
        record_steps=[40], rule=Adam(),
    )  # fmt: skip
    theta = torch.zeros(DIM, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=ALPHA)
    for _ in range(40):
        theta.grad = torch.from_numpy(problem.mix(lam).gradient(theta.detach().numpy()))
        optimizer.step()
    expected = theta.detach().numpy()
    np.testing.assert_allclose(trace.theta["last"][0, 0], expected, rtol=0, atol=1e-10)


# --- clipping


def test_clipping_bounds_the_norm_and_keeps_the_direction() -> None:
    gradients = some_gradients()
    clipped = directions(Clip(0.3), gradients)
    norms, lengths = (np.linalg.norm(x, axis=-1) for x in (gradients, clipped))
    np.testing.assert_allclose(lengths, np.minimum(norms, 0.3), rtol=EXACT)
    np.testing.assert_allclose(np.sum(clipped * gradients, -1), lengths * norms, rtol=EXACT)
    assert 0 < np.mean(norms > 0.3) < 1  # some are clipped and some are not


def test_what_is_short_enough_is_not_touched_and_zero_stays_zero() -> None:
    gradients = some_gradients()
    np.testing.assert_array_equal(directions(Clip(1e9), gradients), gradients)
    assert not directions(Clip(0.3), np.zeros_like(gradients)).any()


def test_clipping_comes_before_the_rule_it_wraps() -> None:
    gradients = some_gradients()
    clipped = directions(Clip(0.3), gradients)
    for rule in (Momentum(), Adam()):
        expected = directions(rule, clipped)
        np.testing.assert_array_equal(directions(Clip(0.3, rule), gradients), expected)


# --- every rule


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_run_s_directions_do_not_depend_on_the_other_runs(rule: Rule) -> None:
    gradients = some_gradients()
    together = directions(rule, gradients)
    for run in range(RUNS):
        alone = directions(rule, gradients[:, run : run + 1])
        np.testing.assert_array_equal(together[:, run], alone[:, 0])


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_new_stage_starts_with_an_empty_memory(rule: Rule) -> None:
    """Sequential training under a rule is two separate trainings, each run at its own split."""
    problem, splits = noise_free(), (10, 25, 40)
    trace = simulate(
        problem, Sequential(splits, "dpo_then_sft"),
        num_steps=60, step_size=StepSize(ALPHA, decay=False),
        seeds=range(len(splits)), record_steps=[60], rule=rule,
    )  # fmt: skip
    for run, split in enumerate(splits):
        middle = rule_descent(problem, Task.DPO, split, rule, np.zeros((1, DIM)))
        end = rule_descent(problem, Task.SFT, 60 - split, rule, middle)
        np.testing.assert_allclose(trace.theta["last"][0, run], end[0], rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", ["bernoulli", "softmax"])
def test_momentum_zero_and_loose_clipping_are_plain_sgd(name: str) -> None:
    problem = make_problem(name)
    plain, *others = (
        simulate(
            problem, Mix(0.4), num_steps=50, step_size=StepSize(problem.step_scale), seeds=range(3),
            rule=rule,
        )
        for rule in (None, Momentum(0.0), Clip(1e9), Clip(1e9, Momentum(0.0)))
    )  # fmt: skip
    for other in others:
        for iterate, theta in plain.theta.items():
            np.testing.assert_allclose(other.theta[iterate], theta, rtol=0, atol=EXACT)
