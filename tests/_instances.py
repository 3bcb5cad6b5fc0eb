"""Random objectives of every kind, and every sample of those that have finitely many."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from theory.objectives import (
    LogisticDPO,
    Objective,
    Quadratic,
    SoftmaxSFT,
    StochasticObjective,
    WeightedSum,
)
from theory.randomness import Stream

Array = NDArray[np.float64]

SEEDS = st.integers(0, 10**6)
KINDS = ["quadratic", "logistic", "softmax", "based"]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
WITH_SUM = pytest.mark.parametrize("kind", [*KINDS, "sum"])
POLICIES = pytest.mark.parametrize("kind", KINDS[1:])


class Policy(NamedTuple):
    """Features, a label law and preference pairs at response level: both losses come from these."""

    features: Array
    """(prompts, responses, d)"""
    labels: Array
    """(prompts, responses)"""
    prompt: NDArray[np.int64]
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    preference: Array
    beta: float
    theta_ref: Array

    @property
    def phi(self) -> float:
        """Phi, the largest feature norm."""
        return float(np.linalg.norm(self.features, axis=-1).max())

    @property
    def differences(self) -> Array:
        return self.features[self.prompt, self.left] - self.features[self.prompt, self.right]

    def dpo(self) -> LogisticDPO:
        return LogisticDPO(self.differences, self.preference, self.beta, self.theta_ref)

    def sft(self) -> SoftmaxSFT:
        return SoftmaxSFT(self.features, self.labels)

    def based(self) -> SoftmaxSFT:
        """With a random log pi_0, under which the last response of the last prompt is missing."""
        base = self.features.sum(axis=-1)
        base[-1, -1] = -np.inf
        labels = np.where(base > -np.inf, self.labels, 0.0)
        return SoftmaxSFT(self.features, labels / labels.sum(axis=1, keepdims=True), base)


def random_policy(seed: int) -> Policy:
    rng = np.random.default_rng(seed)
    prompts, responses = rng.integers(1, 5), rng.integers(2, 6)
    dim, pairs = rng.integers(1, 5), rng.integers(1, 8)
    left = rng.integers(responses, size=pairs)
    return Policy(
        features=rng.standard_normal((prompts, responses, dim)),
        labels=rng.dirichlet(np.ones(responses), size=prompts),
        prompt=rng.integers(prompts, size=pairs),
        left=left,
        right=(left + rng.integers(1, responses, size=pairs)) % responses,
        preference=rng.uniform(0.02, 0.98, size=pairs),
        beta=float(rng.uniform(0.1, 2.0)),
        theta_ref=rng.standard_normal(dim),
    )


def random_quadratic(seed: int) -> Quadratic:
    rng = np.random.default_rng(seed)
    dim = int(rng.integers(1, 6))
    root = rng.standard_normal((dim, dim))
    return Quadratic(root @ root.T + 0.1 * np.eye(dim), rng.standard_normal(dim), 0.7)


def random_objective(kind: str, seed: int) -> StochasticObjective:
    if kind == "quadratic":
        return random_quadratic(seed)
    policy = random_policy(seed)
    return {"logistic": policy.dpo, "softmax": policy.sft, "based": policy.based}[kind]()


def random_function(kind: str, seed: int) -> Objective:
    """Of `KINDS`, or the weighted sum of both losses of a policy."""
    if kind != "sum":
        return random_objective(kind, seed)
    policy = random_policy(seed)
    return WeightedSum((policy.dpo(), policy.sft()), (0.3, 0.7))


def random_theta(seed: int, dim: int) -> Array:
    return np.random.default_rng([seed, 1]).standard_normal(dim)


def all_samples(objective: StochasticObjective) -> tuple[Array, Array]:
    """Draws that visit every possible sample once, and the probability of each: (n, 2) and (n,).

    u_0 is the midpoint of the index's cell [i/n, (i+1)/n), u_1 the midpoint of the label's cell.
    """
    if isinstance(objective, LogisticDPO):
        cells = np.stack([objective.preference, 1.0 - objective.preference], axis=1)
    else:
        assert isinstance(objective, SoftmaxSFT)
        cells = objective.labels
    count, labels = cells.shape
    index = np.repeat((np.arange(count) + 0.5) / count, labels)
    middle = np.cumsum(cells, axis=1) - cells / 2
    occurs = cells.ravel() > 0.0
    return np.stack([index, middle.ravel()], axis=1)[occurs], cells.ravel()[occurs] / count


def random_draws(objective: StochasticObjective, seed: int, count: int) -> Array:
    """`count` draws of the kind the objective takes: (count, width)."""
    return objective.draws((seed,), Stream.DPO_SAMPLE, 0)[0, :count]
