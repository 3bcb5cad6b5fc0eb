"""Where a value-comparing scheduler (MAXRIGHT) gets its losses from, and what that costs.

exact   both full objectives; between probes, the full value of the stepped objective
lazy    decisions as exact, from full values only where certified bounds leave them open
fresh   a minibatch of its own; between probes, the loss of the stepped minibatch
same    the minibatch that the step would use; between probes likewise

The guarantees differ: exact values give the subgradient method on f_Max, fresh values a bias of up
to sigma/2 that does not vanish, the same minibatch a biased objective E max(h_1^, h_2^).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from theory.randomness import Stream
from theory.tasks import Task

if TYPE_CHECKING:
    from theory.simulate import Loop

Array = NDArray[np.float64]

SAMPLE_STREAMS = {Task.DPO: Stream.DPO_SAMPLE, Task.SFT: Stream.SFT_SAMPLE}
PROBE_STREAMS = {Task.DPO: Stream.DPO_PROBE, Task.SFT: Stream.SFT_PROBE}


class ValueSource(Protocol):
    """Supplies losses of shape (runs, 2) to the scheduler; counts evaluations in `loop.probes`."""

    def probe(self, loop: Loop) -> Array:
        """Both losses at the current parameters."""
        ...

    def observed(self, loop: Loop, weights: Array) -> Array:
        """Losses of the objectives stepped on (weight not 0), NaN elsewhere; before the step."""
        ...


class Exact:
    """Full evaluation."""

    def probe(self, loop: Loop) -> Array:
        loop.probes += 1
        return loop.problem.losses(loop.theta)

    def observed(self, loop: Loop, weights: Array) -> Array:
        stepped = weights != 0.0
        losses = np.full(weights.shape, np.nan)
        for task, objective in enumerate(loop.problem.objectives):
            chosen = stepped[:, task]
            losses[chosen, task] = objective.value(loop.theta[chosen])
        loop.probes += stepped
        return losses


class Fresh:
    """Probes on minibatches that nothing trains on."""

    def probe(self, loop: Loop) -> Array:
        loop.probes += 1
        return loop.sample_losses(PROBE_STREAMS)

    def observed(self, loop: Loop, weights: Array) -> Array:
        return loop.losses


class Same(Fresh):
    """Probes on the minibatches that the step will use."""

    def probe(self, loop: Loop) -> Array:
        loop.probes += 1
        return loop.sample_losses(SAMPLE_STREAMS)


class Lazy:
    """Exact decisions from few evaluations: bounds decide, full values only where they cannot.

    From an anchor a with f(a) and g = grad f(a) known, convexity and L-smoothness give

        f(a) + <g, d>  <=  f(a + d)  <=  f(a) + <g, d> + L |d|^2 / 2.

    A run whose scheduler takes the same step at both extreme corners of these intervals would take
    it at the exact values too (its choice is monotone in the losses). Only the other runs are
    evaluated in full, and anchored anew. Each anchoring counts as one probe of both objectives; it
    costs a value and a gradient.
    """

    def __init__(self) -> None:
        self.anchor = np.empty((0, 0))

    def probe(self, loop: Loop) -> Array:
        if not self.anchor.size:
            self._start(loop)
        low, high = self._bounds(loop)
        undecided = self._undecided(loop, low, high)
        if undecided.any():
            self._anchor(loop, undecided)
            low[undecided] = high[undecided] = self.values[undecided]
        return 0.5 * (low + high)

    def observed(self, loop: Loop, weights: Array) -> Array:
        low, high = self._bounds(loop)
        return np.where(weights != 0.0, 0.5 * (low + high), np.nan)

    def _start(self, loop: Loop) -> None:
        runs, dim = loop.theta.shape
        self.anchor = np.zeros((runs, dim))
        self.values = np.zeros((runs, 2))
        self.slopes = np.zeros((runs, 2, dim))
        self.smoothness = np.array(
            [f.constants(loop.problem.radius).smoothness for f in loop.problem.objectives]
        )
        self._anchor(loop, np.ones(runs, dtype=bool))

    def _bounds(self, loop: Loop) -> tuple[Array, Array]:
        shift = loop.theta - self.anchor
        low = self.values + np.einsum("rid,rd->ri", self.slopes, shift)
        squared = np.einsum("rd,rd->r", shift, shift)
        return low, low + 0.5 * squared[:, None] * self.smoothness

    def _undecided(self, loop: Loop, low: Array, high: Array) -> NDArray[np.bool_]:
        corners = (np.stack([low[:, 0], high[:, 1]], -1), np.stack([high[:, 0], low[:, 1]], -1))
        first, second = (self._decision(loop, corner) for corner in corners)
        return np.any(first != second, axis=-1)

    def _decision(self, loop: Loop, losses: Array) -> Array:
        return loop.scheduler.select(loop.state, lambda: losses)[0]

    def _anchor(self, loop: Loop, runs: NDArray[np.bool_]) -> None:
        theta = loop.theta[runs]
        self.anchor[runs] = theta
        for task, objective in enumerate(loop.problem.objectives):
            self.values[runs, task], self.slopes[runs, task] = objective.value_and_gradient(theta)
        loop.probes[runs] += 1


SOURCES: dict[str, type[ValueSource]] = {
    "exact": Exact,
    "lazy": Lazy,
    "fresh": Fresh,
    "same": Same,
}
