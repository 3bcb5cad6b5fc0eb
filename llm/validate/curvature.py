"""Gradients and Hessian-vector products of f_DPO and f_SFT on a fixed set of rows.

The Hessian is that of the mean loss, in the parameters that are trained, without dropout: a second
backward pass through padded batches and plain (eager) attention, in float64. Fused attention has no
second derivative.

Solves know a Hessian by its products with vectors alone. Lanczos from a vector b
gives an orthonormal basis Q (n, k) and a tridiagonal T = Q' H Q. Then

    (H + mu I) x = b  ~  x = Q y,  (T + mu I) y = |b| e_1,  residual = beta_k |y_k|,

which are the iterates of conjugate gradients wherever H + mu I is positive, for every damping mu
from the same products. The eigenvalues of T bound the spectrum of H from inside. The basis is
orthogonalised twice, in float64: the textbook recurrence loses it and shows ghosts of eigenvalues.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm.loss.evaluate import by_length, device_of
from llm.loss.objectives import Batch, LanguageObjective, Row, move
from llm.setup import Setup
from theory.schedulers import objective_weights
from theory.tasks import Task

ROWS_PER_BATCH = 128
Product = Callable[[Tensor], Tensor]
"""v (n,) -> H v (n,)."""
BREAKDOWN = 1e-12
"""A new direction this short, relative to |T|: the basis spans an invariant subspace."""


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


@dataclass(frozen=True)
class Krylov:
    """H seen from one vector. `basis` (k, n), `matrix` T (k, k), `last` = beta_k, `norm` = |b|."""

    basis: Tensor
    matrix: NDArray[np.float64]
    last: float
    norm: float

    @property
    def eigenvalues(self) -> NDArray[np.float64]:
        """Ritz values, rising: the largest is at most that of H, the smallest at least."""
        return np.asarray(np.linalg.eigvalsh(self.matrix), dtype=np.float64)

    def solve(self, damping: float = 0.0) -> tuple[Tensor, float]:
        """x ~ (H + damping I)^-1 b and its residual |(H + damping I) x - b| / |b|.

        Raises:
            ValueError: if H + damping I is not positive on the Krylov space.
        """
        low = float(self.eigenvalues[0]) + damping
        if low <= 0.0:
            raise ValueError(f"damping {damping:g} leaves negative curvature {low:.3g}")
        size = len(self.matrix)
        right = np.zeros(size)
        right[0] = self.norm
        y = np.linalg.solve(self.matrix + damping * np.eye(size), right)
        x = torch.as_tensor(y, dtype=self.basis.dtype) @ self.basis
        return x, self.last * abs(float(y[-1])) / self.norm


def lanczos(product: Product, vector: Tensor, steps: int) -> Krylov:
    """At most `steps` products with H, started from `vector` (n,), in float64.

    Raises:
        ValueError: if the vector is zero or not finite, or `steps` is not positive.
    """
    b = vector.double()
    norm = float(b.norm())
    if not (np.isfinite(norm) and norm > 0.0):
        raise ValueError(f"the start of Lanczos has norm {norm}")
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    basis, diagonal, beside = [b / norm], list[float](), list[float]()
    while True:
        w = product(basis[-1]).double()
        diagonal.append(float(w @ basis[-1]))
        known = torch.stack(basis)
        for _ in range(2):
            w = w - known.T @ (known @ w)
        length = float(w.norm())
        scale = max(map(abs, [*diagonal, *beside]))
        if len(basis) >= steps or length <= BREAKDOWN * scale:
            last = 0.0 if length <= BREAKDOWN * scale else length
            matrix = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
            return Krylov(known, matrix, last, norm)
        beside.append(length)
        basis.append(w / length)
