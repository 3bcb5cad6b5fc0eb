"""One run as one would write it down: the baseline of `theory.benchmark`, and a second opinion.

A plain NumPy loop over the steps of a single run on the softmax problem, with the samples that
`theory.simulate` takes.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from theory.objectives import LogisticDPO, SoftmaxSFT
from theory.optima import problem_optima
from theory.problems import Problem, make_problem
from theory.randomness import BLOCK, Stream, uniforms
from theory.tasks import Task

Array = NDArray[np.float64]

PROBLEM = make_problem("softmax")


def plain_run(algorithm: str, lam: float, seed: int, num_steps: int) -> dict[str, Array]:
    """One run as a plain NumPy loop: the last iterate and both averages, each (d,)."""
    problem = PROBLEM
    weights, optimum = np.array([lam, 1.0 - lam]), np.array(problem_optima(problem).values)
    half, start = num_steps // 2, 0
    theta = problem.start.copy()
    uniform_sum, weighted_sum, alpha_sum = np.zeros_like(theta), np.zeros_like(theta), 0.0
    for step in range(num_steps):
        block, offset = divmod(step, BLOCK)
        if offset == 0:
            coins = uniforms((seed,), Stream.DECISION, block)[0, :, 0]
            pairs = uniforms((seed,), Stream.DPO_SAMPLE, block, 2)[0]
            demonstrations = uniforms((seed,), Stream.SFT_SAMPLE, block, 2)[0]
        if algorithm == "mix":
            w = weights
        elif algorithm == "alright":
            w = np.array([1.0, 0.0]) if coins[offset] < lam else np.array([0.0, 1.0])
        elif algorithm == "maxright":
            heights = weights * (problem.losses(theta) - optimum)
            w = np.array([1.0, 0.0]) if heights[0] >= heights[1] else np.array([0.0, 1.0])
        else:
            w = np.array([1.0, 0.0]) if step < half else np.array([0.0, 1.0])
            if step == half:
                start, uniform_sum, weighted_sum, alpha_sum = step, 0.0 * theta, 0.0 * theta, 0.0
        gradient = np.zeros_like(theta)
        if w[Task.DPO]:
            gradient += w[Task.DPO] * _dpo_gradient(problem, theta, pairs[offset])
        if w[Task.SFT]:
            gradient += w[Task.SFT] * _sft_gradient(problem, theta, demonstrations[offset])
        alpha = problem.step_scale / math.sqrt(step - start + 1)
        uniform_sum += theta
        weighted_sum += alpha * theta
        alpha_sum += alpha
        theta = theta - alpha * gradient
        norm = np.linalg.norm(theta)
        if norm > problem.radius:
            theta = theta * (problem.radius / norm)
    count = num_steps - start
    return {"last": theta, "uniform": uniform_sum / count, "weighted": weighted_sum / alpha_sum}


def _dpo_gradient(problem: Problem, theta: Array, u: Array) -> Array:
    objective = problem.objectives[Task.DPO]
    assert isinstance(objective, LogisticDPO)
    i = int(u[0] * len(objective.differences))
    difference = objective.beta * objective.differences[i]
    label = 1.0 if u[1] < objective.preference[i] else -1.0
    margin = difference @ (theta - objective.theta_ref)
    return -label / (1.0 + math.exp(label * margin)) * difference


def _sft_gradient(problem: Problem, theta: Array, u: Array) -> Array:
    objective = problem.objectives[Task.SFT]
    assert isinstance(objective, SoftmaxSFT)
    x = int(u[0] * len(objective.features))
    features = objective.features[x]
    y = min(int(np.searchsorted(np.cumsum(objective.labels[x]), u[1], "right")), len(features) - 1)
    logits = features @ theta
    policy = np.exp(logits - logits.max())
    policy /= policy.sum()
    policy[y] -= 1.0
    return policy @ features
