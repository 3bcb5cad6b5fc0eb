"""The certified front, hypervolume against brute force, and the least ideal distance."""

from __future__ import annotations

import numpy as np
import pytest
from _asserts import EXACT, points_in_ball
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from theory.metrics import ideal_distance
from theory.optima import TOLERANCE, ProblemOptima
from theory.problems import PROBLEMS, make_problem
from theory.schedulers import objective_weights
from theory.theorems.pareto import (
    Front,
    hypervolume,
    least_ideal_distance,
    nondominated,
    pareto_front,
)

GRID = 12
POINTS = hnp.arrays(
    np.int64, st.tuples(st.integers(0, 12), st.just(2)), elements=st.integers(0, 14)
)


@pytest.fixture(scope="module", params=list(PROBLEMS))
def solved(request: pytest.FixtureRequest) -> tuple[ProblemOptima, Front]:
    optima = ProblemOptima(make_problem(request.param))
    return optima, pareto_front(optima, 41)


# --- the front


def test_front_points_do_not_dominate_each_other(solved: tuple[ProblemOptima, Front]) -> None:
    front = solved[1]
    assert nondominated(front.losses).all()
    assert np.all(np.diff(front.losses[:, 0]) < 0.0)  # more weight on DPO, less DPO loss
    assert np.all(np.diff(front.losses[:, 1]) > 0.0)


def test_every_front_point_is_certified(solved: tuple[ProblemOptima, Front]) -> None:
    optima, front = solved
    assert np.all(front.certificates <= TOLERANCE)
    np.testing.assert_array_equal(front.losses, optima.problem.losses(front.theta))


def test_no_point_of_the_ball_lies_below_a_supporting_line(
    solved: tuple[ProblemOptima, Front],
) -> None:
    """For random theta, w(lam) . f(theta) >= w(lam) . (front point) - its certificate."""
    optima, front = solved
    rng = np.random.default_rng(0)
    theta = points_in_ball(rng, 400, optima.problem.dim, optima.problem.radius)
    losses = np.concatenate([optima.problem.losses(theta), front.losses])
    weights = objective_weights(front.lams)
    support = np.sum(weights * front.losses, axis=1) - front.certificates - EXACT
    assert np.all(losses @ weights.T >= support)


def test_ideal_and_nadir_frame_the_front(solved: tuple[ProblemOptima, Front]) -> None:
    optima, front = solved
    np.testing.assert_allclose(front.ideal, optima.values, rtol=0, atol=2 * TOLERANCE)
    assert np.all((front.losses >= front.ideal) & (front.losses <= front.nadir))
    assert np.all(front.reference(0.1) > front.nadir)


def test_a_front_needs_an_inside() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        pareto_front(ProblemOptima(make_problem("bernoulli")), 2)


# --- the least ideal distance


def test_the_least_ideal_distance_is_certified_and_below_every_other(
    solved: tuple[ProblemOptima, Front],
) -> None:
    optima, front = solved
    least = least_ideal_distance(optima)
    assert 0.0 <= least.value - least.lower <= 1e-7
    rng = np.random.default_rng(1)
    theta = points_in_ball(rng, 400, optima.problem.dim, optima.problem.radius)
    losses = np.concatenate([optima.problem.losses(theta), front.losses])
    assert ideal_distance(losses, optima.values).min() >= least.lower - EXACT
    at_lam = ideal_distance(optima.problem.losses(optima.mix(least.lam).theta), optima.values)
    np.testing.assert_allclose(at_lam, least.value, rtol=1e-12)


def test_the_least_ideal_distance_of_the_symmetric_bernoulli_pair_is_known() -> None:
    """By symmetry at theta = 0: both gaps are KL(0.9 || 0.5) = log 2 - H(0.9)."""
    least = least_ideal_distance(ProblemOptima(make_problem("bernoulli")))
    gap = np.log(2.0) + 0.9 * np.log(0.9) + 0.1 * np.log(0.1)
    np.testing.assert_allclose((least.value, least.lam), (np.sqrt(2.0) * gap, 0.5), rtol=1e-9)


def test_without_conflict_the_ideal_point_is_reached() -> None:
    least = least_ideal_distance(ProblemOptima(make_problem("quadratic", distance=0.0)))
    assert least.value <= TOLERANCE


# --- dominance and hypervolume


@given(POINTS)
def test_nondominated_agrees_with_its_definition(points: np.ndarray) -> None:
    at_least_as_good = np.all(points[:, None] <= points[None], axis=2)
    better = np.any(points[:, None] < points[None], axis=2)
    np.testing.assert_array_equal(nondominated(points), ~np.any(at_least_as_good & better, axis=0))


@given(POINTS)
def test_hypervolume_counts_the_dominated_cells(points: np.ndarray) -> None:
    """Brute force: with integer points the area is the number of unit cells they dominate."""
    cells = np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID)), axis=-1).reshape(-1, 1, 2)
    dominated = np.any(np.all(points <= cells, axis=2), axis=1)
    assert hypervolume(points, (GRID, GRID)) == dominated.sum()


@given(POINTS, st.tuples(st.integers(0, 14), st.integers(0, 14)))
@settings(max_examples=60)
def test_hypervolume_never_falls_when_a_point_is_added_or_improved(
    points: np.ndarray, extra: tuple[int, int]
) -> None:
    volume = hypervolume(points, (GRID, GRID))
    assert hypervolume(np.vstack([points, extra]), (GRID, GRID)) >= volume
    assert hypervolume(points - 1, (GRID, GRID)) >= volume
    dominated_by_extra = np.all(points >= extra, axis=1)
    assert hypervolume(np.vstack([points[~dominated_by_extra], extra]), (GRID, GRID)) >= volume


@given(POINTS, st.integers(0, 2**32 - 1))
def test_hypervolume_ignores_order_and_repetition(points: np.ndarray, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(points))
    twice = np.vstack([points[order], points])
    assert hypervolume(twice, (GRID, GRID)) == hypervolume(points, (GRID, GRID))


def test_a_finer_front_dominates_more_but_no_more_than_convexity_allows() -> None:
    optima = ProblemOptima(make_problem("toy2d"))
    coarse, middle, fine = (pareto_front(optima, count) for count in (6, 11, 201))
    reference = fine.reference()
    volumes = [hypervolume(f.losses, reference) for f in (coarse, middle, fine)]
    assert volumes == sorted(volumes)
    # Grids of 11 and 201 points nest; nothing dominates more than the ideal point.
    assert volumes[-1] < hypervolume(fine.ideal[None], reference)


def test_points_must_be_numbers() -> None:
    with pytest.raises(ValueError, match="finite"):
        hypervolume([[np.nan, 0.0]], (1.0, 1.0))
