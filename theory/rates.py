"""Measured rates: the slope of log(mean gap) against log T, with a bootstrap interval over seeds.

A gap that falls like T^-s has the slope -s. The fit is ordinary least squares on the logarithm of
the mean over seeds: theorems bound the expected gap, not the gap of a run. Seeds are independent
and the recorded steps of one seed are not, so whole seeds are resampled (Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, chapter 13: percentile intervals).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory.metrics import Interval

Array = NDArray[np.float64]


def fit_slope(steps: ArrayLike, values: ArrayLike) -> Array:
    """Least-squares slope of log(values) against log(steps): steps (K,), values (..., K) -> (...).

    Raises:
        ValueError: if there are fewer than two steps, or a step or value is not positive.
    """
    steps, values = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    if len(steps) < 2:
        raise ValueError(f"a slope needs at least two steps, not {len(steps)}")
    if not (np.all(steps > 0.0) and np.all(values > 0.0)):
        raise ValueError("a log-log slope needs positive steps and values")
    centred = np.log(steps) - np.log(steps).mean()
    return np.log(values) @ centred / (centred @ centred)


def slope_interval(
    steps: ArrayLike,
    gaps: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Slope of the mean over seeds and its percentile interval: steps (K,), gaps (seeds, K).

    With a single seed the interval is infinite. The same `seed` gives the same resamples, so
    methods that ran on the same seeds are compared on the same resamples.
    """
    gaps = np.asarray(gaps, dtype=float)
    slope = float(fit_slope(steps, gaps.mean(axis=0)))
    count = len(gaps)
    if count < 2:
        return Interval(slope, -np.inf, np.inf)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
    slopes = fit_slope(steps, drawn @ gaps / count)
    low, high = np.quantile(slopes, [(1 - level) / 2, (1 + level) / 2])
    return Interval(slope, float(low), float(high))
