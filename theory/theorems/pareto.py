"""Pareto fronts of two losses: certified front, hypervolume, least distance to the ideal point.

All losses are minimised and have (DPO, SFT) on the last axis. For convex objectives the set
{z : z >= f(theta) for some theta} is convex, so the minimisers of f_Mix over lam in (0, 1) are the
Pareto-optimal points (Boyd and Vandenberghe, Convex Optimization, 4.7.4), up to end points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq

from theory.optima import ProblemOptima
from theory.tasks import Task

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Front:
    """Points of the certified front, from all SFT (lam = 0) to all DPO (lam = 1).

    Point i minimises lam_i f_DPO + (1 - lam_i) f_SFT within `certificates[i]`: no theta of the
    ball lies below the line of slope -lam_i/(1 - lam_i) through the point, lowered by that much.
    """

    lams: Array
    theta: Array
    """(K, d)"""
    losses: Array
    """(K, 2)"""
    certificates: Array

    @property
    def ideal(self) -> Array:
        """(f_DPO*, f_SFT*)."""
        return np.array([self.losses[-1, Task.DPO], self.losses[0, Task.SFT]])

    @property
    def nadir(self) -> Array:
        """(f_DPO(theta_SFT*), f_SFT(theta_DPO*)): the worst of each loss on the front."""
        return np.array([self.losses[0, Task.DPO], self.losses[-1, Task.SFT]])

    def reference(self, margin: float = 0.1) -> Array:
        """ideal + (1 + margin) (nadir - ideal): just outside, so that both ends count too."""
        return self.ideal + (1.0 + margin) * (self.nadir - self.ideal)


def pareto_front(optima: ProblemOptima, count: int = 201) -> Front:
    """Minimisers of f_Mix at `count` values of lam, denser towards 0 and 1.

    Raises:
        OptimumError: if one of them could not be certified to `optima.TOLERANCE`.
        ValueError: if `count` is below 3.
    """
    if count < 3:
        raise ValueError(f"count is {count}; a front needs at least 3 points")
    lams = 0.5 - 0.5 * np.cos(np.pi * np.linspace(0.0, 1.0, count))
    points = [optima.mix(lam) for lam in lams]
    theta = np.stack([point.theta for point in points])
    certificates = np.array([point.certificate for point in points])
    return Front(lams, theta, optima.problem.losses(theta), certificates)


@dataclass(frozen=True)
class LeastDistance:
    """min over the ball of the ideal distance: certified to lie in [lower, value]."""

    value: float
    lower: float
    lam: float
    """The weight whose f_Mix has the same minimiser."""


def least_ideal_distance(optima: ProblemOptima) -> LeastDistance:
    """The smallest sqrt(delta_DPO^2 + delta_SFT^2), which conflict keeps above 0.

    Along the minimisers of f_Mix, delta_DPO falls with lam and delta_SFT rises, so that
    s(lam) = delta_DPO / (delta_DPO + delta_SFT) falls; the minimiser of the distance has s = lam
    (its gradient is proportional to delta_DPO grad f_DPO + delta_SFT grad f_SFT). Certificate: with
    u = delta / |delta| >= 0 at the point found, every theta has |delta(theta)| >= u . delta(theta)
    (Cauchy-Schwarz) >= |u|_1 (min f_Mix - w . f*), w = u / |u|_1, a certified minimum again.
    Without conflict both objectives share a minimiser and the distance is 0.
    """

    def deltas(lam: float) -> Array:
        losses = optima.problem.losses(optima.mix(lam).theta)
        return np.maximum(losses - np.asarray(optima.values), 0.0)

    def excess(lam: float) -> float:
        delta = deltas(lam)
        return float(delta[Task.DPO] - lam * delta.sum())

    if np.all(deltas(0.5) <= 1e-8):
        return LeastDistance(float(np.linalg.norm(deltas(0.5))), 0.0, 0.5)
    lam = float(brentq(excess, 0.0, 1.0, xtol=1e-12))
    delta = deltas(lam)
    value = float(np.linalg.norm(delta))
    weight = float(delta[Task.DPO] / delta.sum())
    best = optima.mix(weight)
    ideal = weight * optima.values[Task.DPO] + (1.0 - weight) * optima.values[Task.SFT]
    lower = float(delta.sum()) / value * (best.value - best.certificate - ideal)
    return LeastDistance(value, min(lower, value), lam)


def nondominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Which of the points (n, 2) no other point dominates (<= in both, < in one): mask (n,).

    Of equal points all are kept. O(n log n): sorted by the first loss, a point must be strictly
    below all the points before it.
    """
    points = _as_points(points)
    distinct, index = np.unique(points, axis=0, return_inverse=True)  # sorted by (first, second)
    before = np.minimum.accumulate(np.append(np.inf, distinct[:-1, 1]))
    return (distinct[:, 1] < before)[index.ravel()]


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Area that the points (n, 2) dominate below `reference` (2,): exact, larger is better.

    The union of the boxes [point, reference] (Zitzler and Thiele 1998), summed as the steps of a
    staircase. A point that does not lie strictly below the reference adds nothing.
    """
    points, reference = _as_points(points), np.asarray(reference, dtype=float)
    points = points[np.all(points < reference, axis=1)]
    points = points[nondominated(points)]
    points = points[np.argsort(points[:, 0])]
    ceilings = np.append(reference[1], points[:-1, 1])
    return float(np.sum((reference[0] - points[:, 0]) * (ceilings - points[:, 1])))


def _as_points(points: ArrayLike) -> Array:
    points = np.asarray(points, dtype=float).reshape(-1, 2)
    if not np.all(np.isfinite(points)):
        raise ValueError("points must be finite")
    return points
