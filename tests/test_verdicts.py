"""The statistics of verdicts: coverage, error rates, and what decides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from theory.predictions.verdicts import Claim, Claims, Estimate, holm, judge, within

MARGINS = st.floats(-1.0, 1.0)


def _claims(estimates: list[Estimate], threshold: float = 0.0) -> Claims:
    claims = [Claim(f"claim {i}", e, threshold) for i, e in enumerate(estimates)]
    return Claims(claims, claims)


def _outcome(estimates: list[Estimate], threshold: float = 0.0) -> str:
    return judge("P", _claims(estimates, threshold)).outcome


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_one_sided_limits_err_as_often_as_they_say(seeds: int) -> None:
    samples = np.random.default_rng(0).normal(0.7, 2.0, (4000, seeds))
    lows, highs = zip(*(Estimate.from_seeds(s).limits(0.05, 0.01) for s in samples), strict=True)
    # 3.5 standard deviations of a binomial count of 4000.
    assert np.mean(np.array(lows) > 0.7) == pytest.approx(0.05, abs=0.012)
    assert np.mean(np.array(highs) < 0.7) == pytest.approx(0.01, abs=0.006)


@pytest.mark.parametrize("count", [1, 5, 40])
def test_wrong_verdicts_on_the_threshold_are_as_rare_as_the_level_says(count: int) -> None:
    rng = np.random.default_rng(count)
    outcomes = [
        _outcome([Estimate.from_seeds(s) for s in rng.normal(0.0, 1.0, (count, 3))])
        for _ in range(1200)
    ]
    # 0.05 and 3.5 standard deviations of a binomial share of 1200.
    assert outcomes.count("holds") / 1200 <= 0.05 + 0.022
    assert outcomes.count("fails") / 1200 <= 0.05 + 0.022
    assert outcomes.count("not decided") / 1200 >= 0.85


def test_clear_margins_are_decided_from_three_seeds() -> None:
    rng = np.random.default_rng(1)
    for sign, outcome in ((1.0, "holds"), (-1.0, "fails")):
        decided = 0
        for _ in range(200):
            samples = rng.normal(sign, 0.02, (10, 3))
            decided += _outcome([Estimate.from_seeds(s) for s in samples]) == outcome
        assert decided >= 195


@given(st.lists(st.tuples(MARGINS, st.floats(0.0, 0.5)), min_size=1, max_size=5), MARGINS)
def test_a_verdict_agrees_with_the_limits_that_it_reports(
    margins: list[tuple[float, float]], threshold: float
) -> None:
    verdict = judge("P", _claims([Estimate(m, e, 2, 0.01) for m, e in margins], threshold))
    if verdict.outcome == "holds":
        assert verdict.low >= threshold
        assert not verdict.violated
    elif verdict.outcome == "fails":
        assert verdict.high <= threshold
        assert verdict.claim in verdict.violated
    else:
        assert verdict.low <= threshold


@given(st.lists(st.tuples(MARGINS, st.floats(0.01, 0.5)), min_size=2, max_size=6), st.randoms())
def test_the_order_of_the_claims_does_not_matter(
    margins: list[tuple[float, float]], random: object
) -> None:
    estimates = [Estimate(m, e, 2) for m, e in margins]
    shuffled = list(estimates)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    first, second = (judge("P", _claims(e)) for e in (estimates, shuffled))
    assert (first.outcome, first.margin) == (second.outcome, second.margin)
    assert len(first.violated) == len(second.violated)


def test_one_seed_decides_nothing_unless_its_uncertainty_is_given() -> None:
    assert _outcome([Estimate.from_seeds([5.0])]) == "not decided"
    assert _outcome([Estimate.from_seeds([5.0], bound=0.1)]) == "not decided"
    assert _outcome([Estimate.from_seeds([5.0], bound=0.1, fixed=True)]) == "holds"
    assert _outcome([Estimate.from_seeds([])]) == "not decided"


@given(MARGINS, st.floats(0.0, 0.5))
def test_a_bound_widens_by_exactly_itself(mean: float, bound: float) -> None:
    sharp, wide = Estimate(mean, 0.3, 4), Estimate(mean, 0.3, 4, bound)
    (low, high), (lower, higher) = sharp.limits(0.05, 0.05), wide.limits(0.05, 0.05)
    assert (low - lower, higher - high) == pytest.approx((bound, bound))
    assert wide.p_above(0.0) == pytest.approx(sharp.p_above(bound))
    assert wide.p_below(0.0) == pytest.approx(sharp.p_below(-bound))


def test_a_margin_on_its_threshold_is_not_decided() -> None:
    assert _outcome([Estimate(0.2)], threshold=0.2) == "not decided"
    assert _outcome([Estimate(0.2, bound=0.01)], threshold=0.205) == "not decided"


@pytest.mark.parametrize(
    ("mean", "outcome"), [(-1.02, "holds"), (-1.2, "fails"), (-0.8, "fails"), (-1.1, "not decided")]
)
def test_equivalence_is_shown_inside_the_tolerance_and_refuted_outside(
    mean: float, outcome: str
) -> None:
    claims = within("slope", Estimate(mean, 0.01, 9), -1.0, 0.1)
    assert judge("P", Claims(claims, claims)).outcome == outcome


def test_holm_on_a_known_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005], 0.05) == [True, False, False, True]
    assert holm([0.04, 0.04], 0.05) == [False, False]
    assert holm([], 0.05) == []


def test_nothing_to_test_is_not_decided_and_says_why() -> None:
    verdict = judge("P", Claims(missing="no runs"))
    assert (verdict.outcome, verdict.note) == ("not decided", "no runs")


@pytest.mark.parametrize("level", [0.5, 1.0, 95.0])
def test_a_level_must_be_a_probability_above_one_half(level: float) -> None:
    with pytest.raises(ValueError, match="level"):
        judge("P", Claims(), level)
