"""Certified optima: the certificate, independent cvxpy models, optimality conditions, failures.

CLARABEL stops at relative gaps of 1e-8, so values of order 1 agree to `SOLVER` with room to spare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
from _asserts import EXACT, points_in_ball
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from theory import optima as optima_module
from theory.objectives import LogisticDPO, Objective, Quadratic, SoftmaxSFT, WeightedSum
from theory.optima import (
    TOLERANCE,
    Optimum,
    OptimumError,
    frank_wolfe_gap,
    minimise,
    problem_optima,
)
from theory.problems import PROBLEMS, Problem, make_problem
from theory.tasks import Task

Array = NDArray[np.float64]

LAMS = [0.1, 0.25, 0.5, 0.75, 0.9]
SOLVER = 1e-6
EVERY_PROBLEM = pytest.mark.parametrize("name", PROBLEMS)
EVERY_LAM = pytest.mark.parametrize("lam", LAMS)


# --- the problems as cvxpy models, from their data


def model(objective: Objective, theta: Any) -> Any:
    """The objective as a convex expression of the variable theta."""
    if isinstance(objective, Quadratic):
        return cp.quad_form(theta - objective.center, cp.psd_wrap(objective.matrix)) / 2
    if isinstance(objective, LogisticDPO):
        margins = objective.beta * (objective.differences @ (theta - objective.theta_ref))
        preferred, rejected = objective.preference, 1.0 - objective.preference
        losses = cp.multiply(preferred, cp.logistic(-margins))
        losses += cp.multiply(rejected, cp.logistic(margins))
        return cp.sum(losses) / len(preferred)
    assert isinstance(objective, SoftmaxSFT)
    prompts, responses, dim = objective.features.shape
    logits = cp.reshape(
        objective.features.reshape(-1, dim) @ theta, (prompts, responses), order="C"
    )
    log_normalisers = cp.log_sum_exp(logits, axis=1)
    return (cp.sum(log_normalisers) - cp.sum(cp.multiply(objective.labels, logits))) / prompts


def minimum(theta: Any, radius: float, expression: Any, constraints: Sequence[Any] = ()) -> float:
    problem = cp.Problem(cp.Minimize(expression), [cp.norm(theta, 2) <= radius, *constraints])
    value = problem.solve(solver=cp.CLARABEL)
    assert problem.status == cp.OPTIMAL
    return float(value)


def cvxpy_mix(problem: Problem, weights: tuple[float, float]) -> float:
    """min over the ball of sum_i w_i f_i."""
    theta = cp.Variable(problem.dim)
    terms = [w * model(f, theta) for w, f in zip(weights, problem.objectives, strict=True)]
    return minimum(theta, problem.radius, terms[0] + terms[1])


def cvxpy_max(problem: Problem, lam: float, optimum: tuple[float, float]) -> float:
    """min over the ball of max_i w_i (f_i - f_i*): the least t with f_i - f_i* <= t / w_i.

    CLARABEL fails on some instances if the constraints are multiplied by w_i instead.
    """
    theta, t = cp.Variable(problem.dim), cp.Variable()
    gaps = [model(f, theta) - f_star for f, f_star in zip(problem.objectives, optimum, strict=True)]
    return minimum(theta, problem.radius, t, [gaps[0] <= t / lam, gaps[1] <= t / (1.0 - lam)])


@cache
def problem_of(name: str) -> Problem:
    return make_problem(name)


@cache
def cvxpy_single(name: str) -> tuple[float, float]:
    problem = problem_of(name)
    return cvxpy_mix(problem, (1.0, 0.0)), cvxpy_mix(problem, (0.0, 1.0))


def assert_certified(optimum: Optimum, radius: float) -> None:
    assert 0.0 <= optimum.certificate <= 1e-8
    assert np.linalg.norm(optimum.theta) <= radius * (1.0 + EXACT)


def f_max(problem: Problem, lam: float, theta: Array) -> Array:
    gaps = problem.losses(theta) - np.array(problem_optima(problem).values)
    return np.max(gaps * [lam, 1.0 - lam], axis=-1)


# --- the certificate


def test_the_tolerance_is_the_promised_one() -> None:
    assert TOLERANCE == 1e-8


@EVERY_PROBLEM
@pytest.mark.parametrize("kind", ["dpo", "sft", "mix"])
def test_the_certificate_bounds_the_true_gap_everywhere_on_the_ball(name: str, kind: str) -> None:
    """f(theta) - min f <= <grad f, theta> + R |grad f|; min f is known to 1e-8."""
    problem = problem_of(name)
    objectives: dict[str, Objective] = {
        "dpo": problem.objectives[Task.DPO],
        "sft": problem.objectives[Task.SFT],
        "mix": problem.mix(0.3),
    }
    objective = objectives[kind]
    lowest = minimise(objective, problem.radius).value
    for theta in points_in_ball(np.random.default_rng(0), 50, problem.dim, problem.radius):
        gap = float(objective.value(theta)) - lowest
        assert gap >= -1e-8
        assert frank_wolfe_gap(objective, theta, problem.radius) >= gap - EXACT


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.3, 5.0))
def test_the_certificate_is_tight_for_a_linear_gradient_at_the_boundary(
    seed: int, radius: float
) -> None:
    """It is max over the ball of <grad f, theta - v>, attained at v = -R grad / |grad|."""
    rng = np.random.default_rng(seed)
    objective = Quadratic(np.eye(3), rng.standard_normal(3), 0.0)
    theta = points_in_ball(rng, 2, 3, radius)[1]
    gradient = objective.gradient(theta)
    vertex = -radius * gradient / np.linalg.norm(gradient)
    gap = frank_wolfe_gap(objective, theta, radius)
    assert gap == pytest.approx(float(gradient @ (theta - vertex)), rel=1e-10, abs=EXACT)
    others = points_in_ball(rng, 200, 3, radius)
    assert np.all((theta - others) @ gradient <= gap + EXACT)


# --- agreement with cvxpy


@EVERY_PROBLEM
def test_single_optima_are_certified_and_agree_with_cvxpy(name: str) -> None:
    problem = problem_of(name)
    optima = problem_optima(problem)
    for task in Task:
        optimum = optima.single[task]
        assert_certified(optimum, problem.radius)
        assert optimum.value == problem.objectives[task].value(optimum.theta)
        assert optimum.value == pytest.approx(cvxpy_single(name)[task], abs=SOLVER)
    assert optima.values == (optima.single[0].value, optima.single[1].value)


@EVERY_LAM
@EVERY_PROBLEM
def test_min_f_mix_is_certified_and_agrees_with_cvxpy(name: str, lam: float) -> None:
    problem = problem_of(name)
    optimum = problem_optima(problem).mix(lam)
    assert_certified(optimum, problem.radius)
    assert optimum.value == problem.mix(lam).value(optimum.theta)
    assert optimum.value == pytest.approx(cvxpy_mix(problem, (lam, 1.0 - lam)), abs=SOLVER)


@EVERY_LAM
@EVERY_PROBLEM
def test_min_f_max_is_certified_and_agrees_with_cvxpy(name: str, lam: float) -> None:
    problem = problem_of(name)
    optimum = problem_optima(problem).max(lam)
    assert_certified(optimum, problem.radius)
    assert optimum.value == f_max(problem, lam, optimum.theta)
    expected = cvxpy_max(problem, lam, cvxpy_single(name))
    assert optimum.value == pytest.approx(expected, abs=SOLVER)


# --- optimality conditions


@EVERY_LAM
@EVERY_PROBLEM
def test_the_f_max_minimiser_equalises_the_weighted_gaps(name: str, lam: float) -> None:
    """lam delta_1 = (1 - lam) delta_2 > 0 under conflict."""
    problem = problem_of(name)
    optimum = problem_optima(problem).max(lam)
    gaps = problem.losses(optimum.theta) - np.array(problem_optima(problem).values)
    heights = gaps * [lam, 1.0 - lam]
    assert heights[0] == pytest.approx(heights[1], abs=1e-8)
    assert heights.min() > 1e-4


@EVERY_LAM
@EVERY_PROBLEM
def test_at_the_f_max_minimiser_a_convex_combination_of_gradients_vanishes(
    name: str, lam: float
) -> None:
    """KKT of an interior minimiser: the two gradients are opposite."""
    problem = problem_of(name)
    theta = problem_optima(problem).max(lam).theta
    gradients = np.stack([f.gradient(theta) for f in problem.objectives])
    norms = np.linalg.norm(gradients, axis=1)
    assert norms.min() > 1e-4
    # rho |g_1| = (1 - rho) |g_2| for opposite gradients.
    rho = norms[1] / norms.sum()
    np.testing.assert_allclose(rho * gradients[0] + (1 - rho) * gradients[1], 0.0, atol=1e-8)


@EVERY_LAM
@EVERY_PROBLEM
def test_the_gradient_of_f_mix_vanishes_at_its_minimiser(name: str, lam: float) -> None:
    problem = problem_of(name)
    theta = problem_optima(problem).mix(lam).theta
    dpo, sft = (f.gradient(theta) for f in problem.objectives)
    # R |g| - |theta| |g| <= certificate <= 1e-8, and R - |theta| > 1.
    np.testing.assert_allclose(lam * dpo + (1.0 - lam) * sft, 0.0, atol=1e-8)


@EVERY_LAM
@EVERY_PROBLEM
def test_no_point_of_the_ball_is_below_the_reported_minima(name: str, lam: float) -> None:
    problem = problem_of(name)
    optima = problem_optima(problem)
    rng = np.random.default_rng(1)
    nearby = optima.max(lam).theta + 1e-2 * rng.standard_normal((200, problem.dim))
    points = np.concatenate([nearby, points_in_ball(rng, 200, problem.dim, problem.radius)])
    points = points[np.linalg.norm(points, axis=1) <= problem.radius]
    assert np.all(problem.mix(lam).value(points) >= optima.mix(lam).value - 1e-8)
    assert np.all(f_max(problem, lam, points) >= optima.max(lam).value - 1e-8)


@EVERY_PROBLEM
def test_lam_0_and_1_leave_one_objective(name: str) -> None:
    problem = problem_of(name)
    optima = problem_optima(problem)
    for lam, task in ((1.0, Task.DPO), (0.0, Task.SFT)):
        assert optima.mix(lam).value == pytest.approx(optima.values[task], abs=1e-10)
        assert optima.max(lam).value == pytest.approx(0.0, abs=1e-8)


@EVERY_PROBLEM
def test_f_max_lies_between_the_dual_bounds_of_f_mix(name: str) -> None:
    """max(h) >= (h_1 + h_2)/2 >= max(h)/2, so the minima obey the same, at every lam."""
    problem = problem_of(name)
    optima = problem_optima(problem)
    for lam in LAMS:
        ideal = lam * optima.values[0] + (1.0 - lam) * optima.values[1]
        total = optima.mix(lam).value - ideal
        assert total / 2 - 1e-8 <= optima.max(lam).value <= total + 1e-8


def test_optima_are_computed_once() -> None:
    problem = problem_of("toy2d")
    optima = problem_optima(problem)
    assert problem_optima(problem) is optima
    assert optima.mix(0.5) is optima.mix(0.5)
    assert optima.max(0.5) is optima.max(0.5)
    assert problem_optima(make_problem("toy2d")) is not optima


# --- minimisers on the boundary


def shrunk(name: str) -> Problem:
    """The ball shrunk below every minimiser, and below those of f_Mix and f_Max."""
    problem = problem_of(name)
    optima = problem_optima(problem)
    points = [o.theta for o in (*optima.single, optima.mix(0.3), optima.max(0.3))]
    return replace(problem, radius=0.5 * min(float(np.linalg.norm(p)) for p in points))


@pytest.mark.parametrize("kind", ["dpo", "sft", "mix", "max"])
@EVERY_PROBLEM
def test_boundary_minimisers_agree_with_cvxpy(name: str, kind: str) -> None:
    problem = shrunk(name)
    optima = problem_optima(problem)
    if kind == "max":
        optimum, expected = optima.max(0.3), cvxpy_max(problem, 0.3, optima.values)
    else:
        weights = {"dpo": (1.0, 0.0), "sft": (0.0, 1.0), "mix": (0.3, 0.7)}[kind]
        optimum = {"dpo": optima.single[0], "sft": optima.single[1], "mix": optima.mix(0.3)}[kind]
        expected = cvxpy_mix(problem, weights)
    assert_certified(optimum, problem.radius)
    assert optimum.value == pytest.approx(expected, abs=SOLVER)


@pytest.mark.parametrize("kind", ["dpo", "sft", "mix"])
@EVERY_PROBLEM
def test_a_boundary_minimiser_has_norm_r_and_an_inward_gradient_only(name: str, kind: str) -> None:
    """KKT: grad f = -nu theta with nu > 0, and |theta| = R."""
    problem = shrunk(name)
    optima = problem_optima(problem)
    optimum = {"dpo": optima.single[0], "sft": optima.single[1], "mix": optima.mix(0.3)}[kind]
    objectives: dict[str, Objective] = {
        "dpo": problem.objectives[Task.DPO],
        "sft": problem.objectives[Task.SFT],
        "mix": problem.mix(0.3),
    }
    objective = objectives[kind]
    theta, gradient = optimum.theta, objective.gradient(optimum.theta)
    assert not optimum.interior
    assert np.linalg.norm(theta) == pytest.approx(problem.radius, rel=EXACT)
    multiplier = -float(gradient @ theta) / problem.radius**2
    assert multiplier > 1e-3
    # A certificate of 1e-8 bounds the angle by its square root only; Newton does far better.
    np.testing.assert_allclose(gradient, -multiplier * theta, rtol=0, atol=1e-9)


@pytest.mark.parametrize("excess", [0.0, 1e-14, 1e-12, 1e-9, 1e-6, 1e-3])
def test_a_minimiser_at_or_just_outside_the_boundary_is_found(excess: float) -> None:
    objective = Quadratic(np.eye(2), np.array([1.0 + excess, 0.0]), 0.0)
    optimum = minimise(objective, 1.0)
    assert_certified(optimum, 1.0)
    np.testing.assert_allclose(optimum.theta, [1.0, 0.0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("reference", [0.0, 0.5, 3.0, 8.0])
@pytest.mark.parametrize("radius", [1.0, 4.0])
@pytest.mark.parametrize("preference", [0.1, 0.5, 0.9])
def test_a_far_reference_does_not_defeat_the_solver(
    reference: float, radius: float, preference: float
) -> None:
    """One pair: the minimiser is theta_ref + logit(p)/beta, clipped to the ball."""
    beta = 2.0
    objective = LogisticDPO(np.ones((1, 1)), np.array([preference]), beta, np.array([reference]))
    free = reference + np.log(preference / (1.0 - preference)) / beta
    optimum = minimise(objective, radius)
    assert_certified(optimum, radius)
    best = np.array([np.clip(free, -radius, radius)])
    assert optimum.value <= objective.value(best) + 1e-8


@pytest.mark.parametrize(
    ("difference", "preference", "beta", "reference", "radius"),
    [
        (2.8, 0.73, 1.8, -0.1, 3.1),  # Newton stalls on the rounding of the line search
        (-1.3, 0.63, 0.6, -2.7, 3.4),  # the first Newton step leaves the ball of radius 2R
    ],
)
def test_an_interior_minimiser_of_one_pair_is_found(
    difference: float, preference: float, beta: float, reference: float, radius: float
) -> None:
    objective = LogisticDPO(
        np.array([[difference]]), np.array([preference]), beta, np.array([reference])
    )
    closed = reference + np.log(preference / (1.0 - preference)) / (beta * difference)
    assert abs(closed) < radius
    optimum = minimise(objective, radius)
    assert_certified(optimum, radius)
    assert optimum.interior
    assert optimum.theta == pytest.approx(closed, abs=1e-6)


# --- failure


def test_a_gap_above_the_tolerance_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optima_module, "TOLERANCE", -1.0)
    with pytest.raises(OptimumError, match=r"certified gap .* exceeds") as error:
        minimise(make_problem("toy2d").objectives[0], 4.0)
    assert "\n" not in str(error.value)


def test_a_point_that_is_not_optimal_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optima_module, "_newton", lambda f, theta, ridge: theta + 0.1)
    with pytest.raises(OptimumError, match=r"certified gap .* exceeds 1e-08"):
        minimise(make_problem("toy2d").objectives[0], 4.0)


def test_a_wrong_dual_multiplier_of_f_max_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optima_module, "brentq", lambda *args, **kwargs: 0.05)
    with pytest.raises(OptimumError, match=r"certified gap of f_Max .* exceeds 1e-08"):
        problem_optima(make_problem("toy2d")).max(0.5)


def test_a_nan_objective_raises() -> None:
    objective = WeightedSum(make_problem("toy2d").objectives, (float("nan"), 1.0))
    with pytest.raises((OptimumError, ValueError)):
        minimise(objective, 4.0)
