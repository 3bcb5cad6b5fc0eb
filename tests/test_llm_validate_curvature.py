"""Solves by Lanczos, Hessian products of the objectives, and the gap that they predict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from _tiny import OBJECTIVES, PAD_ID, make_policy, train_rows
from torch.func import functional_call

from llm.validate.curvature import Probe, lanczos, plain_copy
from llm.validate.trade_off import trade_off
from theory.tasks import Task


def spd(size: int = 7, seed: int = 0) -> torch.Tensor:
    root = torch.randn(size, size, dtype=torch.float64, generator=torch.manual_seed(seed))
    return root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("damping", [0.0, 0.5, 20.0])
def test_a_full_krylov_space_solves_exactly_at_every_damping(damping: float) -> None:
    matrix, b = spd(), torch.arange(1.0, 8.0, dtype=torch.float64)
    x, residual = lanczos(lambda v: matrix @ v, b, 7).solve(damping)
    expected = torch.linalg.solve(matrix + damping * torch.eye(7, dtype=torch.float64), b)
    torch.testing.assert_close(x, expected, rtol=1e-8, atol=1e-10)
    assert residual < 1e-8


def test_the_reported_residual_is_the_true_one_when_stopped_early() -> None:
    matrix, b = spd(), torch.ones(7, dtype=torch.float64)
    krylov = lanczos(lambda v: matrix @ v, b, 3)
    x, residual = krylov.solve(0.3)
    true = float((matrix @ x + 0.3 * x - b).norm() / b.norm())
    assert residual == pytest.approx(true, rel=1e-8)
    assert residual > 1e-3  # three steps of seven are not enough: the claim is not empty
    exact = np.linalg.eigvalsh(matrix.numpy())
    assert exact[0] <= krylov.eigenvalues[0] <= krylov.eigenvalues[-1] <= exact[-1] + 1e-9


def test_negative_curvature_and_a_zero_start_are_refused() -> None:
    matrix = torch.diag(torch.tensor([2.0, -1.0], dtype=torch.float64))
    krylov = lanczos(lambda v: matrix @ v, torch.ones(2), 2)
    with pytest.raises(ValueError, match="negative curvature"):
        krylov.solve(0.5)
    with pytest.raises(ValueError, match="norm"):
        lanczos(lambda v: matrix @ v, torch.zeros(2), 2)


@pytest.mark.parametrize("task", list(Task))
def test_hessian_products_and_gradients_are_those_of_autograd(task: Task) -> None:
    model = make_policy(hidden_size=8, num_attention_heads=2, intermediate_size=8)
    name = "gpt_neox.final_layer_norm.weight"
    for own, parameter in model.named_parameters():
        parameter.requires_grad_(own == name)
    rows = train_rows()
    probe = Probe(model, OBJECTIVES, rows, PAD_ID)
    twin = plain_copy(model)

    class Whole(torch.nn.Module):
        """The model at other values of the one trained tensor."""

        def __init__(self, values: torch.Tensor) -> None:
            super().__init__()
            self.anchor, self.values = torch.nn.Parameter(torch.zeros(1)), values

        def forward(self, **inputs: Any) -> Any:
            return functional_call(twin, {name: self.values}, kwargs=inputs)

    def loss(values: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for batch in probe.batches[task]:
            total = total + probe.objectives[task](Whole(values).eval(), batch).total
        return total / probe.items[task]

    point = probe.point
    dense = torch.autograd.functional.hessian(loss, point)
    vector = torch.linspace(-1.0, 1.0, len(point), dtype=torch.float64)
    torch.testing.assert_close(probe.product(task)(vector), dense @ vector, rtol=1e-9, atol=1e-12)
    gradient = torch.autograd.functional.jacobian(loss, point)
    torch.testing.assert_close(probe.gradient(task), gradient, rtol=1e-9, atol=1e-12)
    assert float(loss(point)) == pytest.approx(float(probe.values()[task]), rel=1e-12)


class QuadraticProbe(Probe):
    """f_i = (x - c_i)' H_i (x - c_i) / 2 at one x: everything in closed form."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x
        self.hessians = {Task.DPO: spd(seed=1), Task.SFT: spd(seed=2)}
        self.centres = {Task.DPO: torch.ones(7).double(), Task.SFT: -torch.ones(7).double()}

    @property
    def point(self) -> torch.Tensor:
        return self.x

    def values(self) -> np.ndarray:
        return np.array([float((self.x - self.centres[t]) @ self.gradient(t)) / 2 for t in Task])

    def gradient(self, task: Task) -> torch.Tensor:
        return self.hessians[task] @ (self.x - self.centres[task])

    def product(self, task: Task) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda vector: self.hessians[task] @ vector


@pytest.mark.parametrize("last", list(Task))
@pytest.mark.parametrize("lam", [0.5, 0.2])
def test_on_quadratics_the_local_model_gives_the_gap_and_t8_lies_below(
    last: Task, lam: float
) -> None:
    any_point = QuadraticProbe(torch.zeros(7).double())
    h, c = any_point.hessians, any_point.centres
    mixed = lam * h[Task.DPO] + (1.0 - lam) * h[Task.SFT]
    pull = lam * h[Task.DPO] @ c[Task.DPO] + (1.0 - lam) * h[Task.SFT] @ c[Task.SFT]
    joint = QuadraticProbe(torch.linalg.solve(mixed, pull))
    found = trade_off(joint, QuadraticProbe(c[last]), last, steps=7, lam=lam)
    # The damping is found to 1e-6 in its logarithm and is about 1e-9 of the curvature here.
    assert found.predicted == pytest.approx(found.measured, rel=1e-4)
    assert 0.0 < found.lower < found.measured
    assert found.abandoned == pytest.approx(found.gradient, rel=1e-9)  # the stage is finished
