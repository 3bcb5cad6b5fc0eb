"""The numbers the paper reports, from losses and optima; shared by `theory` and `llm`.

With w = (lam, 1 - lam), the optimality gaps delta_i = f_i - f_i*, and h_i = w_i delta_i:

    f_Mix = w . f,   G_Mix = f_Mix - min f_Mix          (mix_gap)
    f_Max = max h_i, G_Max = f_Max - min f_Max          (max_gap)
    ID    = sqrt(delta_DPO^2 + delta_SFT^2)             (ideal_distance)

Arrays of losses have (DPO, SFT) on the last axis. ID cannot reach 0 under conflict.

A measured rate is the slope of log(mean gap) against log T: a gap that falls like T^-s has the
slope -s. The fit is ordinary least squares on the logarithm of the mean over seeds: theorems bound
the expected gap, not the gap of a run. Seeds are independent and the recorded steps of one seed are
not, so whole seeds are resampled (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
chapter 13: percentile intervals).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student_t

from theory.optima import ProblemOptima
from theory.schedulers import objective_weights
from theory.tasks import Task

Array = NDArray[np.float64]


def optimality_gaps(losses: ArrayLike, optimum: ArrayLike) -> Array:
    """delta = f - f*, shape (..., 2)."""
    return np.asarray(losses, dtype=float) - np.asarray(optimum, dtype=float)


def ideal_distance(losses: ArrayLike, optimum: ArrayLike) -> Array:
    """Euclidean distance of (f_DPO, f_SFT) to the ideal point (f_DPO*, f_SFT*)."""
    return np.linalg.norm(optimality_gaps(losses, optimum), axis=-1)


def mix_value(losses: ArrayLike, lam: ArrayLike) -> Array:
    """f_Mix = lam f_DPO + (1 - lam) f_SFT."""
    return np.sum(objective_weights(lam) * np.asarray(losses, dtype=float), axis=-1)


def max_value(losses: ArrayLike, optimum: ArrayLike, lam: ArrayLike) -> Array:
    """f_Max = max_i w_i (f_i - f_i*)."""
    return np.max(objective_weights(lam) * optimality_gaps(losses, optimum), axis=-1)


def convex_metrics(optima: ProblemOptima, theta: Array, lam: float) -> dict[str, Array]:
    """Every metric at points theta (..., d) of a convex problem, each of shape (...)."""
    losses = optima.problem.losses(theta)
    return {
        "f_dpo": losses[..., Task.DPO],
        "f_sft": losses[..., Task.SFT],
        "mix_gap": mix_value(losses, lam) - optima.mix(lam).value,
        "max_gap": max_value(losses, optima.values, lam) - optima.max(lam).value,
        "ideal_distance": ideal_distance(losses, optima.values),
    }


def sequential_limit(optima: ProblemOptima, last: Task, lam: float) -> tuple[float, str]:
    """G_Mix where sequential training ends for T -> infinity, and where the number comes from.

    The limit is G_Mix(theta*_last): the last stage converges to the minimiser of its own objective
    from wherever it starts (unique minimiser; arXiv 2410.15483, lower bound).
    """
    problem = optima.problem
    if problem.mix_gap_limit is not None:
        return problem.mix_gap_limit(last, lam), "closed form"
    theta = optima.single[last].theta
    return float(convex_metrics(optima, theta, lam)["mix_gap"]), "certified"


def middle(lams: Sequence[float]) -> float:
    """The lam closest to 1/2: the one that a single figure shows."""
    return min(lams, key=lambda lam: abs(lam - 0.5))


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def mean_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Mean with Student's t interval over independent seeds; infinite with a single value."""
    values = np.asarray(values, dtype=float)
    spread = values.std(ddof=1) if len(values) > 1 else np.nan
    return t_interval(values.mean(), spread, len(values), level)


def t_interval(mean: float, spread: float, count: int, level: float = 0.95) -> Interval:
    """The same from the mean, the sample standard deviation and the number of values."""
    mean = float(mean)
    if count < 2:
        return Interval(mean, -np.inf, np.inf)
    half = _t_quantile(0.5 + level / 2, count - 1) * float(spread) / count**0.5
    return Interval(mean, mean - half, mean + half)


@lru_cache(maxsize=64)
def _t_quantile(probability: float, freedom: int) -> float:
    return float(student_t.ppf(probability, freedom))


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
