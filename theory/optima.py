"""Certified optima on the ball: f_DPO*, f_SFT*, min f_Mix and min f_Max.

Certificate (Frank-Wolfe gap, Jaggi 2013): for convex f on the ball of radius R,
f(theta) - min f <= <grad f(theta), theta> + R |grad f(theta)|, whatever found theta.
f_Max is certified by its dual: for rho in [0, 1], min f_Max >= min (rho h_1 + (1 - rho) h_2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import brentq

from theory.objectives import Objective, WeightedSum
from theory.problems import Problem
from theory.schedulers import objective_weights

Array = NDArray[np.float64]

TOLERANCE = 1e-8
"""Every reported optimum is certified to this gap, or `OptimumError` is raised."""


class OptimumError(RuntimeError):
    """No point with a certified gap below the tolerance was found."""


@dataclass(frozen=True, eq=False)
class Optimum:
    """A point of the ball whose value is within `certificate` of the minimum."""

    theta: Array
    value: float
    certificate: float
    interior: bool
    """True if the minimiser lies strictly inside the ball."""


def frank_wolfe_gap(objective: Objective, theta: Array, radius: float) -> float:
    """<grad f, theta> + R |grad f|: an upper bound of f(theta) - min f over the ball."""
    gradient = objective.gradient(theta)
    return float(gradient @ theta + radius * np.linalg.norm(gradient))


def minimise(objective: Objective, radius: float) -> Optimum:
    """Minimise a smooth convex function over the ball, with a certificate <= 1e-8.

    Newton's method; if the free minimiser lies outside, the multiplier nu of |theta| <= R is found
    by bisection on min f + nu |theta|^2 / 2.

    Raises:
        OptimumError: if no point with a certified gap of 1e-8 was found.
    """
    theta = _newton(objective, np.zeros(objective.dim), 0.0)
    interior = bool(np.linalg.norm(theta) < radius)
    if not interior:
        theta = _boundary_minimiser(objective, radius)
    certificate = frank_wolfe_gap(objective, theta, radius)
    if not certificate <= TOLERANCE:
        raise OptimumError(f"certified gap {certificate:.1e} exceeds {TOLERANCE:.0e}")
    return Optimum(theta, float(objective.value(theta)), max(certificate, 0.0), interior)


@dataclass(frozen=True, eq=False)
class ProblemOptima:
    """All certified optima of a problem; min f_Mix and min f_Max are found on demand."""

    problem: Problem

    @cached_property
    def single(self) -> tuple[Optimum, Optimum]:
        """Optima of (f_DPO, f_SFT)."""
        dpo, sft = (minimise(f, self.problem.radius) for f in self.problem.objectives)
        return dpo, sft

    @property
    def values(self) -> tuple[float, float]:
        """(f_DPO*, f_SFT*)."""
        return self.single[0].value, self.single[1].value

    def mix(self, lam: float) -> Optimum:
        return _minimise_mix(self, float(lam))

    def max(self, lam: float) -> Optimum:
        return _minimise_max(self, float(lam))


@lru_cache(maxsize=256)
def problem_optima(problem: Problem) -> ProblemOptima:
    return ProblemOptima(problem)


@lru_cache(maxsize=4096)
def _minimise_mix(optima: ProblemOptima, lam: float) -> Optimum:
    return minimise(optima.problem.mix(lam), optima.problem.radius)


@lru_cache(maxsize=4096)
def _minimise_max(optima: ProblemOptima, lam: float) -> Optimum:
    """min over the ball of f_Max = max_i w_i (f_i - f_i*).

    The dual function d(rho) = min_theta rho h_1 + (1 - rho) h_2 is concave with derivative
    h_1 - h_2 at its minimiser; its maximiser equalises the two unless one of them dominates.
    The certificate takes the f_i* as given; their own (<= 1e-8) shift f_Max by at most that much.
    """
    problem, weights = optima.problem, objective_weights(lam)

    def solve(rho: float) -> tuple[Optimum, Array]:
        dual_weights = np.array([rho, 1.0 - rho]) * weights
        inner = minimise(WeightedSum(problem.objectives, dual_weights.tolist()), problem.radius)
        return inner, weights * (problem.losses(inner.theta) - np.array(optima.values))

    def excess(rho: float) -> float:
        heights = solve(rho)[1]
        return float(heights[0] - heights[1])

    if excess(0.0) <= 0.0:
        rho = 0.0
    elif excess(1.0) >= 0.0:
        rho = 1.0
    else:
        rho = float(brentq(excess, 0.0, 1.0, xtol=1e-15, rtol=1e-14))
    inner, heights = solve(rho)
    primal = float(heights.max())
    dual = rho * heights[0] + (1.0 - rho) * heights[1] - inner.certificate
    certificate = max(primal - float(dual), 0.0)
    if not certificate <= TOLERANCE:
        raise OptimumError(f"certified gap of f_Max {certificate:.1e} exceeds {TOLERANCE:.0e}")
    return Optimum(inner.theta, primal, certificate, inner.interior)


def _newton(objective: Objective, theta: Array, ridge: float) -> Array:
    """Minimise f + ridge |theta|^2 / 2 by damped Newton steps, to the precision of float64.

    Close to the minimum the decrease of f drowns in rounding and says nothing; from there on a
    full step is taken as long as it shrinks the gradient.
    """

    def value(point: Array) -> float:
        return float(objective.value(point) + 0.5 * ridge * point @ point)

    def slope(point: Array) -> Array:
        return objective.gradient(point) + ridge * point

    for _ in range(200):
        gradient, here = slope(theta), value(theta)
        hessian = objective.hessian(theta) + (ridge + 1e-14) * np.eye(len(theta))
        step = cho_solve(cho_factor(hessian), gradient)
        decrease = float(gradient @ step)
        if decrease <= 1e-10 * (1.0 + abs(here)):
            if np.linalg.norm(slope(theta - step)) >= np.linalg.norm(gradient):
                break
            scale = 1.0
        else:
            scale = 1.0
            while value(theta - scale * step) > here - 1e-4 * scale * decrease and scale > 1e-10:
                scale /= 2
        theta = theta - scale * step
    return theta


def _boundary_minimiser(objective: Objective, radius: float) -> Array:
    def solve(log_ridge: float) -> Array:
        return _newton(objective, np.zeros(objective.dim), float(np.exp(log_ridge)))

    def overshoot(log_ridge: float) -> float:
        return float(np.linalg.norm(solve(log_ridge)) - radius)

    least = -30.0
    if overshoot(least) > 0.0:
        least = float(brentq(overshoot, least, 30.0, xtol=1e-14, rtol=1e-14))
    theta = solve(least)
    return theta * (radius / np.linalg.norm(theta))
