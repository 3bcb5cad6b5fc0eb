"""Means of what training computes anyway, kept on the device and read once per log line."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Meters:
    """Running (sum, count) of named values; adding never waits for the device."""

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
