"""Mathematical assertions shared by the tests of `theory`.

Tolerances. Float64 has eps = 2.2e-16. A central difference with step h has an error of about
h^2 f''' / 6 + eps f / h; at h = 1e-5 and values of order 1 that is 2e-11, and `FINITE_DIFFERENCE`
leaves room for the larger values and third derivatives of random instances. `EXACT` is for results
that differ only in the order of a few hundred float64 operations.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from theory.cli import run_command
from theory.objectives import Objective, StochasticObjective
from theory.problems import Problem
from theory.scheduling import ScheduleState
from theory.simulate import StepSize

Array = NDArray[np.float64]

EXACT = 1e-12
FINITE_DIFFERENCE = 1e-7
STEP = 1e-5


# --- points and samples


def points_in_ball(rng: np.random.Generator, count: int, dim: int, radius: float) -> Array:
    """Uniform directions, radii spread over [0, R], the last point on the boundary: (count, d)."""
    directions = rng.standard_normal((count, dim))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return directions * radius * np.linspace(0.0, 1.0, count)[:, None]


def sample_gradients(
    objective: StochasticObjective,
    theta: Array,
    draws: Array,
    weight: float = 1.0,
    column: int = 0,
) -> tuple[Array, Array]:
    """weight * g(theta; z) and f(theta; z) for each row z of `draws`: (n, d) and (n,)."""
    count = len(draws)
    weights = np.zeros((count, 2))
    weights[:, column] = weight
    out, losses = np.zeros((count, objective.dim)), np.zeros((count, 2))
    objective.add_stochastic_gradient(
        np.tile(theta, (count, 1)),
        weights,
        column,
        np.ascontiguousarray(draws[:, None, :]),
        np.arange(count),
        0,
        out,
        losses,
    )
    return out, losses[:, column]


# --- smooth convex functions


def assert_gradient_matches_finite_differences(objective: Objective, theta: Array) -> None:
    shifts = STEP * np.eye(objective.dim)
    estimate = (objective.value(theta + shifts) - objective.value(theta - shifts)) / (2 * STEP)
    scale = 1.0 + abs(float(objective.value(theta)))
    np.testing.assert_allclose(
        objective.gradient(theta), estimate, rtol=FINITE_DIFFERENCE, atol=FINITE_DIFFERENCE * scale
    )


def assert_hessian_matches_finite_differences(objective: Objective, theta: Array) -> None:
    shifts = STEP * np.eye(objective.dim)
    upper, lower = objective.gradient(theta + shifts), objective.gradient(theta - shifts)
    hessian = objective.hessian(theta)
    scale = 1.0 + np.abs(hessian).max()
    np.testing.assert_allclose(
        hessian, (upper - lower) / (2 * STEP), rtol=0, atol=FINITE_DIFFERENCE * scale
    )
    np.testing.assert_allclose(hessian, hessian.T, rtol=0, atol=EXACT * scale)


def assert_is_convex_along_segments(objective: Objective, starts: Array, ends: Array) -> None:
    """f(a + s (b - a)) <= (1 - s) f(a) + s f(b), up to rounding, for every pair of rows."""
    first, last = objective.value(starts), objective.value(ends)
    rounding = EXACT * (1.0 + np.abs(first) + np.abs(last))
    for fraction in (0.1, 0.25, 0.5, 0.75, 0.9):
        inside = objective.value(starts + fraction * (ends - starts))
        chord = (1.0 - fraction) * first + fraction * last
        assert np.all(inside <= chord + rounding)


def assert_lies_above_its_tangents(objective: Objective, starts: Array, ends: Array) -> None:
    """f(b) >= f(a) + <grad f(a), b - a>, up to rounding, for every pair of rows."""
    tangent = objective.value(starts) + np.sum(objective.gradient(starts) * (ends - starts), axis=1)
    values = objective.value(ends)
    assert np.all(values >= tangent - EXACT * (1.0 + np.abs(values) + np.abs(tangent)))


def assert_unbiased(
    objective: StochasticObjective, theta: Array, draws: Array, probabilities: Array
) -> None:
    """Enumerates every sample: E g = grad f and E f(.; z) = f, exactly."""
    np.testing.assert_allclose(probabilities.sum(), 1.0, rtol=0, atol=EXACT)
    gradients, losses = sample_gradients(objective, theta, draws)
    value = objective.value(theta)
    scale = 1.0 + np.abs(gradients).max()
    np.testing.assert_allclose(
        probabilities @ gradients, objective.gradient(theta), rtol=0, atol=EXACT * scale
    )
    np.testing.assert_allclose(probabilities @ losses, value, rtol=EXACT, atol=EXACT)


def assert_constants_hold(
    objective: StochasticObjective, radius: float, points: Array, draws: Array
) -> None:
    """Every |g| <= M and every Hessian eigenvalue in [mu, L], at each of `points`."""
    constants = objective.constants(radius)
    assert 0.0 <= constants.strong_convexity <= constants.smoothness
    rounding = EXACT * (1.0 + constants.smoothness)
    for theta in points:
        assert np.linalg.norm(theta) <= radius * (1.0 + EXACT)
        gradients, _ = sample_gradients(objective, theta, draws)
        assert np.all(np.linalg.norm(gradients, axis=1) <= constants.gradient_norm + EXACT)
        eigenvalues = np.linalg.eigvalsh(objective.hessian(theta))
        assert eigenvalues[0] >= constants.strong_convexity - rounding
        assert eigenvalues[-1] <= constants.smoothness + rounding


# --- statistics


def assert_binomial(successes: int, trials: int, probability: float) -> None:
    """Within 4.5 standard deviations: a true frequency fails at 7 of 10^6 seeds."""
    deviation = math.sqrt(trials * probability * (1.0 - probability))
    assert abs(successes - trials * probability) <= 4.5 * deviation


# --- schedulers


def assert_one_hot(weights: Array) -> None:
    assert weights.dtype == np.float64
    assert weights.shape[-1] == 2
    assert np.all(np.sort(weights, axis=-1) == np.array([0.0, 1.0]))


def assert_is_plain_data(state: ScheduleState) -> ScheduleState:
    """The state survives JSON unchanged; returns what came back."""
    data: dict[str, Any] = state.to_json()
    restored = ScheduleState.from_json(json.loads(json.dumps(data)))
    assert restored.step == state.step
    if state.values is None:
        assert restored.values is None
    else:
        np.testing.assert_array_equal(restored.values, state.values)
    return restored


def assert_one_line_error(message: str, *mentions: str) -> None:
    assert "\n" not in message
    for mention in mentions:
        assert mention in message


# --- optimisation


def projected_gradient_descent(
    problem: Problem,
    weights: Sequence[Sequence[float]],
    step_size: StepSize,
    start: Array,
    slope: Callable[[int, int, Array], Array] | None = None,
) -> dict[str, Array]:
    """One run in plain NumPy: the last iterate and both averages.

    `slope` gives the gradient at step t (from 0) of the objective with index i; else it is exact.
    """
    theta, alphas, visited = start, [], []
    slope = slope or (lambda t, i, theta: problem.objectives[i].gradient(theta))
    for t, pair in enumerate(weights, start=1):
        alpha = step_size.scale / math.sqrt(t) if step_size.decay else step_size.scale
        alphas.append(alpha)
        visited.append(theta)
        gradient = sum(w * slope(t - 1, i, theta) for i, w in enumerate(pair) if w)
        theta = theta - alpha * gradient
        norm = float(np.linalg.norm(theta))
        if norm > problem.radius:
            theta = theta * (problem.radius / norm)
    return {
        "last": theta,
        "uniform": np.mean(visited, axis=0),
        "weighted": np.average(visited, axis=0, weights=alphas),
    }


def refusal(main: Callable[[list[str]], Any], argv: list[str]) -> str:
    """The one line with which a command ends, and a status that is not zero."""
    said = io.StringIO()
    with redirect_stderr(said), pytest.raises(SystemExit) as caught:
        run_command(lambda: main(argv), "command")
    code = caught.value.code
    # `sys.exit(text)` prints the text and exits with 1; argparse prints by itself and exits with 2.
    text = f"{code}\n" if isinstance(code, str) else said.getvalue()
    assert code not in (0, None)
    assert ": error: " in text
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    return text
