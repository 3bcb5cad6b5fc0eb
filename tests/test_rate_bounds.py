"""Bounds of the convergence experiment: their constants, the coverage of methods, staleness."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from theory.convergence_experiment import methods
from theory.optima import ProblemOptima
from theory.problems import PROBLEMS, make_problem
from theory.simulate import ITERATES, StepSize
from theory.theorems import bounds
from theory.theorems.rate_bounds import (
    bound_curve,
    choice_noise,
    choice_noise_on_ball,
    loss_spread,
    staleness,
)

STEPS = np.array([10, 100, 1000])
TOY = ProblemOptima(make_problem("toy2d"))


def test_every_bound_is_positive_and_only_the_theorems_lines_have_one() -> None:
    covered = set()
    for method in methods(1000):
        for iterate in ITERATES:
            curve = bound_curve(TOY, 0.3, method.name, iterate, STEPS)
            if curve is not None:
                assert np.all(curve > 0.0)
                covered.add((method.name, iterate))
    full = {(name, it) for name in ("mix", "alright", "exact", "same") for it in ITERATES}
    averages = {(n, it) for n in ("exact unscaled", "fresh") for it in ("uniform", "weighted")}
    stale = {(f"stale k={k}", "weighted") for k in ("10", "100", "inf")}
    assert covered == full | averages | stale


def test_age_one_is_exact_and_older_values_only_loosen_the_bound() -> None:
    exact = bound_curve(TOY, 0.3, "exact", "weighted", STEPS)
    curves = [bound_curve(TOY, 0.3, f"stale k={k}", "weighted", STEPS) for k in (1, 2, 10, "inf")]
    np.testing.assert_array_equal(curves[0], exact)
    for fresher, older in pairwise(curves):
        assert np.all(older >= fresher)


@pytest.mark.parametrize("period", [1, 2, 5, 20])
def test_staleness_at_constant_steps_is_that_of_the_theorem(period: int) -> None:
    """T5 states it for a constant alpha; there both must agree wherever k divides T."""
    step_size, horizon = StepSize(0.1, decay=False), 100
    descent = bounds.descent(TOY, "maxright_scaled", 0.3, step_size, horizon)
    mine = bounds.weighted_average(descent) + descent.norm**2 * staleness(
        np.array([horizon]), step_size, period
    )
    np.testing.assert_allclose(mine, bounds.stale_average(descent, period), rtol=1e-12)


def test_staleness_covers_simulated_ages() -> None:
    """Brute force over t and the step sizes of the staircase, decaying."""
    step_size, period, horizon = StepSize(0.7), 4, 23
    alpha = [0.7 / (t + 1) ** 0.5 for t in range(horizon)]
    total = 0.0
    for t in range(horizon):
        since = t - t % period
        total += alpha[t] * (sum(alpha[since:t]) + (alpha[t - 1] if t > since else 0.0))
    expected = total / sum(alpha)
    np.testing.assert_allclose(staleness(np.array([horizon]), step_size, period), expected)


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_the_noise_on_the_ball_bounds_the_noise_at_every_point(name: str) -> None:
    optima = ProblemOptima(make_problem(name))
    assert choice_noise(optima, 0.3) <= choice_noise_on_ball(optima.problem, 0.3)
    edge = np.zeros(optima.problem.dim)
    edge[0] = optima.problem.radius
    ball = choice_noise_on_ball(optima.problem, 1.0)
    assert loss_spread(optima.problem, edge)[0] <= ball


def test_the_spread_of_quadratic_losses_is_their_closed_form() -> None:
    """f(theta; z) = f(theta) + noise z . (theta - c); the sd from 16,384 samples is off by 0.6%."""
    problem = make_problem("quadratic", noise=0.5)
    theta = np.full(problem.dim, 0.7)
    expected = [0.5 * np.linalg.norm(theta - center) for center in problem.minimisers or ()]
    np.testing.assert_allclose(loss_spread(problem, theta), expected, rtol=0.025)


def test_the_curve_is_the_theorem_at_each_step() -> None:
    curve = bound_curve(TOY, 0.3, "mix", "uniform", STEPS)
    step_size = StepSize(TOY.problem.step_scale)
    first = bounds.descent(TOY, "mix", 0.3, step_size, 1)
    expected = [bounds.uniform_average(replace(first, num_steps=int(step))) for step in STEPS]
    np.testing.assert_array_equal(curve, expected)
