"""Metrics: definitions by hand, signs on the whole ball, limits and their bounds, measured rates.

`certificate` bounds how far a reported minimum lies above the true one, so a gap may be negative by
that much and no more; `EXACT` covers rounding in the losses on top of it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from _asserts import EXACT, assert_binomial, points_in_ball
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import stats

from theory.metrics import (
    convex_metrics,
    fit_slope,
    ideal_distance,
    max_value,
    mean_interval,
    mix_value,
    optimality_gaps,
    sequential_limit,
    slope_interval,
    t_interval,
)
from theory.objectives import Constants
from theory.optima import TOLERANCE, ProblemOptima
from theory.problems import PROBLEMS, bernoulli, bernoulli_kl, make_problem, quadratic
from theory.tasks import Task

STEPS = np.geomspace(1e3, 1e5, 9)
LAMS = [0.1, 0.25, 0.5, 0.75, 0.9]
EVERY_PROBLEM = pytest.mark.parametrize("name", PROBLEMS)
EVERY_LAM = pytest.mark.parametrize("lam", LAMS)
EVERY_TASK = pytest.mark.parametrize("last", list(Task))

losses_strategy = st.tuples(st.floats(0.0, 10.0), st.floats(0.0, 10.0))
lam_strategy = st.floats(0.0, 1.0)


@cache
def optima_of(name: str) -> ProblemOptima:
    return ProblemOptima(make_problem(name))


def weight(task: Task, lam: float) -> float:
    return lam if task == Task.DPO else 1.0 - lam


def abandoned_gradient(optima: ProblemOptima, last: Task) -> float:
    """Norm of the gradient of the other objective where the last stage ends."""
    theta = optima.single[last].theta
    return float(np.linalg.norm(optima.problem.objectives[last.other].gradient(theta)))


def mix_constants(optima: ProblemOptima, lam: float) -> Constants:
    """Weighted sums of the constants hold for f_Mix."""
    rows = [f.constants(optima.problem.radius) for f in optima.problem.objectives]
    return Constants(*(lam * dpo + (1.0 - lam) * sft for dpo, sft in zip(*rows, strict=True)))


# --- definitions


def test_metrics_of_one_point_by_hand() -> None:
    losses, optimum, lam = (2.0, 5.0), (1.0, 1.0), 0.25
    assert optimality_gaps(losses, optimum).tolist() == [1.0, 4.0]
    assert mix_value(losses, lam) == 0.25 * 2.0 + 0.75 * 5.0
    assert max_value(losses, optimum, lam) == 0.75 * 4.0
    assert max_value(losses, optimum, 0.875) == 0.875 * 1.0
    assert ideal_distance(losses, optimum) == pytest.approx(math.sqrt(17.0), rel=EXACT)


@given(losses_strategy, losses_strategy, lam_strategy)
def test_metrics_follow_their_definitions(
    losses: tuple[float, float], optimum: tuple[float, float], lam: float
) -> None:
    dpo, sft = losses[0] - optimum[0], losses[1] - optimum[1]
    assert_allclose(mix_value(losses, lam), lam * losses[0] + (1.0 - lam) * losses[1], rtol=EXACT)
    assert_allclose(max_value(losses, optimum, lam), max(lam * dpo, (1.0 - lam) * sft), rtol=EXACT)
    # Squares of tiny gaps underflow: hence the absolute tolerance.
    assert_allclose(ideal_distance(losses, optimum), math.hypot(dpo, sft), rtol=EXACT, atol=EXACT)


def test_metrics_keep_the_leading_shape_and_take_one_lam_per_run() -> None:
    losses = np.arange(12.0).reshape(2, 3, 2)
    lams = np.array([0.0, 0.5, 1.0])
    assert optimality_gaps(losses, (0.0, 1.0)).shape == (2, 3, 2)
    assert ideal_distance(losses, (0.0, 1.0)).shape == (2, 3)
    expected = np.stack([losses[:, 0, 1], losses[:, 1].mean(axis=-1), losses[:, 2, 0]], axis=1)
    assert_allclose(mix_value(losses, lams), expected, rtol=EXACT)
    assert_allclose(
        max_value(losses, (0.0, 0.0), lams)[:, 1], losses[:, 1].max(axis=-1) / 2, rtol=EXACT
    )


@EVERY_PROBLEM
def test_convex_metrics_are_the_losses_measured_against_the_certified_optima(name: str) -> None:
    optima, lam = optima_of(name), 0.25
    problem = optima.problem
    theta = points_in_ball(np.random.default_rng(0), 6, problem.dim, problem.radius)
    metrics = convex_metrics(optima, theta.reshape(2, 3, -1), lam)
    assert {values.shape for values in metrics.values()} == {(2, 3)}
    for i, point in enumerate(theta):
        dpo, sft = (float(f.value(point)) for f in problem.objectives)
        gap_dpo, gap_sft = dpo - optima.single[0].value, sft - optima.single[1].value
        expected = {
            "f_dpo": dpo,
            "f_sft": sft,
            "mix_gap": 0.25 * dpo + 0.75 * sft - optima.mix(lam).value,
            "max_gap": max(0.25 * gap_dpo, 0.75 * gap_sft) - optima.max(lam).value,
            "ideal_distance": math.hypot(gap_dpo, gap_sft),
        }
        for metric, value in expected.items():
            assert_allclose(metrics[metric].ravel()[i], value, rtol=EXACT, atol=EXACT)


# --- gaps on the whole ball


@EVERY_PROBLEM
@EVERY_LAM
def test_no_point_of_the_ball_beats_a_minimum_by_more_than_its_certificate(
    name: str, lam: float
) -> None:
    optima = optima_of(name)
    problem = optima.problem
    points = points_in_ball(np.random.default_rng(1), 400, problem.dim, problem.radius)
    near = [optima.mix(lam).theta, optima.max(lam).theta, *(o.theta for o in optima.single)]
    nudges = 1e-5 * np.random.default_rng(2).standard_normal((50, problem.dim))
    points = np.concatenate([points, *(theta + nudges for theta in near)])
    metrics = convex_metrics(optima, points, lam)
    assert metrics["mix_gap"].min() >= -optima.mix(lam).certificate - EXACT
    assert metrics["max_gap"].min() >= -optima.max(lam).certificate - EXACT
    assert metrics["ideal_distance"].min() > 0.0
    # The nudged minimisers are close enough for the bounds to be sharp.
    assert metrics["mix_gap"].min() <= 1e-8
    assert metrics["max_gap"].min() <= 1e-4


@EVERY_PROBLEM
@EVERY_LAM
def test_gaps_vanish_at_the_certified_minimisers(name: str, lam: float) -> None:
    optima = optima_of(name)
    at_mix = convex_metrics(optima, optima.mix(lam).theta, lam)
    at_max = convex_metrics(optima, optima.max(lam).theta, lam)
    assert abs(at_mix["mix_gap"]) <= EXACT
    assert abs(at_max["max_gap"]) <= EXACT
    # Neither minimiser is the other's, except where symmetry makes them one.
    if (name, lam) != ("bernoulli", 0.5):
        assert at_mix["max_gap"] > TOLERANCE
        assert at_max["mix_gap"] > TOLERANCE


@EVERY_PROBLEM
@EVERY_TASK
def test_ideal_distance_at_a_single_minimiser_is_the_other_gap(name: str, last: Task) -> None:
    optima = optima_of(name)
    theta = optima.single[last].theta
    other = optima.problem.objectives[last.other].value(theta) - optima.values[last.other]
    distance = convex_metrics(optima, theta, 0.5)["ideal_distance"]
    assert_allclose(distance, other, rtol=EXACT)


# --- the sequential limit


@pytest.mark.parametrize("name", ["bernoulli", "quadratic"])
@EVERY_LAM
@EVERY_TASK
def test_closed_form_limit_is_the_certified_one(name: str, lam: float, last: Task) -> None:
    optima = optima_of(name)
    limit, source = sequential_limit(optima, last, lam)
    without_formula = ProblemOptima(replace(optima.problem, mix_gap_limit=None))
    certified, other_source = sequential_limit(without_formula, last, lam)
    assert (source, other_source) == ("closed form", "certified")
    # Both values carry certificates; at the minimisers Newton leaves far less than those allow.
    assert_allclose(limit, certified, rtol=0, atol=EXACT)


@EVERY_PROBLEM
@EVERY_LAM
@EVERY_TASK
def test_the_limit_is_the_mix_gap_of_the_last_objectives_minimiser(
    name: str, lam: float, last: Task
) -> None:
    optima = optima_of(name)
    theta = optima.single[last].theta
    dpo, sft = (float(f.value(theta)) for f in optima.problem.objectives)
    expected = lam * dpo + (1.0 - lam) * sft - optima.mix(lam).value
    assert_allclose(sequential_limit(optima, last, lam)[0], expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("last", list(Task))
def test_bernoulli_limit_is_the_papers_number(last: Task) -> None:
    limit, source = sequential_limit(optima_of("bernoulli"), last, 0.5)
    assert source == "closed form"
    assert limit == pytest.approx(math.log(5.0 / 3.0), rel=EXACT)  # KL(1/2 || 1/10)
    assert round(limit, 4) == 0.5108


@given(st.floats(0.05, 0.95), st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_bernoulli_limit_obeys_pinsker_in_both_orders(p: float, q: float, lam: float) -> None:
    problem = bernoulli(p=p, q=q)
    assert problem.mix_gap_limit is not None
    after_sft = problem.mix_gap_limit(Task.SFT, lam)
    after_dpo = problem.mix_gap_limit(Task.DPO, lam)
    middle = lam * p + (1.0 - lam) * q
    assert after_sft == bernoulli_kl(middle, q)
    assert after_dpo == bernoulli_kl(middle, p)
    assert after_sft >= 2.0 * lam**2 * (p - q) ** 2 - EXACT
    assert after_dpo >= 2.0 * (1.0 - lam) ** 2 * (p - q) ** 2 - EXACT


@EVERY_LAM
@EVERY_TASK
def test_without_conflict_sequential_training_loses_nothing(lam: float, last: Task) -> None:
    for problem in (bernoulli(p=0.3, q=0.3), quadratic(distance=0.0)):
        assert abs(sequential_limit(ProblemOptima(problem), last, lam)[0]) <= EXACT


@EVERY_PROBLEM
@EVERY_LAM
@EVERY_TASK
def test_gradient_of_the_abandoned_objective_bounds_the_limit(
    name: str, lam: float, last: Task
) -> None:
    """w^2 |g|^2 / (2 L_lam) <= G_Mix(theta*_last) <= w^2 |g|^2 / (2 mu_lam), w of the abandoned."""
    optima = optima_of(name)
    limit = sequential_limit(optima, last, lam)[0]
    squared = (weight(last.other, lam) * abandoned_gradient(optima, last)) ** 2
    constants = mix_constants(optima, lam)
    assert squared > 0.0
    assert squared / (2.0 * constants.smoothness) <= limit
    assert constants.strong_convexity > 0.0
    assert limit <= squared / (2.0 * constants.strong_convexity)


@EVERY_PROBLEM
@EVERY_TASK
def test_the_limit_is_quadratic_in_a_small_weight_of_the_abandoned_objective(
    name: str, last: Task
) -> None:
    """G_Mix(theta*_last) / w^2 -> g' H_last^-1 g / 2 as w -> 0: no bound is uniform in lam.

    At w = 1e-4 the next term is of relative order w times the ratio of the curvatures, below 1%.
    The limit is of order 1e-9 there, a thousand times the rounding of the losses.
    """
    optima, small = optima_of(name), 1e-4
    lam = small if last == Task.SFT else 1.0 - small
    theta = optima.single[last].theta
    kept, left = (optima.problem.objectives[t] for t in (last, last.other))
    gradient = left.gradient(theta)
    expected = gradient @ np.linalg.solve(kept.hessian(theta), gradient) / 2
    assert_allclose(sequential_limit(optima, last, lam)[0] / small**2, expected, rtol=0.01)


@EVERY_PROBLEM
def test_the_stage_orders_cross_at_the_lam_that_the_theory_names(name: str) -> None:
    """lam_c = delta_SFT(theta_DPO*) / (delta_DPO(theta_SFT*) + delta_SFT(theta_DPO*))."""
    optima = optima_of(name)
    dpo, sft = optima.problem.objectives
    lost_dpo = float(dpo.value(optima.single[Task.SFT].theta)) - optima.values[Task.DPO]
    lost_sft = float(sft.value(optima.single[Task.DPO].theta)) - optima.values[Task.SFT]
    crossing = lost_sft / (lost_dpo + lost_sft)

    def advantage_of_dpo_first(lam: float) -> float:
        after_sft, after_dpo = (sequential_limit(optima, t, lam)[0] for t in (Task.SFT, Task.DPO))
        return after_dpo - after_sft

    assert 0.0 < crossing < 1.0
    assert abs(advantage_of_dpo_first(crossing)) <= EXACT
    # The difference is linear in lam with slope -(lost_dpo + lost_sft).
    for shift in (-0.05, 0.05):
        expected = -shift * (lost_dpo + lost_sft)
        assert_allclose(advantage_of_dpo_first(crossing + shift), expected, rtol=0, atol=EXACT)


# --- intervals over seeds


@given(
    st.lists(st.floats(-100.0, 100.0), min_size=2, max_size=30).filter(lambda v: np.std(v) > 1e-3),
    st.sampled_from([0.5, 0.9, 0.95, 0.99]),
)
def test_mean_interval_is_scipys(values: list[float], level: float) -> None:
    reference = stats.ttest_1samp(values, 0.0).confidence_interval(level)
    mean, low, high = mean_interval(values, level)
    # 100 is the largest value; a difference of such values carries its rounding.
    assert_allclose([low, high], [reference.low, reference.high], rtol=1e-9, atol=100 * EXACT)
    assert_allclose(mean, math.fsum(values) / len(values), rtol=0, atol=100 * EXACT)


@pytest.mark.parametrize("count", [3, 20])
def test_mean_interval_covers_the_true_mean_at_its_level(count: int) -> None:
    samples = np.random.default_rng(0).standard_normal((4000, count)) + 1.0
    intervals = np.array([mean_interval(row) for row in samples])
    covered = (intervals[:, 1] <= 1.0) & (intervals[:, 2] >= 1.0)
    assert_binomial(int(covered.sum()), len(samples), 0.95)


def test_mean_interval_of_equal_values_is_a_point_and_of_one_value_is_unbounded() -> None:
    assert mean_interval([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)
    assert mean_interval([2.0]) == (2.0, -math.inf, math.inf)
    assert t_interval(2.0, math.nan, 1) == (2.0, -math.inf, math.inf)


# --- measured rates


@given(st.floats(-3.0, 3.0), st.floats(1e-3, 1e3))
def test_the_slope_of_a_power_law_is_its_exponent(exponent: float, scale: float) -> None:
    # Nine logarithms, each rounded at 1e-16 of at most 40, over a spread of 4.6: 1e-13 with room.
    np.testing.assert_allclose(fit_slope(STEPS, scale * STEPS**exponent), exponent, atol=1e-11)


def test_the_slope_ignores_the_unit_of_steps_and_values() -> None:
    values = np.array([5.0, 3.0, 2.5, 1.0, 0.7, 0.8, 0.3, 0.2, 0.1])
    np.testing.assert_allclose(fit_slope(7 * STEPS, 3 * values), fit_slope(STEPS, values))


def test_each_row_has_its_own_slope() -> None:
    exponents = np.array([-1.0, -0.5, 0.0])
    np.testing.assert_allclose(fit_slope(STEPS, STEPS ** exponents[:, None]), exponents, atol=1e-12)


def test_the_interval_covers_the_true_exponent_at_about_its_level() -> None:
    """Mean gaps exactly T^-0.7, multiplied by noise that is independent between seeds.

    200 experiments of 20 seeds: a percentile bootstrap of 20 seeds covers somewhat below 95%;
    fewer than 84% would be 4.5 standard deviations below a coverage of 93%.
    """
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        noise = rng.gamma(4.0, 0.25, (20, len(STEPS)))  # mean 1, sd 1/2
        interval = slope_interval(STEPS, STEPS**-0.7 * noise, resamples=400)
        covered += interval.low <= -0.7 <= interval.high
    assert 0.84 <= covered / 200 < 1.0


def test_the_fit_is_of_the_mean_gap_not_of_the_mean_slope() -> None:
    """Two seeds with slopes -1 and 0: the mean gap (1/T + 1) / 2 is flat at large T."""
    gaps = np.stack([1.0 / STEPS, np.ones_like(STEPS)])
    assert slope_interval(STEPS, gaps).mean == fit_slope(STEPS, gaps.mean(axis=0))
    assert -0.001 < slope_interval(STEPS, gaps).mean < 0.0


def test_identical_seeds_leave_no_doubt_and_one_seed_all_of_it() -> None:
    gaps = np.tile(STEPS**-0.5, (6, 1))
    # The resampled sums are rounded, nothing else.
    np.testing.assert_allclose(slope_interval(STEPS, gaps), -0.5, atol=1e-12)
    assert slope_interval(STEPS, gaps[:1])[1:] == (-np.inf, np.inf)


def test_more_seeds_narrow_the_interval_like_their_root() -> None:
    rng = np.random.default_rng(1)
    gaps = STEPS**-0.5 * rng.gamma(4.0, 0.25, (400, len(STEPS)))
    widths = [np.ptp(slope_interval(STEPS, gaps[:n])) for n in (25, 400)]
    # sqrt(400/25) = 4; the width from 25 seeds is itself uncertain by about 15%.
    assert 2.4 < widths[0] / widths[1] < 6.5


@pytest.mark.parametrize(
    ("steps", "values"), [([10.0], [1.0]), ([1.0, 2.0], [1.0, 0.0]), ([0.0, 1.0], [1.0, 1.0])]
)
def test_a_slope_that_does_not_exist_is_refused(steps: list[float], values: list[float]) -> None:
    with pytest.raises(ValueError, match="slope"):
        fit_slope(steps, values)
