"""Slopes recover power laws, and their bootstrap intervals cover."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from theory.rates import fit_slope, slope_interval

STEPS = np.geomspace(1e3, 1e5, 9)


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
