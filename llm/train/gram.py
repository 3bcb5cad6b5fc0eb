"""Both gradients of a step kept apart, for schedules that weigh them by their Gram matrix.

A backward pass adds to what `.grad` holds. So while an objective runs backward, `.grad` holds its
gradient alone; when both are there, three inner products go to the schedule, and its weights make
the one gradient that the optimiser sees. That costs the memory of one more gradient, and the time
of the two backward passes that Mix takes as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from theory.tasks import Task

PAIRS = ((Task.DPO, Task.DPO), (Task.DPO, Task.SFT), (Task.SFT, Task.SFT))
"""The entries of the Gram matrix, in the order in which a probe gives them."""


class TwoGradients:
    """The gradients of a step in `parameters`, one list for each objective.

    Under data parallel training the backward pass has summed them over ranks already. Of sharded
    gradients (FSDP2) every rank holds its shard, and the inner products add up over ranks.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self.parameters = [each for each in parameters if each.requires_grad]
        self._held: dict[Task, list[Tensor | None]] = {}

    @contextmanager
    def of(self, task: Task) -> Iterator[None]:
        """Within, `.grad` is the gradient of `task`."""
        self._put(self._held.get(task, [None] * len(self.parameters)))
        try:
            yield
        finally:
            self._held[task] = [each.grad for each in self.parameters]
            self._put([None] * len(self.parameters))

    def gram(self) -> NDArray[np.float64]:
        """|g_DPO|^2, <g_DPO, g_SFT>, |g_SFT|^2: by one reduction and one read of the device."""
        products = [_inner(self._held[a], self._held[b]) for a, b in PAIRS]
        stacked: Any = torch.stack(products)
        whole = stacked.full_tensor() if hasattr(stacked, "full_tensor") else stacked
        return np.asarray(whole.double().cpu())

    def combine(self, weights: Sequence[float]) -> None:
        """`.grad` becomes sum_i weights_i g_i; what was kept apart is let go."""
        dpo, sft = self._held[Task.DPO], self._held[Task.SFT]
        self._put([_sum(weights, pair) for pair in zip(dpo, sft, strict=True)])
        self._held = {}

    def _put(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient


def _inner(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> Tensor:
    """Summed in float32 within a tensor (a bfloat16 sum would lose digits), in float64 across."""
    pairs = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    if not pairs:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([(a.float() * b.float()).sum() for a, b in pairs]).double().sum()


def _sum(weights: Sequence[float], pair: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
    """Sum of weighted tensors in place of the first that is there."""
    terms = [(w, g) for w, g in zip(weights, pair, strict=True) if g is not None]
    if not terms:
        return None
    (weight, total), *rest = terms
    total.mul_(weight)
    for other_weight, other in rest:
        total.add_(other, alpha=other_weight)
    return total
