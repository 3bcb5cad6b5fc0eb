"""What a log line averages: means of what training computes anyway, and where its time goes.

Both are kept as they come and read once per log line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PHASES = ("data", "forward", "backward", "optimizer", "probes", "evaluation", "other")
"""data: drawing, collating and moving batches; optimizer: gradient norm, clipping and the step."""
MOST_MARKS = 4096
"""Marks kept before they are added up: bounds the memory between two log lines."""


class Meters:
    """Running (sum, count) of named values on the device; adding never waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums: dict[str, tuple[Tensor, Tensor | int]] = {}

    def add(self, name: str, total: Tensor, count: Tensor | int = 1) -> None:
        old_total, old_count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (old_total + total, old_count + count)

    def add_if_finite(self, name: str, value: Tensor) -> None:
        """For values that may overflow without harm: those are left out of the mean."""
        finite = torch.isfinite(value)
        self.add(name, torch.where(finite, value, 0.0), finite.float())

    def totals(self) -> dict[str, float]:
        """The sums on this rank, by one read of the device."""
        return dict(zip(self._sums, self._read(lambda values: values)[:, 0].tolist(), strict=True))

    def drain(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means over all ranks, by one reduction and one read of the device; then all is 0."""
        rows = self._read(sum_over_ranks).tolist()
        names, self._sums = list(self._sums), {}
        means = zip(names, rows, strict=True)
        return {name: total / count for name, (total, count) in means if count > 0.0}

    def _read(self, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """(names, 2) on the host."""
        if not self._sums:
            return torch.zeros(0, 2)
        columns = zip(*self._sums.values(), strict=True)
        return reduce(torch.stack([self._column(values) for values in columns], dim=1)).cpu()

    def _column(self, values: tuple[Tensor | int, ...]) -> Tensor:
        if not any(isinstance(value, Tensor) for value in values):
            return torch.tensor(values, dtype=torch.float32, device=self.device)
        return torch.stack(
            [torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in values]
        )


class Clock:
    """Seconds per phase between `start` and `stop`; outside of them nothing counts.

    Always one phase is running; `switch` ends it and begins the next, so that the phases add up to
    the whole. On CUDA the calls return before the work is done and a wall clock would charge the
    work to whoever waits for it first: there the marks are CUDA events, in line with the work, read
    when a log line is written. A device that waits for the host spends that time in the phase of
    the host: a slow collator shows up under data.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._at_last_log = dict(self.seconds)
        self._marks: list[tuple[str, Any]] = []
        self._cuda = device.type == "cuda"

    def start(self) -> None:
        self._marks = [("other", self._now())]

    def stop(self) -> None:
        self._add_up()
        self._marks = []

    def switch(self, phase: str) -> str:
        """From now on time counts for `phase`; returns the phase that ends."""
        if not self._marks:
            return phase
        before = self._marks[-1][0]
        self._marks.append((phase, self._now()))
        if len(self._marks) > MOST_MARKS:
            self._add_up()
        return before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = self.switch(name)
        try:
            yield
        finally:
            self.switch(before)

    def shares(self) -> dict[str, float]:
        """Share of each phase that ever ran in the time since the last call; they add up to 1."""
        self._add_up()
        spent = {name: total - self._at_last_log[name] for name, total in self.seconds.items()}
        self._at_last_log = dict(self.seconds)
        whole = sum(spent.values())
        ran = [name for name, total in self.seconds.items() if total > 0.0]
        return {name: spent[name] / whole for name in ran} if whole > 0.0 else {}

    def _add_up(self) -> None:
        if not self._marks:
            return
        self._marks.append((self._marks[-1][0], self._now()))
        if self._cuda:
            self._marks[-1][1].synchronize()
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            elapsed = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
            self.seconds[phase] += elapsed
        del self._marks[:-1]

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
