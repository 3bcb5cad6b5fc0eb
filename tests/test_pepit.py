"""Worst cases over all convex 1-Lipschitz functions, solved as semidefinite programs by PEPit.

Set-up: alpha = 1 / sqrt N for N steps, |theta_1 - theta*| <= 1, no noise, no projection (a ball
that contains the path), w = (1/2, 1/2) and so M_X = 1. The value of such a program is attained by
some pair of functions: a bound below it would be false, one equal to it is unimprovable.

PEPit: Goujaud et al., arXiv 2201.04040.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest

from theory.simulate import StepSize
from theory.theorems import bounds
from theory.theorems.bounds import Descent

PEPit = pytest.importorskip("PEPit")
functions = pytest.importorskip("PEPit.functions")

TOLERANCES = {"tol_gap_abs": 1e-6, "tol_gap_rel": 1e-6, "tol_feas": 1e-6}
"""On some of these programs Clarabel stops short of its default of 1e-8, with a warning."""

SOLVED = 1e-4
"""The accuracy of the values, with room."""

Walk = Callable[[int], Sequence[Any]]


def rate_of(num_steps: int) -> Descent:
    return Descent(1.0, 1.0, StepSize(1.0 / np.sqrt(num_steps), decay=False), num_steps)


def mean(points: Sequence[Any]) -> Any:
    return sum(points[1:], points[0]) / len(points)


def solve(problem: Any) -> float:
    return float(problem.solve(wrapper="cvxpy", solver="CLARABEL", verbose=0, **TOLERANCES))


@cache
def worst_gap(scheme: str, steps: int) -> float:
    """The largest G_Mix that the named output of the named schedule can have."""
    problem = PEPit.PEP()
    pair = [problem.declare_function(functions.ConvexLipschitzFunction, M=1.0) for _ in range(2)]
    mix = (pair[0] + pair[1]) / 2
    best = mix.stationary_point()
    theta = problem.set_initial_point()
    problem.set_initial_condition((theta - best) ** 2 <= 1)
    schedule, output = SCHEMES[scheme]
    path = [theta]
    for t in range(steps):
        objective = (mix, *pair)[schedule(t, steps)]
        path.append(path[-1] - objective.gradient(path[-1]) / np.sqrt(steps))
    problem.set_performance_metric(mix(mean(output(path))) - mix(best))
    return solve(problem)


SCHEMES: dict[str, tuple[Callable[[int, int], int], Callable[[list[Any]], list[Any]]]] = {
    "mix": (lambda t, n: 0, lambda path: path[:-1]),
    "mix, last": (lambda t, n: 0, lambda path: path[-1:]),
    "alternation": (lambda t, n: 1 + t % 2, lambda path: path[:-1]),
    "alternation, cycle starts": (lambda t, n: 1 + t % 2, lambda path: path[:-1:2]),
    "sequential": (lambda t, n: 1 + (t >= n // 2), lambda path: path[len(path) // 2 : -1]),
}
"""Which function step t takes (0: f_Mix), and which points are averaged.

`sequential`: N/2 steps on each, the average of the second stage's iterates before each step.
"""


@pytest.mark.parametrize("steps", [4, 8])
def test_the_rate_of_mix_is_attained(steps: int) -> None:
    worst = worst_gap("mix", steps)
    assert worst == pytest.approx(1.0 / np.sqrt(steps), abs=SOLVED)
    assert worst == pytest.approx(bounds.weighted_average(rate_of(steps)), abs=SOLVED)


@pytest.mark.parametrize("steps", [4, 8])
def test_the_last_iterate_is_worse_than_the_average_and_within_its_bound(steps: int) -> None:
    worst = worst_gap("mix, last", steps)
    assert worst_gap("mix", steps) + SOLVED < worst
    assert worst <= bounds.last_iterate(rate_of(steps)) + SOLVED


@pytest.mark.parametrize(("steps", "scaled"), [(4, 1.1625), (8, 1.2361), (16, 1.3104)])
def test_alternation_pays_a_constant_factor(steps: int, scaled: float) -> None:
    """The average of all iterates, times sqrt N; the limit of both bounds is 3/2."""
    worst = worst_gap("alternation", steps)
    assert worst * np.sqrt(steps) == pytest.approx(scaled, abs=10 * SOLVED)
    d = rate_of(steps)
    assert worst <= bounds.cycle_average(d, 2, starts_only=False) + SOLVED
    starts = worst_gap("alternation, cycle starts", steps)
    bound = bounds.cycle_average(d, 2)
    assert bound == pytest.approx(1.5 / np.sqrt(steps), rel=1e-12)
    assert 0.93 * bound <= starts <= bound + SOLVED


def test_the_worst_case_of_sequential_training_reaches_a_plateau() -> None:
    worst = {steps: worst_gap("sequential", steps) for steps in (4, 8, 16)}
    expected = {4: 0.7392, 8: 0.5774, 16: 0.5152}
    assert worst == pytest.approx(expected, abs=10 * SOLVED)
    assert worst[16] > 0.5  # not 2 sqrt(1/16) less than at N = 4, as a rate would have it
    for steps, gap in worst.items():
        assert gap <= bounds.cycle_average(rate_of(steps), steps, starts_only=False)


# --- MAXRIGHT: the choices become constraints, one program per pattern of choices


def worst_max_gap(steps: int, refresh_every: int, error: float = 0.0) -> float:
    """The largest G_Max of the average of theta_1..theta_N over all patterns of choices.

    h_1 and h_2 are any convex 1-Lipschitz functions, so that M_s = 1. The values compared are
    those that `Maxright` knows; that of h_1 is wrong by -error.
    """
    firsts = (0, 1) if error else (0,)  # without an error the two may swap names
    patterns = product(firsts, *[(0, 1)] * (steps - 1))
    return max(pattern_gap(p, refresh_every, error, top) for p in patterns for top in (0, 1))


def pattern_gap(choices: tuple[int, ...], refresh_every: int, error: float, top: int) -> float:
    """The same for one pattern; `top` is the larger of the two at the average."""
    problem = PEPit.PEP()
    pair = [problem.declare_function(functions.ConvexLipschitzFunction, M=1.0) for _ in range(2)]
    best, theta = PEPit.Point(), problem.set_initial_point()
    problem.set_initial_condition((theta - best) ** 2 <= 1)
    level = PEPit.Expression()
    for f in pair:
        problem.add_constraint(f(best) <= level)
    path, known = [theta], [0.0, 0.0]
    for t, chosen in enumerate(choices):
        here = [f.oracle(path[-1]) for f in pair]
        if t % refresh_every == 0:
            known = [value for _, value in here]
        bias = -error if chosen == 0 else error
        problem.add_constraint(known[chosen] + bias >= known[1 - chosen])
        known[chosen] = here[chosen][1]
        path.append(path[-1] - here[chosen][0] / np.sqrt(len(choices)))
    problem.set_performance_metric(pair[top](mean(path[:-1])) - level)
    return solve(problem)


@pytest.mark.parametrize("refresh_every", [1, 2, 4])
def test_maxright_with_stale_values_stays_within_its_bound(refresh_every: int) -> None:
    worst = worst_max_gap(4, refresh_every)
    bound = bounds.stale_average(rate_of(4), refresh_every)
    assert worst <= bound + SOLVED


@pytest.mark.parametrize("error", [0.3, -0.3])
def test_maxright_with_a_wrong_optimum_stays_within_its_bound(error: float) -> None:
    worst = worst_max_gap(3, 1, error)
    bound = bounds.weighted_average(rate_of(3)) + abs(error)
    assert worst <= bound + SOLVED
