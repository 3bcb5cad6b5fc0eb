"""One endless stream of samples per objective: a pure function of (seed, objective, position).

Each pass over the data is a fresh permutation drawn from (seed, objective, pass number). The state
is one integer, the number of rows consumed by all ranks together, so a resumed run, and a run on
another number of ranks with the same global batch, continues with the same rows.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from theory.randomness import Stream, generator
from theory.tasks import Task

ORDER_STREAMS = {Task.DPO: Stream.DPO_ORDER, Task.SFT: Stream.SFT_ORDER}


class SampleStream:
    """Row numbers of the micro-batches of one objective, on one of `world_size` ranks."""

    def __init__(
        self,
        task: Task,
        num_rows: int,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if num_rows < 1 or batch_size < 1:
            raise ValueError(f"{task.label}: {num_rows} rows in batches of {batch_size}")
        self.task, self.num_rows, self.batch_size, self.seed = task, num_rows, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.consumed = 0

    def peek(self, micro_batches: int) -> list[list[int]]:
        """Row numbers of the next step's micro-batches on this rank, without consuming them.

        Micro-batch m of rank r takes positions consumed + (m * world_size + r) * batch_size on:
        the rows of a step depend on the global batch only, not on how ranks share it.
        """
        starts = [
            self.consumed + (m * self.world_size + self.rank) * self.batch_size
            for m in range(micro_batches)
        ]
        return [[self._row(start + i) for i in range(self.batch_size)] for start in starts]

    def advance(self, micro_batches: int) -> None:
        """Consume one step of `micro_batches` micro-batches on every rank."""
        self.consumed += micro_batches * self.world_size * self.batch_size

    def _row(self, position: int) -> int:
        number, offset = divmod(position, self.num_rows)
        return int(permutation(self.seed, self.task, number, self.num_rows)[offset])


@lru_cache(maxsize=8)
def permutation(seed: int, task: Task, number: int, num_rows: int) -> NDArray[np.int64]:
    """The order of the rows in pass `number` over the data."""
    return generator(seed, ORDER_STREAMS[task], number).permutation(num_rows)
