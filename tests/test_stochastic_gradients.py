"""Stochastic gradients: of their sample losses, unbiased, and the contract of the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from _asserts import (
    EXACT,
    assert_unbiased,
    sample_gradients,
)
from _instances import (
    EVERY_KIND,
    POLICIES,
    SEEDS,
    all_samples,
    random_objective,
    random_policy,
    random_quadratic,
    random_theta,
)
from hypothesis import given, settings
from numpy.typing import NDArray
from scipy.special import log_softmax

from theory.objectives import (
    LogisticDPO,
    SoftmaxSFT,
)
from theory.problems import make_problem
from theory.randomness import BLOCK, Stream
from theory.theorems.importance import second_moment

Array = NDArray[np.float64]


@settings(deadline=None, max_examples=15)
@given(SEEDS)
def test_sample_losses_and_gradients_match_autograd(seed: int) -> None:
    torch = pytest.importorskip("torch")
    policy = random_policy(seed)
    theta = random_theta(seed, policy.features.shape[2])
    point = torch.tensor(theta, requires_grad=True)

    def dpo(i: int, label: int) -> Any:
        row = torch.tensor(policy.beta * policy.differences[i])
        margin = row @ (point - torch.tensor(policy.theta_ref))
        return -torch.nn.functional.logsigmoid((1 - 2 * label) * margin)

    def sft(x: int, y: int) -> Any:
        return -torch.log_softmax(torch.tensor(policy.features[x]) @ point, dim=0)[y]

    for objective, loss, shape in (
        (policy.dpo(), dpo, (len(policy.prompt), 2)),
        (policy.sft(), sft, policy.labels.shape),
    ):
        gradients, losses = sample_gradients(objective, theta, all_samples(objective)[0])
        for sample, index in enumerate(np.ndindex(shape)):
            value = loss(*index)
            (expected,) = torch.autograd.grad(value, point)
            np.testing.assert_allclose(losses[sample], value.item(), rtol=EXACT, atol=EXACT)
            np.testing.assert_allclose(gradients[sample], expected.numpy(), rtol=0, atol=EXACT)


# --- stochastic gradients


@POLICIES
@settings(deadline=None, max_examples=40)
@given(seed=SEEDS)
def test_stochastic_gradient_is_unbiased_over_all_samples(kind: str, seed: int) -> None:
    """And has the second moment of the samples that the theorems enumerate by definition."""
    objective = random_objective(kind, seed)
    theta, (draws, probabilities) = random_theta(seed, objective.dim), all_samples(objective)
    assert_unbiased(objective, theta, draws, probabilities)
    gradients, _ = sample_gradients(objective, theta, draws)
    moment = (gradients.T * probabilities) @ gradients
    scale = 1.0 + np.abs(moment).max()
    np.testing.assert_allclose(second_moment(objective, theta), moment, rtol=0, atol=EXACT * scale)


@pytest.mark.parametrize("name", ["bernoulli", "toy2d", "softmax"])
def test_stochastic_gradient_of_the_named_problems_is_unbiased(name: str) -> None:
    problem = make_problem(name)
    theta = random_theta(1, problem.dim)
    for objective in problem.objectives:
        assert_unbiased(objective, theta, *all_samples(objective))


@settings(deadline=None, max_examples=40)
@given(SEEDS)
def test_quadratic_noise_is_unbiased_with_covariance_sigma_squared(seed: int) -> None:
    """The 2d points +-sqrt(d) e_j have the mean and the covariance of a standard normal."""
    objective = random_quadratic(seed)
    dim = objective.dim
    corners = np.sqrt(dim) * np.eye(dim)
    draws = np.concatenate([corners, -corners])
    theta = random_theta(seed, dim)
    assert_unbiased(objective, theta, draws, np.full(2 * dim, 0.5 / dim))

    noise = sample_gradients(objective, theta, draws)[0] - objective.gradient(theta)
    covariance = noise.T @ noise / (2 * dim)
    scale = 1.0 + np.abs(objective.gradient(theta)).max() ** 2
    np.testing.assert_allclose(
        covariance, objective.noise**2 * np.eye(dim), rtol=0, atol=EXACT * scale
    )


@settings(deadline=None, max_examples=40)
@given(SEEDS)
def test_quadratic_sample_gradient_is_the_gradient_of_its_sample_loss(seed: int) -> None:
    """f(theta; z) is quadratic, so its central difference is exact up to rounding."""
    objective = random_quadratic(seed)
    theta, z = random_theta(seed, objective.dim), random_theta(seed + 1, objective.dim)
    gradient = sample_gradients(objective, theta, z[None])[0][0]
    step = 1e-3
    for j, shift in enumerate(step * np.eye(objective.dim)):
        up = sample_gradients(objective, theta + shift, z[None])[1][0]
        down = sample_gradients(objective, theta - shift, z[None])[1][0]
        np.testing.assert_allclose((up - down) / (2 * step), gradient[j], rtol=1e-9, atol=1e-9)


def test_labels_are_drawn_by_inversion_up_to_the_last_draw() -> None:
    """Ten labels of 0.1 add up to 1 - 1e-16: a draw above has one; probability 0 never has any,
    whether or not its response exists."""
    below, theta = np.nextafter(1.0, 0.0), np.array([0.3])
    tenths, gaps = np.full((1, 10), 0.1), np.array([[0.0, 0.5, 0.0, 0.5, 0.0]])
    for labels, draws, drawn in (
        (tenths, [[0.5, below], [below, 0.95]], [9, 9]),
        (gaps, [[0.5, u] for u in (0.0, 0.25, np.nextafter(0.5, 0.0))], [1, 1, 1]),
        (gaps, [[0.5, u] for u in (0.5, 0.75, below)], [3, 3, 3]),
    ):
        features = np.arange(labels.size, dtype=float)[None, :, None]
        for base in (np.zeros_like(labels), np.where(labels > 0.0, 0.0, -np.inf)):
            objective = SoftmaxSFT(features, labels, base)
            losses = sample_gradients(objective, theta, np.array(draws))[1]
            expected = -log_softmax(features[0] @ theta + base[0])[drawn]
            np.testing.assert_allclose(losses, expected, rtol=EXACT)


@pytest.mark.parametrize(("preference", "sign"), [(0.0, -1.0), (1.0, 1.0)])
def test_certain_preferences_always_draw_their_label(preference: float, sign: float) -> None:
    objective = LogisticDPO(np.ones((1, 1)), np.array([preference]), 1.0, np.zeros(1))
    draws = np.array([[0.5, 0.0], [0.5, 0.5], [0.5, np.nextafter(1.0, 0.0)]])
    losses = sample_gradients(objective, np.array([2.0]), draws)[1]
    np.testing.assert_allclose(losses, np.log1p(np.exp(-2.0 * sign)), rtol=EXACT)


# --- the kernel's contract: weights, `out`, `losses`, batches


@EVERY_KIND
@pytest.mark.parametrize("column", [0, 1])
def test_weights_scale_what_is_added_and_a_weight_of_zero_skips(kind: str, column: int) -> None:
    objective = random_objective(kind, 5)
    draws = objective.draws((0,), Stream.DPO_SAMPLE, 0)
    theta = np.stack([random_theta(5, objective.dim)] * 3)
    weights = np.full((3, 2), 0.5)
    weights[:, column] = [1.0, 0.0, 2.0]
    out, losses = np.full((3, objective.dim), 7.0), np.full((3, 2), 9.0)
    index = np.zeros(3, dtype=np.int64)
    objective.add_stochastic_gradient(theta, weights, column, draws, index, 0, out, losses)
    gradient, loss = sample_gradients(objective, theta[0], draws[0, :1])
    assert out[1].tolist() == [7.0] * objective.dim
    np.testing.assert_array_equal(losses[:, column], [loss[0], np.nan, loss[0]])  # not weighted
    np.testing.assert_array_equal(losses[:, 1 - column], 9.0)
    scale = EXACT * (7.0 + np.abs(gradient).max())
    np.testing.assert_allclose(out[0] - 7.0, gradient[0], rtol=0, atol=scale)  # it adds to `out`
    np.testing.assert_allclose(out[2] - 7.0, 2.0 * gradient[0], rtol=0, atol=scale)


@EVERY_KIND
def test_stochastic_gradients_do_not_depend_on_the_batch(kind: str) -> None:
    """Bit for bit: any subset of the runs, in any order, gives the same rows."""
    objective = random_objective(kind, 7)
    rng = np.random.default_rng(0)
    theta = rng.standard_normal((8, objective.dim))
    weights = rng.uniform(size=(8, 2))
    draws = objective.draws(tuple(range(5)), Stream.SFT_SAMPLE, 2)
    seed_index = rng.integers(5, size=8)

    def gradients(rows: list[int]) -> tuple[Array, Array]:
        out, losses = np.zeros((len(rows), objective.dim)), np.zeros((len(rows), 2))
        objective.add_stochastic_gradient(
            theta[rows], weights[rows], 1, draws, seed_index[rows], 33, out, losses
        )
        return out, losses[:, 1]

    expected = gradients(list(range(8)))
    for rows in ([3], [7, 0], [5, 4, 3, 2, 1, 0]):
        for got, want in zip(gradients(rows), expected, strict=True):
            np.testing.assert_array_equal(got, want[rows])


@EVERY_KIND
def test_draws_have_one_row_per_seed_and_step(kind: str) -> None:
    objective = random_objective(kind, 8)
    width = objective.dim if kind == "quadratic" else 2
    draws = objective.draws((1, 2, 3), Stream.DPO_SAMPLE, 0)
    assert draws.shape == (3, BLOCK, width)
    np.testing.assert_array_equal(draws[1], objective.draws((2,), Stream.DPO_SAMPLE, 0)[0])
    assert np.any(draws != objective.draws((1, 2, 3), Stream.SFT_SAMPLE, 0))
