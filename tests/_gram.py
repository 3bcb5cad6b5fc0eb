"""A schedule that compares the two gradients, and remembers what it saw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from theory.scheduling import Probe, Scheduler, ScheduleState


@dataclass(frozen=True)
class MinNorm(Scheduler):
    """The shortest w_1 g_1 + w_2 g_2 with w on the simplex (MGDA, Desideri 2012), one run.

    Keeps the last Gram matrix and, where asked to, the losses that belong to it.
    """

    with_losses: bool = False
    reads_gram = True

    def select(
        self, state: ScheduleState, probe: Probe
    ) -> tuple[NDArray[np.float64], ScheduleState]:
        gram = probe.gram()
        memory = {"gram": gram, "losses": probe() if self.with_losses else None}
        return min_norm(gram), state._replace(memory=memory)


def min_norm(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    first, inner, second = gram
    dpo = np.clip((second - inner) / (first - 2.0 * inner + second), 0.0, 1.0)
    return np.array([dpo, 1.0 - dpo])
