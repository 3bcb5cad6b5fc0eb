"""Where a scheduler gets its losses and its Gram matrices from, and what that costs.

exact   both full objectives; between probes, the full value of the stepped objective
lazy    decisions as exact, from full values only where certified bounds leave them open
fresh   a minibatch of its own; between probes, the loss of the stepped minibatch
same    the minibatch that the step would use; between probes likewise

The Gram matrix is that of the full gradients (exact) or of the minibatch's mean gradients (fresh,
same); lazy has none.

The guarantees differ: exact values give the subgradient method on f_Max, fresh values a bias of up
to sigma/2 that does not vanish, the same minibatch a biased objective E max(h_1^, h_2^).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from theory.kernels import tangent_bounds
from theory.problems import Problem
from theory.randomness import Stream
from theory.scheduling import Answers, Scheduler, ScheduleState
from theory.tasks import Task

Array = NDArray[np.float64]

SAMPLE_STREAMS = {Task.DPO: Stream.DPO_SAMPLE, Task.SFT: Stream.SFT_SAMPLE}
NOT_LAZY = "values='lazy' is for schedulers that probe at every step and forget: use 'exact'"
PROBE_STREAMS = {Task.DPO: Stream.DPO_PROBE, Task.SFT: Stream.SFT_PROBE}


class Loop(Protocol):
    """The running batch, as far as a source needs it."""

    problem: Problem
    scheduler: Scheduler
    state: ScheduleState
    theta: Array
    """The current parameters (runs, d)."""
    losses: Array
    """Of the minibatches that the last step took, (runs, 2)."""
    probes: NDArray[np.int64]
    """Evaluations so far of each objective, (runs, 2)."""

    def sample_losses(self, streams: Mapping[Task, Stream]) -> Array: ...

    def sample_gradients(self, streams: Mapping[Task, Stream]) -> Array: ...


class ValueSource(Protocol):
    """Supplies losses of shape (runs, 2) to the scheduler; counts evaluations in `loop.probes`."""

    def probe(self, loop: Loop) -> Array:
        """Both losses at the current parameters."""
        ...

    def gram(self, loop: Loop) -> Array:
        """|g_DPO|^2, <g_DPO, g_SFT>, |g_SFT|^2 at the current parameters, (runs, 3)."""
        ...

    def observed(self, loop: Loop, weights: Array) -> Array:
        """Losses of the objectives stepped on (weight not 0), NaN elsewhere; before the step."""
        ...


def gram_matrix(gradients: Array) -> Array:
    """The three entries of the Gram matrix of two gradients: (2, ..., d) -> (..., 3)."""
    dpo, sft = gradients
    return np.stack([np.sum(a * b, axis=-1) for a, b in ((dpo, dpo), (dpo, sft), (sft, sft))], -1)


class Exact:
    """Full evaluation."""

    def probe(self, loop: Loop) -> Array:
        loop.probes += 1
        return loop.problem.losses(loop.theta)

    def gram(self, loop: Loop) -> Array:
        loop.probes += 1
        return gram_matrix(np.stack([f.gradient(loop.theta) for f in loop.problem.objectives]))

    def observed(self, loop: Loop, weights: Array) -> Array:
        stepped = weights != 0.0
        losses = np.full(weights.shape, np.nan)
        for task, objective in enumerate(loop.problem.objectives):
            chosen = stepped[:, task]
            if chosen.any():
                losses[chosen, task] = objective.value(loop.theta[chosen])
        loop.probes += stepped
        return losses


class Fresh:
    """Probes on minibatches that nothing trains on."""

    def probe(self, loop: Loop) -> Array:
        loop.probes += 1
        return loop.sample_losses(PROBE_STREAMS)

    def gram(self, loop: Loop) -> Array:
        loop.probes += 1
        return gram_matrix(loop.sample_gradients(PROBE_STREAMS))

    def observed(self, loop: Loop, weights: Array) -> Array:
        return loop.losses


class Same(Fresh):
    """Probes on the minibatches that the step will use; their gradients are those of the step."""

    def probe(self, loop: Loop) -> Array:
        loop.probes += 1
        return loop.sample_losses(SAMPLE_STREAMS)

    def gram(self, loop: Loop) -> Array:
        return gram_matrix(loop.sample_gradients(SAMPLE_STREAMS))


class Lazy:
    """Exact decisions from few evaluations: bounds decide, full values only where they cannot.

    From an anchor a with f(a) and g = grad f(a) known, convexity and L-smoothness give

        f(a) + <g, d>  <=  f(a + d)  <=  f(a) + <g, d> + L |d|^2 / 2.

    A run whose scheduler takes the same step at both extreme corners of these intervals would take
    it at the exact values too (its choice is monotone in the losses). Where the corners differ, the
    objective with the larger L is evaluated in full and anchored anew, then, if need be, the
    other. An anchoring counts as one probe of its objective; it costs a value and a gradient. Only
    for schedulers that forget values: the values reported are mid-points of intervals, good for the
    decision at hand and for no other.
    """

    def __init__(self) -> None:
        self.anchors = np.empty((0, 0, 2))

    def probe(self, loop: Loop) -> Array:
        if not loop.scheduler.forgets_values:
            raise ValueError(NOT_LAZY)
        if not self.anchors.size:
            self._start(loop)
        low, high = np.empty_like(self.values), np.empty_like(self.values)
        tangent_bounds(
            loop.theta, self.anchors, self.values, self.slopes, self.smoothness, low, high
        )
        for task in np.argsort(-self.smoothness).tolist():
            runs = np.flatnonzero(self._undecided(loop, low, high))
            if not runs.size:
                break
            self._anchor(loop, task, runs)
            low[runs, task] = high[runs, task] = self.values[runs, task]
        return 0.5 * (low + high)

    def gram(self, loop: Loop) -> Array:
        name = type(loop.scheduler).__name__
        raise ValueError(f"values='lazy' gives no gradients: {name} must set reads_gram = True")

    def observed(self, loop: Loop, weights: Array) -> Array:
        raise TypeError("lazy values cannot be remembered")

    def _start(self, loop: Loop) -> None:
        runs, dim = loop.theta.shape
        self.anchors = np.zeros((runs, 2, dim))
        self.values = np.zeros((runs, 2))
        self.slopes = np.zeros((runs, 2, dim))
        self.smoothness = np.array(
            [f.constants(loop.problem.radius).smoothness for f in loop.problem.objectives]
        )
        for task in Task:
            self._anchor(loop, task, np.arange(runs))

    def _undecided(self, loop: Loop, low: Array, high: Array) -> NDArray[np.bool_]:
        corners = np.stack([low, high])
        corners[:, :, Task.SFT] = corners[::-1, :, Task.SFT]
        weights, _ = loop.scheduler.select(
            loop.state, Answers(lambda: corners, lambda: self.gram(loop))
        )
        return np.any(weights[0] != weights[1], axis=-1)

    def _anchor(self, loop: Loop, task: int, runs: NDArray[np.intp]) -> None:
        theta = loop.theta[runs]
        self.anchors[runs, task] = theta
        objective = loop.problem.objectives[task]
        self.values[runs, task], self.slopes[runs, task] = objective.value_and_gradient(theta)
        loop.probes[runs, task] += 1


SOURCES: dict[str, type[ValueSource]] = {
    "exact": Exact,
    "lazy": Lazy,
    "fresh": Fresh,
    "same": Same,
}
