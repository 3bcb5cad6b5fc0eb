"""Importance sampling of the objectives: variances, the optimal probability, gaps at equal compute.

SGD on f_Mix with noise covariance V at the interior minimiser theta* and H = Hessian f_Mix(theta*):
the uniform average of T iterates has E G_Mix ~ tr(H^-1 V) / (2 T) (Polyak and Juditsky 1992; the
bias of the start is of smaller order). With g_i a stochastic gradient of f_i at theta* and

    E_i = E |g_i|^2_{H^-1} = tr(H^-1 E g_i g_i'),     m_i = |grad f_i|^2_{H^-1},

the trace is, for w = (lam, 1 - lam) and independent samples,

    Mix                  sum_i w_i^2 (E_i - m_i)          both gradients, cost c_1 + c_2
    importance sampling  w_1^2 E_1 / p + w_2^2 E_2 / (1-p)     one gradient, p c_1 + (1-p) c_2
    ALRIGHT              the same at p = lam

because w_1 grad f_1 + w_2 grad f_2 = 0 at theta*. A compute budget C buys C / cost steps, hence

    merit = cost * tr(H^-1 V),      E G_Mix ~ merit / (2 C):   the smaller the better.

The merit of importance sampling is least at p / (1 - p) = (w_1 / w_2) sqrt(E_1 c_2 / (E_2 c_1)),
where it equals (w_1 sqrt(E_1 c_1) + w_2 sqrt(E_2 c_2))^2 (proof: write r = p / (1 - p); the merit
is a constant + w_1^2 E_1 c_2 / r + w_2^2 E_2 c_1 r, and r is found by the AM-GM inequality).

At lam = 1/2 ALRIGHT and Mix tie only without conflict: ALRIGHT's merit exceeds Mix's by
(c_1 + c_2)(m_1 + m_2) / 4, the price of the swing between two gradients that oppose each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from theory.objectives import LogisticDPO, Quadratic, SoftmaxSFT, StochasticObjective
from theory.optima import ProblemOptima
from theory.schedulers import objective_weights
from theory.tasks import Task

Array = NDArray[np.float64]


@dataclass(frozen=True)
class GradientMoments:
    """What the two stochastic gradients are like at the minimiser of f_Mix, in the metric H^-1.

    Both fields have shape (2,) over (DPO, SFT): `second` holds E_i, `mean` holds m_i <= E_i.
    """

    second: Array
    mean: Array

    def mix_trace(self, lam: float) -> float:
        """tr(H^-1 V) of Mix."""
        return float(objective_weights(lam) ** 2 @ (self.second - self.mean))

    def importance_trace(self, lam: float, probability: float) -> float:
        """tr(H^-1 V) of importance sampling with DPO drawn with `probability`."""
        if not 0.0 < probability < 1.0:
            raise ValueError(f"probability is {probability}; it must lie strictly in (0, 1)")
        drawn = objective_weights(probability)
        return float(np.sum(objective_weights(lam) ** 2 * self.second / drawn))

    def alright_trace(self, lam: float) -> float:
        return self.importance_trace(lam, lam)


def optimal_probability(
    moments: GradientMoments, lam: float, dpo_cost: float, sft_cost: float
) -> float:
    """The p that minimises cost times variance; `lam` where E_1 c_2 = E_2 c_1."""
    if not (dpo_cost > 0.0 and sft_cost > 0.0):
        raise ValueError(f"costs are {dpo_cost} and {sft_cost}; they must be positive")
    dpo = lam * math.sqrt(moments.second[Task.DPO] * sft_cost)
    sft = (1.0 - lam) * math.sqrt(moments.second[Task.SFT] * dpo_cost)
    return dpo / (dpo + sft)


def expected_cost(probability: float, dpo_cost: float, sft_cost: float) -> float:
    """Cost of a step that draws DPO with `probability`, else SFT."""
    return probability * dpo_cost + (1.0 - probability) * sft_cost


def gradient_moments(optima: ProblemOptima, lam: float, batch_size: int = 1) -> GradientMoments:
    """E_i and m_i at the minimiser of f_Mix, exactly; a minibatch divides E_i - m_i by its size.

    Raises:
        ValueError: if the minimiser lies on the boundary of the ball, where the theory is another.
    """
    optimum, problem = optima.mix(lam), optima.problem
    if not optimum.interior:
        raise ValueError(f"the minimiser of f_Mix at lam={lam:g} lies on the boundary of the ball")
    inverse = np.linalg.inv(problem.mix(lam).hessian(optimum.theta))
    second, mean = np.empty(2), np.empty(2)
    for task, objective in zip(Task, problem.objectives, strict=True):
        slope = objective.gradient(optimum.theta)
        mean[task] = slope @ inverse @ slope
        full = np.sum(inverse * second_moment(objective, optimum.theta))
        second[task] = mean[task] + (full - mean[task]) / batch_size
    return GradientMoments(second, mean)


def second_moment(objective: StochasticObjective, theta: Array) -> Array:
    """E[g g'] (d, d) of one stochastic gradient: by enumeration, for `Quadratic` in closed form."""
    if isinstance(objective, Quadratic):
        slope = objective.gradient(theta)
        return np.outer(slope, slope) + objective.noise**2 * np.eye(objective.dim)
    gradients, probabilities = enumerate_gradients(objective, theta)
    return (gradients.T * probabilities) @ gradients


def enumerate_gradients(objective: StochasticObjective, theta: Array) -> tuple[Array, Array]:
    """Every stochastic gradient that a sample can give, (n, d), and its probability, (n,).

    Written from the definitions of the losses, not with the compiled kernels.

    Raises:
        TypeError: for an objective with infinitely many samples.
    """
    if isinstance(objective, LogisticDPO):
        rows = objective.beta * objective.differences
        preferred = expit(rows @ (theta - objective.theta_ref))[:, None]
        gradients = np.concatenate([(preferred - 1.0) * rows, preferred * rows])
        labels = np.concatenate([objective.preference, 1.0 - objective.preference])
        return gradients, labels / len(rows)
    if isinstance(objective, SoftmaxSFT):
        logits = objective.features @ theta
        if objective.log_base is not None:
            logits = logits + objective.log_base
        policy = np.exp(logits - logits.max(axis=1, keepdims=True))
        policy /= policy.sum(axis=1, keepdims=True)
        expected = np.einsum("xy,xyd->xd", policy, objective.features)
        gradients = expected[:, None, :] - objective.features
        return gradients.reshape(-1, objective.dim), objective.labels.ravel() / len(policy)
    raise TypeError(f"{type(objective).__name__} has no finite set of samples")
