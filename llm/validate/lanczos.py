"""Solves with a Hessian that is known by its products with vectors alone.

Lanczos from a vector b gives an orthonormal basis Q (n, k) and a tridiagonal T = Q' H Q. Then

    (H + mu I) x = b  ~  x = Q y,  (T + mu I) y = |b| e_1,  residual = beta_k |y_k|,

which are the iterates of conjugate gradients wherever H + mu I is positive, for every damping mu
from the same products. The eigenvalues of T bound the spectrum of H from inside. The basis is
orthogonalised twice, in float64: the textbook recurrence loses it and shows ghosts of eigenvalues.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""v (n,) -> H v (n,)."""
BREAKDOWN = 1e-12
"""A new direction this short, relative to |T|: the basis spans an invariant subspace."""


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
