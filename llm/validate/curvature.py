"""Gradients and Hessian-vector products of f_DPO and f_SFT on a fixed set of rows.

The Hessian is that of the mean loss, in the parameters that are trained, without dropout: a second
backward pass through padded batches and plain (eager) attention, in float64. Fused attention has no
second derivative.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm.loss.evaluate import by_length, device_of
from llm.loss.objectives import Batch, LanguageObjective, Row, move
from llm.setup import Setup
from llm.validate.lanczos import Product
from theory.schedulers import objective_weights
from theory.tasks import Task

ROWS_PER_BATCH = 128


class Probe:
    """f = (f_DPO, f_SFT) around one point: values (2,), gradients (n,) and Hessian products (n,).

    Means over the rows, in nats; vectors are flat, in the order of `parameters`, on the CPU.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        objectives: Mapping[Task, LanguageObjective],
        rows: Mapping[Task, Sequence[Row]],
        pad_token_id: int,
    ) -> None:
        self.model = plain_copy(model)
        self.objectives = {task: replace(f, packing=False) for task, f in objectives.items()}  # type: ignore[type-var]
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.batches = {task: list(self._collate(task, rows[task], pad_token_id)) for task in Task}
        self.items = {task: self.objectives[task].items(rows[task]) for task in Task}

    def _collate(self, task: Task, rows: Sequence[Row], pad_token_id: int) -> Iterator[Batch]:
        for chunk in by_length(range(len(rows)), rows, ROWS_PER_BATCH):
            batch = self.objectives[task].collate([rows[i] for i in chunk], pad_token_id)
            yield _doubled(move(batch, device_of(self.model)))

    @property
    def point(self) -> Tensor:
        """The parameters as one vector."""
        return _flat([p.detach() for p in self.parameters])

    @torch.no_grad()
    def values(self) -> NDArray[np.float64]:
        """(f_DPO, f_SFT)."""
        totals = [
            sum(float(self.objectives[task](self.model, batch).total) for batch in batches)
            / self.items[task]
            for task, batches in self.batches.items()
        ]
        return np.array(totals)

    def gradient(self, task: Task) -> Tensor:
        return self._sum(task, lambda loss: torch.autograd.grad(loss, self.parameters))

    def product(self, task: Task) -> Product:
        """v -> (Hessian of f_task) v, by differentiating grad f . v."""

        def apply(vector: Tensor) -> Tensor:
            parts = self._split(vector)

            def second(loss: Tensor) -> Sequence[Tensor]:
                first = torch.autograd.grad(loss, self.parameters, create_graph=True)
                slope = sum((g * v).sum() for g, v in zip(first, parts, strict=True))
                return torch.autograd.grad(slope, self.parameters, materialize_grads=True)  # type: ignore[arg-type]

            return self._sum(task, second)

        return apply

    def mix_product(self, lam: float) -> Product:
        """v -> (lam H_DPO + (1 - lam) H_SFT) v."""
        products = [self.product(task) for task in Task]
        weights = objective_weights(lam)
        return lambda vector: sum(
            (float(w) * p(vector) for w, p in zip(weights, products, strict=True)),
            start=torch.zeros_like(vector),
        )

    def mix_gradient(self, lam: float) -> Tensor:
        weights = objective_weights(lam)
        return sum(
            (float(weights[task]) * self.gradient(task) for task in Task),
            start=torch.zeros_like(self.point),
        )

    def _sum(self, task: Task, derivative: Callable[[Tensor], Sequence[Tensor]]) -> Tensor:
        total = torch.zeros_like(self.point)
        for batch in self.batches[task]:
            loss = self.objectives[task](self.model, batch).total / self.items[task]
            total += _flat(derivative(loss))
        return total

    def _split(self, vector: Tensor) -> list[Tensor]:
        sizes = [p.numel() for p in self.parameters]
        vector = vector.to(self.parameters[0])
        return [
            part.view_as(p) for part, p in zip(vector.split(sizes), self.parameters, strict=True)
        ]


def probe_rows(setup: Setup, count: int) -> dict[Task, list[Row]]:
    """The first `count` training rows of each objective: all points are measured on the same."""
    return {task: list(setup.train[task].rows[:count]) for task in Task}


def probe_at(setup: Setup, model: torch.nn.Module, count: int) -> Probe:
    pad = int(setup.tokenizer.pad_token_id)
    return Probe(model, setup.objectives, probe_rows(setup, count), pad)


def plain_copy(model: torch.nn.Module) -> Any:
    """A float64 copy in evaluation mode whose attention can be differentiated twice."""
    twin: Any = copy.deepcopy(model).double().eval()
    if hasattr(twin, "set_attn_implementation"):
        twin.set_attn_implementation("eager")
    return twin


def _doubled(batch: Batch) -> Batch:
    """Floating-point tensors (the reference's log-probabilities) in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts]).double().cpu()
