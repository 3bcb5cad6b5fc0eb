"""The compiled inner loops: stochastic gradients, projected steps, many steps in one call.

Each kernel loops over runs r and touches run r's numbers only: results do not depend on which runs
share a batch. Sums may be reassociated for vector units (the only liberties of `fastmath` taken are
that and fused multiply-add), so the last bits may differ between processors, not between runs.
Arguments are as in `objectives.StochasticObjective.add_stochastic_gradient`.

Compiled code knows a kernel by the type of its data: one NamedTuple for each, which numba can cache
on disk (a kernel passed as an argument would be compiled anew in every process).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numba.extending import overload
from numpy.typing import NDArray

Array = NDArray[np.float64]


class QuadraticData(NamedTuple):
    matrix: Array
    center: Array
    noise: float


class LogisticData(NamedTuple):
    rows: Array
    shift: Array
    preference: Array


class SoftmaxData(NamedTuple):
    features: Array
    cumulative: Array
    log_base: Array


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def quadratic(
    theta, weights, column, draws, seed_index, offset, matrix, center, noise, out, losses
):
    """g = H (theta - c) + noise z, loss = (theta - c)'H(theta - c)/2 + noise z . (theta - c)."""
    runs, dim = theta.shape
    for r in range(runs):
        weight = weights[r, column]
        if weight == 0.0:
            losses[r, column] = np.nan
            continue
        z = draws[seed_index[r], offset]
        loss = 0.0
        for i in range(dim):
            slope = 0.0
            for j in range(dim):
                slope += matrix[i, j] * (theta[r, j] - center[j])
            loss += (0.5 * slope + noise * z[i]) * (theta[r, i] - center[i])
            out[r, i] += weight * (slope + noise * z[i])
        losses[r, column] = loss


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def logistic(
    theta, weights, column, draws, seed_index, offset, rows, shift, preference, out, losses
):
    """Pair i = floor(n u_0), label +1 if u_1 < p_i else -1, loss = softplus(-label s_i)."""
    runs, dim = theta.shape
    pairs = rows.shape[0]
    for r in range(runs):
        weight = weights[r, column]
        if weight == 0.0:
            losses[r, column] = np.nan
            continue
        u = draws[seed_index[r], offset]
        i = int(u[0] * pairs)
        margin = -shift[i]
        for j in range(dim):
            margin += rows[i, j] * theta[r, j]
        label = 1.0 if u[1] < preference[i] else -1.0
        wrong = -label * margin
        tail = math.exp(-abs(wrong))
        losses[r, column] = max(wrong, 0.0) + math.log1p(tail)
        error = (1.0 if wrong >= 0.0 else tail) / (1.0 + tail)  # sigmoid(wrong)
        scale = -weight * label * error
        for j in range(dim):
            out[r, j] += scale * rows[i, j]


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def softmax(
    theta, weights, column, draws, seed_index, offset, features, cumulative, log_base, out, losses
):
    """Prompt x = floor(n u_0), response y from q(.|x) by inversion of u_1, loss = -log pi(y|x)."""
    runs, dim = theta.shape
    prompts, responses = cumulative.shape
    policy = np.empty(responses)
    for r in range(runs):
        weight = weights[r, column]
        if weight == 0.0:
            losses[r, column] = np.nan
            continue
        u = draws[seed_index[r], offset]
        x = int(u[0] * prompts)
        y = 0
        while y < responses - 1 and u[1] >= cumulative[x, y]:
            y += 1
        peak = -np.inf
        for k in range(responses):
            logit = 0.0
            for j in range(dim):
                logit += features[x, k, j] * theta[r, j]
            policy[k] = logit + log_base[x, k]
            peak = max(peak, policy[k])
        total = 0.0
        chosen_logit = policy[y]
        for k in range(responses):
            policy[k] = math.exp(policy[k] - peak)
            total += policy[k]
        losses[r, column] = peak + math.log(total) - chosen_logit
        for k in range(responses):
            scale = weight * (policy[k] / total - (1.0 if k == y else 0.0))
            for j in range(dim):
                out[r, j] += scale * features[x, k, j]


KERNELS = {QuadraticData: quadratic, LogisticData: logistic, SoftmaxData: softmax}
"""The kernels that the compiled loops below know, by the type of their data."""


def add_gradients(theta, weights, column, draws, seed_index, offset, data, out, losses):
    """The kernel that belongs to `data`; only to be called from compiled code."""
    raise NotImplementedError


@overload(add_gradients)
def _add_gradients(theta, weights, column, draws, seed_index, offset, data, out, losses):
    kernel = KERNELS[data.instance_class]

    def call(theta, weights, column, draws, seed_index, offset, data, out, losses):
        first, second, third = data  # a NamedTuple cannot be starred here
        kernel(theta, weights, column, draws, seed_index, offset, first, second, third, out, losses)

    return call


@njit(cache=True, nogil=True)
def sample(data, theta, weights, draws, seed_index, offset, out, losses):
    """Gradients and losses of both objectives; `data` and `draws` hold one entry for each."""
    add_gradients(theta, weights, 0, draws[0], seed_index, offset, data[0], out, losses)
    add_gradients(theta, weights, 1, draws[1], seed_index, offset, data[1], out, losses)


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def projected_step(theta, gradient, weights, local_step, alpha, radius, sums, alpha_sum, counts):
    """Add theta_t to the averages, then theta <- P(theta - alpha gradient); clear the gradient.

    P projects onto the ball of radius `radius`. `sums` holds sum theta_t and sum alpha_t theta_t;
    they start anew where `local_step` (runs,), the step within the stage, is 0. `counts` (runs, 2)
    counts gradients per objective.
    """
    runs, dim = theta.shape
    uniform_sum, weighted_sum = sums
    for r in range(runs):
        if local_step[r] == 0:
            alpha_sum[r] = 0.0
            uniform_sum[r] = 0.0
            weighted_sum[r] = 0.0
        alpha_sum[r] += alpha[r]
        norm = 0.0
        for j in range(dim):
            uniform_sum[r, j] += theta[r, j]
            weighted_sum[r, j] += alpha[r] * theta[r, j]
            theta[r, j] -= alpha[r] * gradient[r, j]
            gradient[r, j] = 0.0
            norm += theta[r, j] * theta[r, j]
        if norm > radius * radius:
            shrink = radius / math.sqrt(norm)
            for j in range(dim):
                theta[r, j] *= shrink
        for i in range(2):
            if weights[r, i] != 0.0:
                counts[r, i] += 1


@njit(cache=True, nogil=True)
def descend(
    data, theta, weights, draws, seed_index, offset, gradient, losses,
    local_step, alpha, radius, sums, alpha_sum, counts,
):  # fmt: skip
    """One step of projected SGD per entry of `weights`, `local_step` and `alpha` (steps, ...)."""
    for s in range(len(weights)):
        sample(data, theta, weights[s], draws, seed_index, offset + s, gradient, losses)
        projected_step(
            theta, gradient, weights[s], local_step[s], alpha[s], radius, sums, alpha_sum, counts
        )


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def tangent_bounds(theta, anchors, values, slopes, smoothness, low, high):
    """low = f(a) + <grad f(a), theta - a>, high = low + L |theta - a|^2 / 2, both (runs, 2)."""
    runs, dim = theta.shape
    for r in range(runs):
        for i in range(2):
            rise, squared = 0.0, 0.0
            for j in range(dim):
                shift = theta[r, j] - anchors[r, i, j]
                rise += slopes[r, i, j] * shift
                squared += shift * shift
            low[r, i] = values[r, i] + rise
            high[r, i] = low[r, i] + 0.5 * smoothness[i] * squared
