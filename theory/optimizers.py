"""What turns a gradient into a step, beyond plain SGD: momentum, Adam, clipping.

A rule rewrites the stochastic gradients of all runs in place. Its memory is cleared for a run
that enters a new stage of a sequential schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from theory import checks

Array = NDArray[np.float64]
Memory = dict[str, Array]


class Rule(Protocol):
    def init(self, runs: int, dim: int) -> Memory:
        """Fresh memory: arrays whose first axis is runs."""
        ...

    def apply(self, gradient: Array, memory: Memory, local_step: NDArray[np.int64]) -> None:
        """Replace `gradient` (runs, d) by the direction; `local_step` counts from 0 per stage."""
        ...


@dataclass(frozen=True)
class Momentum:
    """Heavy ball with the gradient's scale kept: v <- m v + (1 - m) g; step along v."""

    momentum: float = 0.9

    def __post_init__(self) -> None:
        checks.fraction("momentum", self.momentum)

    def init(self, runs: int, dim: int) -> Memory:
        return {"velocity": np.zeros((runs, dim))}

    def apply(self, gradient: Array, memory: Memory, local_step: NDArray[np.int64]) -> None:
        memory["velocity"] += (1.0 - self.momentum) * (gradient - memory["velocity"])
        gradient[:] = memory["velocity"]


@dataclass(frozen=True)
class Adam:
    """Adam with bias correction (arXiv 1412.6980, algorithm 1)."""

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        checks.fraction("beta1", self.beta1)
        checks.fraction("beta2", self.beta2)
        checks.number("epsilon", self.epsilon)

    def init(self, runs: int, dim: int) -> Memory:
        return {"first": np.zeros((runs, dim)), "second": np.zeros((runs, dim))}

    def apply(self, gradient: Array, memory: Memory, local_step: NDArray[np.int64]) -> None:
        first, second = memory["first"], memory["second"]
        first += (1.0 - self.beta1) * (gradient - first)
        second += (1.0 - self.beta2) * (gradient**2 - second)
        t = (local_step + 1.0)[:, None]
        scale = np.sqrt(second / (1.0 - self.beta2**t)) + self.epsilon
        gradient[:] = first / (1.0 - self.beta1**t) / scale


@dataclass(frozen=True)
class Clip:
    """Scale a run's gradient down to norm `max_norm`, as trainers do, then apply `rule`.

    Under a schedule that steps on one objective at a time this clips each objective by itself and
    so changes the weights between them.
    """

    max_norm: float
    rule: Rule | None = None

    def __post_init__(self) -> None:
        checks.number("max_norm", self.max_norm)

    def init(self, runs: int, dim: int) -> Memory:
        return {} if self.rule is None else self.rule.init(runs, dim)

    def apply(self, gradient: Array, memory: Memory, local_step: NDArray[np.int64]) -> None:
        norms = np.linalg.norm(gradient, axis=1, keepdims=True)
        gradient *= np.minimum(1.0, self.max_norm / np.maximum(norms, 1e-300))
        if self.rule is not None:
            self.rule.apply(gradient, memory, local_step)
