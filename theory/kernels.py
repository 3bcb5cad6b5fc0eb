"""The compiled inner loops: one stochastic gradient per run, one projected step per run.

Each kernel loops over runs r and touches run r's numbers only: results do not depend on which runs
share a batch. Sums may be reassociated for vector units (the only liberties of `fastmath` taken are
that and fused multiply-add), so the last bits may differ between processors, not between runs.
Arguments are as in `objectives.StochasticObjective.add_stochastic_gradient`.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit


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
def softmax(theta, weights, column, draws, seed_index, offset, features, cumulative, out, losses):
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
            policy[k] = logit
            peak = max(peak, logit)
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


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def projected_step(theta, gradient, weights, alpha, radius, uniform_sum, weighted_sum, counts):
    """Add theta_t to the averages, then theta <- P(theta - alpha gradient); clear the gradient.

    P projects onto the ball of radius `radius`. `counts` (runs, 2) counts gradients per objective.
    """
    runs, dim = theta.shape
    for r in range(runs):
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
