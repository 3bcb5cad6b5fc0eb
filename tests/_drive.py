"""A scheduler driven without a model, on losses that fall as they are stepped on."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory.scheduling import Scheduler, ScheduleState

Array = NDArray[np.float64]

DPO, SFT = [1.0, 0.0], [0.0, 1.0]


class Losses:
    """A probe that knows the losses and no gradient."""

    def __init__(self, values: Any) -> None:
        self.values = np.asarray(values, dtype=float)

    def __call__(self) -> Array:
        return self.values

    def gram(self) -> Array:
        raise AssertionError("this scheduler must not ask for gradients")


class NoProbe(Losses):
    def __init__(self) -> None:
        super().__init__(np.nan)

    def __call__(self) -> Array:
        raise AssertionError("this scheduler must not probe")


NO_PROBE = NoProbe()


class ToyLosses:
    """Losses of a training that goes well: loss_i = 1 / (1 + i-th objective's steps) + floor_i.

    Records the steps at which it is probed.
    """

    def __init__(self, runs: tuple[int, ...] = ()) -> None:
        self.floor = np.array([0.1, 0.2])
        self.counts = np.zeros((*runs, 2))
        self.probed: list[int] = []
        self.step = 0

    def values(self) -> Array:
        return 1.0 / (1.0 + self.counts) + self.floor

    def __call__(self) -> Array:
        self.probed.append(self.step)
        return self.values()

    def gram(self) -> Array:
        raise AssertionError("this scheduler must not ask for gradients")

    def take(self, weights: Array) -> Array:
        """Losses of the stepped objectives, NaN elsewhere, as the loops report them."""
        losses = np.where(weights != 0.0, self.values(), np.nan)
        self.counts += weights != 0.0
        self.step += 1
        return losses


def drive(
    scheduler: Scheduler,
    steps: int,
    losses: ToyLosses | None = None,
    state: ScheduleState | None = None,
) -> tuple[Array, ScheduleState]:
    """Weights of `steps` steps, (steps, *runs, 2), and the state they leave."""
    losses = losses or ToyLosses(scheduler.runs)
    state = scheduler.init() if state is None else state
    decisions = []
    for _ in range(steps):
        weights, state = scheduler.select(state, losses)
        state = scheduler.observe(state, losses.take(weights))
        decisions.append(weights)
    return np.stack(decisions), state


def select_once(scheduler: Scheduler, values: Any) -> list[float]:
    weights, _ = scheduler.select(scheduler.init(), Losses(values))
    return weights.tolist()
