"""Importance sampling: exact moments, variances by enumeration, the optimal probability."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from _asserts import EXACT, assert_binomial, points_in_ball, sample_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from theory.objectives import LogisticDPO, SoftmaxSFT
from theory.optima import ProblemOptima
from theory.problems import make_problem, quadratic, softmax_problem
from theory.schedulers import Importance, objective_weights
from theory.tasks import Task
from theory.theorems import leading_order
from theory.theorems.importance import (
    GradientMoments,
    enumerate_gradients,
    expected_cost,
    gradient_moments,
    optimal_probability,
    second_moment,
)

RNG = np.random.default_rng(5)
SMALL = softmax_problem(dim=3, responses=4, prompts=3, pairs_per_prompt=2, beta=0.7, seed=2)
positive = st.floats(1e-3, 1e3)
interior = st.floats(0.01, 0.99)


# --- the samples


def test_enumerated_gradients_are_those_of_the_compiled_kernels() -> None:
    dpo, sft = SMALL.objectives
    assert isinstance(dpo, LogisticDPO)
    assert isinstance(sft, SoftmaxSFT)
    theta = RNG.standard_normal(3)
    pairs, (prompts, responses) = len(dpo.preference), sft.labels.shape
    index = (np.arange(pairs) + 0.5) / pairs
    # The kernel draws the preferred label below p_i and the other above: 0 and almost 1.
    draws = np.concatenate([np.stack([index, np.full(pairs, u)], 1) for u in (0.0, 1.0 - 1e-12)])
    np.testing.assert_allclose(
        enumerate_gradients(dpo, theta)[0], sample_gradients(dpo, theta, draws)[0], atol=EXACT
    )
    middles = np.cumsum(sft.labels, axis=1) - sft.labels / 2
    index = np.repeat((np.arange(prompts) + 0.5) / prompts, responses)
    draws = np.stack([index, middles.ravel()], axis=1)
    np.testing.assert_allclose(
        enumerate_gradients(sft, theta)[0], sample_gradients(sft, theta, draws)[0], atol=EXACT
    )


@pytest.mark.parametrize("task", list(Task))
def test_enumerated_gradients_average_to_the_gradient(task: Task) -> None:
    objective = SMALL.objectives[task]
    if isinstance(objective, LogisticDPO):
        objective = replace(objective, theta_ref=RNG.standard_normal(3))
    for theta in points_in_ball(RNG, 5, 3, SMALL.radius):
        gradients, probabilities = enumerate_gradients(objective, theta)
        assert probabilities.sum() == pytest.approx(1.0, abs=EXACT)
        np.testing.assert_allclose(
            probabilities @ gradients, objective.gradient(theta), atol=10 * EXACT
        )


def test_the_second_moment_of_a_quadratic_is_that_of_its_samples() -> None:
    objective = quadratic(dim=3, noise=0.7).objectives[0]
    theta = np.array([0.5, -1.0, 0.2])
    gradients, _ = sample_gradients(objective, theta, RNG.standard_normal((100_000, 3)))
    products = gradients[:, :, None] * gradients[:, None, :]
    error = products.std(axis=0) / np.sqrt(len(products))
    difference = np.abs(products.mean(axis=0) - second_moment(objective, theta))
    assert np.all(difference <= 5.0 * error)  # five standard errors, nine entries


def test_an_objective_without_a_finite_set_of_samples_is_refused() -> None:
    with pytest.raises(TypeError, match="Quadratic"):
        enumerate_gradients(quadratic().objectives[0], np.zeros(5))


# --- unbiased steps and their variance, by exact expectation


def step_outcomes(lam: float, p: float) -> list[tuple[float, np.ndarray]]:
    """(probability, weights) of the two decisions the scheduler takes, as it takes them."""
    runs = 4000
    scheduler = Importance((lam,) * runs, (p,) * runs, tuple(range(runs)))
    weights, _ = scheduler.select(scheduler.init(), lambda: np.zeros((runs, 2)))
    distinct, counts = np.unique(weights, axis=0, return_counts=True)
    assert len(distinct) == 2
    dpo = int(np.argmax(distinct[:, Task.DPO]))
    assert_binomial(int(counts[dpo]), runs, p)
    return [(p, distinct[dpo]), (1.0 - p, distinct[1 - dpo])]


@pytest.mark.parametrize(("lam", "p"), [(0.5, 0.2), (0.3, 0.3), (0.9, 0.4), (0.05, 0.6)])
def test_importance_weights_make_the_step_unbiased_and_give_the_variance(
    lam: float, p: float
) -> None:
    """Enumerates decisions and samples. The mean holds anywhere, the trace at theta_lam."""
    optima = ProblemOptima(SMALL)
    theta = optima.mix(lam).theta
    for point in (theta, RNG.standard_normal(3)):
        mean, second = np.zeros(3), np.zeros((3, 3))
        for probability, weights in step_outcomes(lam, p):
            for weight, objective in zip(weights, SMALL.objectives, strict=True):
                gradients, chances = enumerate_gradients(objective, point)
                if weight:
                    mean += probability * weight * (chances @ gradients)
                    moment = (gradients.T * chances) @ gradients
                    second += probability * weight**2 * moment
        np.testing.assert_allclose(mean, SMALL.mix(lam).gradient(point), atol=10 * EXACT)
        if point is theta:
            inverse = np.linalg.inv(SMALL.mix(lam).hessian(theta))
            trace = gradient_moments(optima, lam).importance_trace(lam, p)
            assert np.sum(inverse * second) == pytest.approx(trace, rel=1e-9)


@pytest.mark.parametrize("lam", [0.2, 0.5, 0.8])
def test_mix_trace_is_the_variance_over_all_pairs_of_samples(lam: float) -> None:
    optima = ProblemOptima(SMALL)
    theta = optima.mix(lam).theta
    (dpo, p), (sft, q) = (enumerate_gradients(f, theta) for f in SMALL.objectives)
    steps = (lam * dpo[:, None, :] + (1.0 - lam) * sft[None, :, :]).reshape(-1, 3)
    chances = np.outer(p, q).ravel()
    inverse = np.linalg.inv(SMALL.mix(lam).hessian(theta))
    variance = np.sum(chances * np.einsum("nd,de,ne->n", steps, inverse, steps))
    assert gradient_moments(optima, lam).mix_trace(lam) == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("lam", [0.1, 0.5])
def test_traces_agree_with_the_covariances_of_the_bounds(lam: float) -> None:
    optima = ProblemOptima(make_problem("toy2d"))
    theta, objectives = optima.mix(lam).theta, optima.problem.objectives
    slopes = [f.gradient(theta) for f in objectives]
    dpo, sft = (
        second_moment(f, theta) - np.outer(g, g) for f, g in zip(objectives, slopes, strict=True)
    )
    hessian = optima.problem.mix(lam).hessian(theta)
    moments = gradient_moments(optima, lam)
    for trace, covariance in (
        (moments.mix_trace(lam), leading_order.mix_covariance(lam, (dpo, sft))),
        (
            moments.alright_trace(lam),
            leading_order.alright_covariance(lam, (dpo, sft), slopes[0] - slopes[1]),
        ),
    ):
        law = leading_order.uniform_average_gap(hessian, covariance, num_steps=1)
        assert trace / 2.0 == pytest.approx(law, rel=1e-9)


def test_a_larger_batch_shrinks_the_noise_and_not_the_conflict() -> None:
    optima = ProblemOptima(make_problem("toy2d"))
    one, many = (gradient_moments(optima, 0.5, batch_size=size) for size in (1, 64))
    np.testing.assert_allclose(many.mean, one.mean, rtol=EXACT)
    np.testing.assert_allclose(many.second - many.mean, (one.second - one.mean) / 64, rtol=1e-9)
    assert many.mix_trace(0.5) == pytest.approx(one.mix_trace(0.5) / 64)
    assert many.alright_trace(0.5) > one.alright_trace(0.5) / 64


# --- ALRIGHT against Mix


@pytest.mark.parametrize("name", ["bernoulli", "quadratic", "toy2d", "softmax"])
def test_at_even_lam_alright_exceeds_mix_by_the_price_of_conflict(name: str) -> None:
    moments = gradient_moments(ProblemOptima(make_problem(name)), 0.5)
    dpo, sft = 8.0, 3.0
    alright = expected_cost(0.5, dpo, sft) * moments.alright_trace(0.5)
    mix = (dpo + sft) * moments.mix_trace(0.5)
    conflict = (dpo + sft) * moments.mean.sum() / 4.0
    assert conflict > 0.0
    assert alright == pytest.approx(mix + conflict, rel=1e-9)


def test_without_conflict_alright_and_mix_tie_at_even_lam() -> None:
    moments = gradient_moments(ProblemOptima(quadratic(distance=0.0)), 0.5)
    np.testing.assert_allclose(moments.mean, 0.0, atol=EXACT)
    assert moments.alright_trace(0.5) == pytest.approx(2.0 * moments.mix_trace(0.5), rel=1e-9)


# --- the optimal probability


def moments_of(dpo: float, sft: float) -> GradientMoments:
    return GradientMoments(np.array([dpo, sft]), np.zeros(2))


@settings(deadline=None)
@given(positive, positive, positive, positive, interior)
def test_the_optimal_probability_minimises_cost_times_variance(
    dpo: float, sft: float, dpo_cost: float, sft_cost: float, lam: float
) -> None:
    moments = moments_of(dpo, sft)

    def merit(p: float) -> float:
        return expected_cost(p, dpo_cost, sft_cost) * moments.importance_trace(lam, p)

    best = optimal_probability(moments, lam, dpo_cost, sft_cost)
    roots = lam * np.sqrt(dpo * dpo_cost) + (1.0 - lam) * np.sqrt(sft * sft_cost)
    assert merit(best) == pytest.approx(roots**2, rel=1e-9)
    found = minimize_scalar(
        lambda z: np.log(merit(1.0 / (1.0 + np.exp(-z)))), bounds=(-14, 14), method="bounded"
    )
    assert np.log(merit(best)) <= found.fun + 1e-9
    assert merit(best) <= merit(lam) * (1.0 + 1e-9)  # never worse than ALRIGHT


@given(positive, positive, interior)
def test_the_optimal_probability_is_lam_where_second_moments_match_costs(
    dpo_cost: float, sft_cost: float, lam: float
) -> None:
    assert optimal_probability(moments_of(dpo_cost, sft_cost), lam, dpo_cost, sft_cost) == (
        pytest.approx(lam, rel=1e-9)
    )


def test_special_cases_of_the_optimal_probability() -> None:
    noisier = optimal_probability(moments_of(9.0, 1.0), 0.5, 1.0, 1.0)
    assert noisier / (1.0 - noisier) == pytest.approx(3.0)  # standard deviations, not variances
    dearer = optimal_probability(moments_of(1.0, 1.0), 0.5, 4.0, 1.0)
    assert dearer / (1.0 - dearer) == pytest.approx(0.5)  # Neyman: 1 / sqrt(cost)
    heavier = optimal_probability(moments_of(1.0, 1.0), 0.8, 1.0, 1.0)
    assert heavier == pytest.approx(0.8)


# --- what is refused


def test_a_minimiser_on_the_boundary_is_refused() -> None:
    tight = replace(make_problem("bernoulli"), radius=0.1)
    with pytest.raises(ValueError, match="boundary"):
        gradient_moments(ProblemOptima(tight), 0.9)


@pytest.mark.parametrize("p", [0.0, 1.0, float("nan")])
def test_a_probability_outside_the_open_interval_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        moments_of(1.0, 1.0).importance_trace(0.5, p)


def test_costs_must_be_positive() -> None:
    with pytest.raises(ValueError, match="costs"):
        optimal_probability(moments_of(1.0, 1.0), 0.5, 0.0, 1.0)


def test_objective_weights_are_what_the_traces_use() -> None:
    moments = GradientMoments(np.array([2.0, 3.0]), np.array([1.0, 0.5]))
    dpo, sft = objective_weights(0.25)
    assert moments.mix_trace(0.25) == pytest.approx(dpo**2 * 1.0 + sft**2 * 2.5)
    assert moments.importance_trace(0.25, 0.5) == pytest.approx(2 * (dpo**2 * 2.0 + sft**2 * 3.0))
