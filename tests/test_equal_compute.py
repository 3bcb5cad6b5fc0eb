"""Equal compute: budgets, the delta method, and the predicted ratio inside its interval."""

from __future__ import annotations

import numpy as np
import pytest

from theory.beyond.equal_compute import METHODS, Case, EqualCompute, predict, ratio_interval
from theory.costs import Costs
from theory.optima import ProblemOptima
from theory.problems import make_problem
from theory.sweep import run_sweep
from theory.theorems.importance import gradient_moments

CONFIG = EqualCompute(
    num_steps=4000, num_seeds=150, cases=(Case("quadratic", 0.05), Case("quadratic", 0.5))
)


def test_every_method_spends_the_same() -> None:
    budget = CONFIG.num_steps * (8.0 + 3.0)
    batches = CONFIG.batches()
    assert sorted({batch.algorithm for batch in batches}) == sorted(METHODS)
    for batch in batches:
        case = Case(batch.problem, batch.lams[0])
        prediction = predict(case.optima, case.lam, Costs())
        cost = prediction.cost[METHODS.index(batch.algorithm)]
        assert abs(batch.num_steps * cost - budget) <= cost / 2


def test_predicted_costs_and_merits_are_those_of_the_cost_model() -> None:
    optima = ProblemOptima(make_problem("quadratic"))
    prediction = predict(optima, 0.05, Costs())
    moments, p = gradient_moments(optima, 0.05), prediction.probability
    np.testing.assert_allclose(prediction.cost, [11.0, 0.05 * 8 + 0.95 * 3, p * 8 + (1 - p) * 3])
    assert prediction.merit[0] == pytest.approx(11.0 * moments.mix_trace(0.05))
    assert prediction.merit[2] < prediction.merit[1] < prediction.merit[0]


def test_the_measured_ratios_are_the_predicted_ones() -> None:
    """Within twice the half-width of the 95% interval, that is, four standard errors."""
    summary = CONFIG.summary(run_sweep(CONFIG.batches(), jobs=1, progress=False))
    for numbers in summary.values():
        for method in METHODS[1:]:
            ratio = numbers[method]["measured_ratio"]
            predicted = numbers[method]["predicted_ratio"]["full"]
            assert abs(ratio["mean"] - predicted) <= ratio["high"] - ratio["low"]
        # The two cases lie on either side of 1, so the intervals do decide something.
    ratios = [numbers["alright"]["measured_ratio"] for numbers in summary.values()]
    assert ratios[0]["high"] < 1.0 < ratios[1]["low"]


def test_the_ratio_to_itself_is_one_without_error() -> None:
    values = np.random.default_rng(0).exponential(size=20)
    assert ratio_interval(values, values) == pytest.approx((1.0, 1.0, 1.0))
    low, high = ratio_interval(3.0 * values, values)[1:]
    assert low == pytest.approx(3.0)
    assert high == pytest.approx(3.0)


def test_ratio_intervals_cover_the_true_ratio() -> None:
    """95% nominal over 400 repetitions: fewer than 0.91 would be four standard errors off."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        shared = rng.gamma(3.0, size=60)
        top, bottom = shared + rng.gamma(2.0, size=60), shared + rng.gamma(1.0, size=60)
        _, low, high = ratio_interval(top, bottom)
        hits += low <= 5.0 / 4.0 <= high
    assert hits >= 0.91 * 400


def test_on_the_softmax_problem_the_predictions_are_those_reported() -> None:
    """Importance sampling needs about a third of Mix's gap where DPO's gradients are small."""
    optima = ProblemOptima(make_problem("softmax", beta=0.1))
    merit = predict(optima, 0.5, Costs()).merit
    assert merit[2] / merit[0] == pytest.approx(0.343, abs=0.002)
    assert merit[1] / merit[0] == pytest.approx(1.0, abs=0.001)
    rare = predict(optima, 0.05, Costs()).merit
    assert rare[1] / rare[0] == pytest.approx(0.311, abs=0.002)
