"""What holds to leading order: equalities where `theory.theorems.bounds` has inequalities.

Notation as in `bounds`. These are the sharpest predictions that a simulation can be held to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import norm as gaussian_law

from theory.objectives import WeightedSum
from theory.optima import ProblemOptima, minimise
from theory.schedulers import objective_weights

Array = NDArray[np.float64]


def mix_covariance(lam: float, covariances: tuple[Array, Array]) -> Array:
    """V_Mix = lam^2 S_1 + (1 - lam)^2 S_2 for independent samples; S_i (d, d) is Cov g_i."""
    return lam**2 * covariances[0] + (1.0 - lam) ** 2 * covariances[1]


def alright_covariance(lam: float, covariances: tuple[Array, Array], difference: Array) -> Array:
    """V_ALR = lam S_1 + (1 - lam) S_2 + lam (1 - lam) dg dg', dg = grad f_1 - grad f_2 (d,).

    The law of total covariance over the draw. V_ALR - V_Mix is positive semi-definite: ALRIGHT
    pays for its cheaper step, and for conflict, in noise.
    """
    between = lam * (1.0 - lam) * np.outer(difference, difference)
    return lam * covariances[0] + (1.0 - lam) * covariances[1] + between


def last_iterate_gap(alpha: float, covariance: Array) -> float:
    """alpha tr(V) / 4: E G_Mix of the last iterate at constant alpha, t -> infinity, alpha -> 0."""
    return alpha * float(np.trace(covariance)) / 4.0


def stationary_gap(
    alpha: float, hessians: Sequence[Array], probabilities: Sequence[float], covariance: Array
) -> float:
    """E G_Mix of the last iterate as t -> infinity, exact in alpha on a quadratic pair.

    Each step contracts by I - alpha H_i with probability p_i: ([H], [1]) is Mix, ([H_1, H_2],
    [lam, 1 - lam]) is ALRIGHT. V is the covariance of the step's gradient at theta_lam.
    Proof: the mean error vanishes, so that the covariance C of theta - theta_lam solves
    C = sum_i p_i (I - alpha H_i) C (I - alpha H_i) + alpha^2 V, and G_Mix = tr(H C) / 2. The trace
    of the equation gives 2 tr(H C) = alpha tr V + O(alpha^2): `last_iterate_gap`. For Mix,
    G_Mix = (alpha / 2) tr((2I - alpha H)^-1 V). ValueError if alpha is too large to settle.
    """
    dim = len(covariance)
    steps = [np.eye(dim) - alpha * h for h in hessians]
    contraction = np.sum([p * np.kron(a, a) for p, a in zip(probabilities, steps, strict=True)], 0)
    if np.max(np.abs(np.linalg.eigvals(contraction))) >= 1.0:
        raise ValueError(f"the iteration is unstable at alpha = {alpha}")
    flat = np.linalg.solve(np.eye(dim * dim) - contraction, alpha**2 * covariance.ravel())
    hessian = np.sum([p * h for p, h in zip(probabilities, hessians, strict=True)], axis=0)
    return float(np.sum(hessian * flat.reshape(dim, dim)) / 2.0)


def uniform_average_gap(hessian: Array, covariance: Array, num_steps: int) -> float:
    """tr(H^-1 V) / (2T): E G_Mix of the uniform average, T large, whatever constant alpha.

    Exact to leading order on a quadratic: adding up the steps, H (average - theta_lam) =
    (theta_1 - theta_{T+1}) / (alpha T) - mean noise, and the first term is O(1 / (alpha T)).
    The same for alpha = c / sqrt t. Elsewhere the mean is off by O(alpha): in 1-D, alpha = c /
    sqrt t adds f'''^2 V^2 c^2 / (8 H^3 T), of the same order in T (Polyak and Juditsky 1992 ask
    for steps that decay faster than 1 / sqrt t).
    """
    return float(np.trace(np.linalg.solve(hessian, covariance))) / (2.0 * num_steps)


class SelectionLimit(NamedTuple):
    """Where MAXRIGHT with scaled steps settles as alpha -> 0."""

    theta: Array
    rho: float
    """The share of DPO steps: theta minimises rho h_1 + (1 - rho) h_2."""
    gap: float
    """G_Max(theta)."""


def selection_limit(
    optima: ProblemOptima, lam: float, offset: Callable[[float, Array], float]
) -> SelectionLimit:
    """The limit point of MAXRIGHT with imperfect values: h_1 - h_2 = offset(rho, theta).

    Fresh Gaussian values (T3): DPO is chosen with probability Phi((h_1 - h_2) / sigma), so the mean
    step vanishes where rho w_1 grad f_1 + (1 - rho) w_2 grad f_2 = 0 with rho that probability:
    offset = sigma(theta) Phi^-1(rho), see `noisy_choice_gap`. (For constant sigma this is SGD on
    the convex E max(h_1 + e, h_2).) Wrong f_i* (T6): offset = w_1 e_1 - w_2 e_2.
    Found by bisection on rho: h_1 - h_2 at the minimiser of rho h_1 + (1 - rho) h_2 falls in rho,
    so the root is unique wherever the offset does not fall.
    """
    problem, weights = optima.problem, objective_weights(lam)

    def point(rho: float) -> tuple[Array, Array]:
        dual_weights = np.array([rho, 1.0 - rho]) * weights
        theta = minimise(WeightedSum(problem.objectives, list(dual_weights)), problem.radius).theta
        return theta, weights * (problem.losses(theta) - np.array(optima.values))

    def excess(rho: float) -> float:
        theta, heights = point(rho)
        return float(heights[0] - heights[1]) - offset(rho, theta)

    low, high = 1e-9, 1.0 - 1e-9
    if excess(low) <= 0.0:
        rho = low
    elif excess(high) >= 0.0:
        rho = high
    else:
        rho = float(brentq(excess, low, high, xtol=1e-13))
    theta, heights = point(rho)
    return SelectionLimit(theta, rho, float(heights.max()) - optima.max(lam).value)


def noisy_choice_gap(sigma: float, rho: float) -> float:
    """(1 - rho) sigma Phi^-1(rho), for rho >= 1/2 (else rho and 1 - rho swap): T3 as an equality.

    G_Max at the limit of MAXRIGHT with fresh Gaussian values of spread sigma, to leading order in
    sigma, rho being the multiplier of h_1 at the minimiser of f_Max; at every sigma an upper
    bound, if rho is the share of DPO steps in that limit (`selection_limit`).
    Proof: let d(rho) = min_theta rho h_1 + (1 - rho) h_2, so that max d = min f_Max. In the limit
    h_1 - h_2 = sigma Phi^-1(rho) >= 0, and f_Max = h_1 = d(rho) + (1 - rho)(h_1 - h_2). So G_Max is
    the formula less max d - d(rho), which is O(sigma^2). No bias at rho = 1/2; the largest,
    0.17 sigma of `fresh_bias`, at rho = Phi(0.7518) = 0.774: T3 is sharp.
    """
    high = max(rho, 1.0 - rho)
    return (1.0 - high) * sigma * float(gaussian_law.ppf(high))
