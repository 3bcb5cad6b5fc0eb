"""One endless stream of samples per objective: a pure function of (seed, objective, position).

Each pass over the data is a fresh permutation drawn from (seed, objective, pass number). The state
is one integer, the number of rows consumed by all ranks together, so a resumed run, and a run on
another number of ranks with the same global batch, continues with the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from transformers import TrainingArguments

from llm.loss.packing import Row, row_tokens
from theory.randomness import Stream, generator
from theory.tasks import Task

ORDER_STREAMS = {Task.DPO: Stream.DPO_ORDER, Task.SFT: Stream.SFT_ORDER}


def open_streams(
    train_rows: Mapping[Task, Sequence[Row]],
    batch_sizes: Mapping[Task, int],
    args: TrainingArguments,
) -> dict[Task, SampleStream]:
    """A stream per objective for this rank, as the arguments of the run say."""
    max_tokens = getattr(args, "max_tokens_per_batch", None)
    return {
        task: SampleStream(
            task,
            len(rows),
            batch_sizes[task],
            args.data_seed if args.data_seed is not None else args.seed,
            rank=args.process_index,
            world_size=args.world_size,
            max_tokens=max_tokens,
            lengths=[row_tokens(row) for row in rows],
        )
        for task, rows in train_rows.items()
    }


def steps_per_epoch(streams: Mapping[Task, SampleStream], args: TrainingArguments) -> int:
    """Optimiser steps of one pass over the longer of the data sets (longer in steps)."""
    per_step = args.gradient_accumulation_steps * args.world_size
    return max(math.ceil(stream.batches_per_pass() / per_step) for stream in streams.values())


class SampleStream:
    """Row numbers of the micro-batches of one objective, on one of `world_size` ranks.

    A micro-batch holds `batch_size` rows or, with `max_tokens`, as many of the next rows as fit
    into that many tokens (at least one); `lengths` are then the tokens of each row.
    """

    def __init__(
        self,
        task: Task,
        num_rows: int,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        max_tokens: int | None = None,
        lengths: Sequence[int] = (),
    ) -> None:
        if num_rows < 1 or batch_size < 1:
            raise ValueError(f"{task.label}: {num_rows} rows in batches of {batch_size}")
        if max_tokens is not None and (max_tokens < 1 or len(lengths) != num_rows):
            raise ValueError(f"{task.label}: {max_tokens} tokens for {len(lengths)} lengths")
        self.task, self.num_rows, self.batch_size, self.seed = task, num_rows, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.max_tokens, self.lengths = max_tokens, lengths
        self.consumed = 0

    def peek(self, micro_batches: int) -> list[list[int]]:
        """Row numbers of the next step's micro-batches on this rank, without consuming them.

        Micro-batch m of rank r is batch m * world_size + r of those that follow `consumed`: the
        rows of a step depend on the global batch only, not on how ranks share it.
        """
        return self._step(micro_batches)[self.rank :: self.world_size]

    def advance(self, micro_batches: int) -> None:
        """Consume one step of `micro_batches` micro-batches on every rank."""
        self.consumed += sum(map(len, self._step(micro_batches)))

    def batches_per_pass(self) -> int:
        """Micro-batches, over all ranks, that one pass over the data fills."""
        if self.max_tokens is None:
            return -(-self.num_rows // self.batch_size)
        position = batches = 0
        while position < self.num_rows:
            position += len(self._batch_at(position))
            batches += 1
        return batches

    def _step(self, micro_batches: int) -> list[list[int]]:
        """The batches of all ranks, in turn."""
        position, batches = self.consumed, []
        for _ in range(micro_batches * self.world_size):
            batches.append(self._batch_at(position))
            position += len(batches[-1])
        return batches

    def _batch_at(self, position: int) -> list[int]:
        if self.max_tokens is None:
            return [self._row(position + i) for i in range(self.batch_size)]
        rows = [self._row(position)]
        tokens = self.lengths[rows[0]]
        while (tokens := tokens + self.lengths[self._row(position + len(rows))]) <= self.max_tokens:
            rows.append(self._row(position + len(rows)))
        return rows

    def _row(self, position: int) -> int:
        number, offset = divmod(position, self.num_rows)
        return int(permutation(self.seed, self.task, number, self.num_rows)[offset])


@lru_cache(maxsize=8)
def permutation(seed: int, task: Task, number: int, num_rows: int) -> NDArray[np.int64]:
    """The order of the rows in pass `number` over the data."""
    return generator(seed, ORDER_STREAMS[task], number).permutation(num_rows)
