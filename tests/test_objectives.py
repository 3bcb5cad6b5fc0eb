"""The objectives against finite differences, torch autograd and enumeration of every sample."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
from _asserts import (
    EXACT,
    assert_constants_hold,
    assert_gradient_matches_finite_differences,
    assert_hessian_matches_finite_differences,
    assert_is_convex_along_segments,
    assert_lies_above_its_tangents,
    assert_unbiased,
    points_in_ball,
    sample_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from theory.objectives import (
    LogisticDPO,
    Objective,
    Quadratic,
    SoftmaxSFT,
    StochasticObjective,
    WeightedSum,
    response_log_probs,
)
from theory.problems import PROBLEMS, make_problem
from theory.randomness import BLOCK, Stream

Array = NDArray[np.float64]

SEEDS = st.integers(0, 10**6)
KINDS = ["quadratic", "logistic", "softmax"]
RADIUS = 3.0


class Policy(NamedTuple):
    """Features, a label law and preference pairs at response level: both losses come from these."""

    features: Array
    """(prompts, responses, d)"""
    labels: Array
    """(prompts, responses)"""
    prompt: NDArray[np.int64]
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    preference: Array
    beta: float
    theta_ref: Array

    @property
    def phi(self) -> float:
        """Phi, the largest feature norm."""
        return float(np.linalg.norm(self.features, axis=-1).max())

    @property
    def differences(self) -> Array:
        return self.features[self.prompt, self.left] - self.features[self.prompt, self.right]

    def dpo(self) -> LogisticDPO:
        return LogisticDPO(self.differences, self.preference, self.beta, self.theta_ref)

    def sft(self) -> SoftmaxSFT:
        return SoftmaxSFT(self.features, self.labels)


def random_policy(seed: int) -> Policy:
    rng = np.random.default_rng(seed)
    prompts, responses = rng.integers(1, 5), rng.integers(2, 6)
    dim, pairs = rng.integers(1, 5), rng.integers(1, 8)
    left = rng.integers(responses, size=pairs)
    return Policy(
        features=rng.standard_normal((prompts, responses, dim)),
        labels=rng.dirichlet(np.ones(responses), size=prompts),
        prompt=rng.integers(prompts, size=pairs),
        left=left,
        right=(left + rng.integers(1, responses, size=pairs)) % responses,
        preference=rng.uniform(0.02, 0.98, size=pairs),
        beta=float(rng.uniform(0.1, 2.0)),
        theta_ref=rng.standard_normal(dim),
    )


def random_quadratic(seed: int) -> Quadratic:
    rng = np.random.default_rng(seed)
    dim = int(rng.integers(1, 6))
    root = rng.standard_normal((dim, dim))
    return Quadratic(root @ root.T + 0.1 * np.eye(dim), rng.standard_normal(dim), 0.7)


def random_objective(kind: str, seed: int) -> StochasticObjective:
    if kind == "quadratic":
        return random_quadratic(seed)
    policy = random_policy(seed)
    return policy.dpo() if kind == "logistic" else policy.sft()


def random_sum(seed: int) -> WeightedSum:
    policy = random_policy(seed)
    return WeightedSum((policy.dpo(), policy.sft()), (0.3, 0.7))


def random_theta(seed: int, dim: int) -> Array:
    return np.random.default_rng([seed, 1]).standard_normal(dim)


def all_samples(objective: StochasticObjective) -> tuple[Array, Array]:
    """Draws that visit every sample once, and the probability of each: (n, 2) and (n,).

    u_0 is the midpoint of the index's cell [i/n, (i+1)/n), u_1 the midpoint of the label's cell.
    """
    if isinstance(objective, LogisticDPO):
        cells = np.stack([objective.preference, 1.0 - objective.preference], axis=1)
    else:
        assert isinstance(objective, SoftmaxSFT)
        cells = objective.labels
    count, labels = cells.shape
    index = np.repeat((np.arange(count) + 0.5) / count, labels)
    middle = np.cumsum(cells, axis=1) - cells / 2
    return np.stack([index, middle.ravel()], axis=1), cells.ravel() / count


def random_draws(objective: StochasticObjective, seed: int, count: int) -> Array:
    """`count` draws of the kind the objective takes: (count, width)."""
    return objective.draws((seed,), Stream.DPO_SAMPLE, 0)[0, :count]


# --- derivatives against finite differences


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=30)
@given(seed=SEEDS)
def test_derivatives_match_finite_differences(kind: str, seed: int) -> None:
    objective = random_objective(kind, seed)
    theta = random_theta(seed, objective.dim)
    assert_gradient_matches_finite_differences(objective, theta)
    assert_hessian_matches_finite_differences(objective, theta)


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_derivatives_of_a_weighted_sum_match_finite_differences(seed: int) -> None:
    objective = random_sum(seed)
    theta = random_theta(seed, objective.dim)
    assert_gradient_matches_finite_differences(objective, theta)
    assert_hessian_matches_finite_differences(objective, theta)


@pytest.mark.parametrize("name", PROBLEMS)
def test_derivatives_of_the_named_problems_match_finite_differences(name: str) -> None:
    problem = make_problem(name)
    theta = random_theta(0, problem.dim)
    for objective in (*problem.objectives, problem.mix(0.3)):
        assert_gradient_matches_finite_differences(objective, theta)
        assert_hessian_matches_finite_differences(objective, theta)


# --- against torch autograd, from the definitions of the losses


def torch_losses(policy: Policy) -> dict[str, Any]:
    """Both losses from log-probabilities of policy and reference, as a trainer computes them."""
    torch = pytest.importorskip("torch")
    features, labels = torch.tensor(policy.features), torch.tensor(policy.labels)
    preference = torch.tensor(policy.preference)
    reference = torch.log_softmax(features @ torch.tensor(policy.theta_ref), dim=-1)

    def sft(theta: Any) -> Any:
        log_probs = torch.log_softmax(features @ theta, dim=-1)
        return -(labels * log_probs).sum(dim=-1).mean()

    def dpo(theta: Any) -> Any:
        rewards = policy.beta * (torch.log_softmax(features @ theta, dim=-1) - reference)
        chosen, rejected = (rewards[policy.prompt, side] for side in (policy.left, policy.right))
        logsigmoid = torch.nn.functional.logsigmoid
        loss = -preference * logsigmoid(chosen - rejected)
        return (loss - (1.0 - preference) * logsigmoid(rejected - chosen)).mean()

    def mix(theta: Any) -> Any:
        return 0.3 * dpo(theta) + 0.7 * sft(theta)

    return {"logistic": dpo, "softmax": sft, "mix": mix}


def assert_matches_torch(objective: Objective, loss: Any, theta: Array) -> None:
    torch = pytest.importorskip("torch")
    point = torch.tensor(theta, requires_grad=True)
    value = loss(point)
    (gradient,) = torch.autograd.grad(value, point)
    hessian = torch.autograd.functional.hessian(loss, point)
    np.testing.assert_allclose(objective.value(theta), value.item(), rtol=EXACT, atol=EXACT)
    np.testing.assert_allclose(objective.gradient(theta), gradient.numpy(), rtol=0, atol=1e-11)
    np.testing.assert_allclose(objective.hessian(theta), hessian.numpy(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["logistic", "softmax", "mix"])
@settings(deadline=None, max_examples=15)
@given(seed=SEEDS)
def test_losses_match_autograd_of_the_policy_s_log_probabilities(kind: str, seed: int) -> None:
    """The normalisers of DPO cancel at response level; float64, hence 1e-11 on derivatives."""
    policy = random_policy(seed)
    objectives: dict[str, Objective] = {
        "logistic": policy.dpo(),
        "softmax": policy.sft(),
        "mix": random_sum(seed),
    }
    objective = objectives[kind]
    theta = random_theta(seed, objective.dim)
    assert_matches_torch(objective, torch_losses(policy)[kind], theta)


@settings(deadline=None, max_examples=15)
@given(SEEDS)
def test_quadratic_matches_autograd(seed: int) -> None:
    torch = pytest.importorskip("torch")
    objective = random_quadratic(seed)
    matrix, center = torch.tensor(objective.matrix), torch.tensor(objective.center)

    def loss(theta: Any) -> Any:
        return 0.5 * torch.dot(theta - center, torch.mv(matrix, theta - center))

    assert_matches_torch(objective, loss, random_theta(seed, objective.dim))


@settings(deadline=None, max_examples=15)
@given(SEEDS)
def test_sample_losses_and_gradients_match_autograd(seed: int) -> None:
    torch = pytest.importorskip("torch")
    policy = random_policy(seed)
    theta = random_theta(seed, policy.features.shape[2])
    point = torch.tensor(theta, requires_grad=True)

    draws, _ = all_samples(policy.dpo())
    gradients, losses = sample_gradients(policy.dpo(), theta, draws)
    rows = policy.differences
    for sample, (i, sign) in enumerate(itertools.product(range(len(rows)), (1.0, -1.0))):
        margin = policy.beta * torch.tensor(rows[i]) @ (point - torch.tensor(policy.theta_ref))
        loss = -torch.nn.functional.logsigmoid(sign * margin)
        (expected,) = torch.autograd.grad(loss, point)
        np.testing.assert_allclose(losses[sample], loss.item(), rtol=EXACT, atol=EXACT)
        np.testing.assert_allclose(gradients[sample], expected.numpy(), rtol=0, atol=EXACT)

    draws, _ = all_samples(policy.sft())
    gradients, losses = sample_gradients(policy.sft(), theta, draws)
    prompts, responses = policy.labels.shape
    for sample, (x, y) in enumerate(itertools.product(range(prompts), range(responses))):
        loss = -torch.log_softmax(torch.tensor(policy.features[x]) @ point, dim=0)[y]
        (expected,) = torch.autograd.grad(loss, point)
        np.testing.assert_allclose(losses[sample], loss.item(), rtol=EXACT, atol=EXACT)
        np.testing.assert_allclose(gradients[sample], expected.numpy(), rtol=0, atol=EXACT)


# --- convexity


@pytest.mark.parametrize("kind", [*KINDS, "sum"])
@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, scale=st.sampled_from([0.1, 1.0, 10.0, 100.0]))
def test_objectives_are_convex(kind: str, seed: int, scale: float) -> None:
    objective = random_sum(seed) if kind == "sum" else random_objective(kind, seed)
    rng = np.random.default_rng([seed, 2])
    starts, ends = scale * rng.standard_normal((2, 20, objective.dim))
    assert_is_convex_along_segments(objective, starts, ends)
    assert_lies_above_its_tangents(objective, starts, ends)


# --- stochastic gradients


@pytest.mark.parametrize("kind", ["logistic", "softmax"])
@settings(deadline=None, max_examples=40)
@given(seed=SEEDS)
def test_stochastic_gradient_is_unbiased_over_all_samples(kind: str, seed: int) -> None:
    objective = random_objective(kind, seed)
    assert_unbiased(objective, random_theta(seed, objective.dim), *all_samples(objective))


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


def test_opposite_quadratic_draws_average_to_the_gradient() -> None:
    objective = random_quadratic(3)
    theta, z = random_theta(3, objective.dim), random_theta(4, objective.dim)
    gradients, losses = sample_gradients(objective, theta, np.stack([z, -z]))
    scale = np.abs(gradients).max()
    np.testing.assert_allclose(
        gradients.mean(axis=0), objective.gradient(theta), rtol=0, atol=EXACT * scale
    )
    np.testing.assert_allclose(losses.mean(), objective.value(theta), rtol=EXACT)
    np.testing.assert_allclose(gradients[0] - gradients[1], 1.4 * z, rtol=0, atol=EXACT * scale)


def test_the_last_label_takes_the_draws_that_rounding_leaves() -> None:
    """Ten labels of 0.1 add up to 1 - 1e-16: a draw above that still has a label."""
    objective = SoftmaxSFT(np.arange(10.0)[None, :, None], np.full((1, 10), 0.1))
    draws = np.array([[0.5, np.nextafter(1.0, 0.0)], [np.nextafter(1.0, 0.0), 0.95]])
    losses = sample_gradients(objective, np.array([0.3]), draws)[1]
    expected = -response_log_probs(objective.features[0], np.array([0.3]))[9]
    np.testing.assert_allclose(losses, expected, rtol=EXACT)


def test_labels_of_probability_zero_are_never_drawn() -> None:
    labels = np.array([[0.0, 0.5, 0.0, 0.5, 0.0]])
    objective = SoftmaxSFT(np.arange(5.0)[None, :, None], labels)
    edges = [0.0, 0.25, np.nextafter(0.5, 0.0), 0.5, 0.75, np.nextafter(1.0, 0.0)]
    draws = np.array([[0.5, edge] for edge in edges])
    losses = sample_gradients(objective, np.array([0.3]), draws)[1]
    expected = -response_log_probs(objective.features[0], np.array([0.3]))
    np.testing.assert_allclose(losses, expected[[1, 1, 1, 3, 3, 3]], rtol=EXACT)


@pytest.mark.parametrize(("preference", "sign"), [(0.0, -1.0), (1.0, 1.0)])
def test_certain_preferences_always_draw_their_label(preference: float, sign: float) -> None:
    objective = LogisticDPO(np.ones((1, 1)), np.array([preference]), 1.0, np.zeros(1))
    draws = np.array([[0.5, 0.0], [0.5, 0.5], [0.5, np.nextafter(1.0, 0.0)]])
    losses = sample_gradients(objective, np.array([2.0]), draws)[1]
    np.testing.assert_allclose(losses, np.log1p(np.exp(-2.0 * sign)), rtol=EXACT)


# --- the kernel's contract: weights, `out`, `losses`, batches


@pytest.mark.parametrize("kind", KINDS)
def test_weight_zero_leaves_out_untouched_and_the_loss_nan(kind: str) -> None:
    objective = random_objective(kind, 5)
    draws = objective.draws((0,), Stream.DPO_SAMPLE, 0)
    theta = np.stack([random_theta(5, objective.dim)] * 3)
    weights = np.array([[1.0, 0.5], [0.0, 0.5], [2.0, 0.5]])
    out, losses = np.full((3, objective.dim), 7.0), np.full((3, 2), 9.0)
    objective.add_stochastic_gradient(
        theta, weights, 0, draws, np.zeros(3, dtype=np.int64), 0, out, losses
    )
    gradient, loss = sample_gradients(objective, theta[0], draws[0, :1])
    assert out[1].tolist() == [7.0] * objective.dim
    np.testing.assert_array_equal(losses[:, 0], [loss[0], np.nan, loss[0]])
    np.testing.assert_array_equal(losses[:, 1], 9.0)  # the other objective's column
    scale = EXACT * (7.0 + np.abs(gradient).max())
    np.testing.assert_allclose(out[0] - 7.0, gradient[0], rtol=0, atol=scale)  # it adds to `out`
    np.testing.assert_allclose(out[2] - 7.0, 2.0 * gradient[0], rtol=0, atol=scale)


@pytest.mark.parametrize("kind", KINDS)
def test_the_column_chooses_weight_and_loss(kind: str) -> None:
    objective = random_objective(kind, 6)
    theta, draws = random_theta(6, objective.dim), random_draws(objective, 1, 4)
    first = sample_gradients(objective, theta, draws, weight=0.25, column=0)
    second = sample_gradients(objective, theta, draws, weight=0.25, column=1)
    plain = sample_gradients(objective, theta, draws)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(first[0], 0.25 * plain[0], rtol=EXACT, atol=EXACT)
    np.testing.assert_array_equal(first[1], plain[1])  # losses are not weighted


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_one_row_per_seed_and_step(kind: str) -> None:
    objective = random_objective(kind, 8)
    width = objective.dim if kind == "quadratic" else 2
    draws = objective.draws((1, 2, 3), Stream.DPO_SAMPLE, 0)
    assert draws.shape == (3, BLOCK, width)
    np.testing.assert_array_equal(draws[1], objective.draws((2,), Stream.DPO_SAMPLE, 0)[0])
    assert np.any(draws != objective.draws((1, 2, 3), Stream.SFT_SAMPLE, 0))


@pytest.mark.parametrize("kind", [*KINDS, "sum"])
@settings(deadline=None, max_examples=20)
@given(seed=SEEDS)
def test_batched_evaluation_equals_pointwise_evaluation(kind: str, seed: int) -> None:
    objective = random_sum(seed) if kind == "sum" else random_objective(kind, seed)
    theta = np.random.default_rng(seed).standard_normal((2, 3, objective.dim))
    values, gradients = objective.value(theta), objective.gradient(theta)
    assert values.shape == (2, 3)
    assert gradients.shape == theta.shape
    assert np.shape(objective.value(theta[0, 0])) == ()
    for index in np.ndindex(2, 3):
        np.testing.assert_allclose(
            values[index], objective.value(theta[index]), rtol=EXACT, atol=EXACT
        )
        np.testing.assert_allclose(
            gradients[index], objective.gradient(theta[index]), rtol=EXACT, atol=EXACT
        )


# --- constants on the ball


@pytest.mark.parametrize("kind", ["logistic", "softmax"])
@settings(deadline=None, max_examples=30)
@given(seed=SEEDS)
def test_no_sample_gradient_exceeds_m_and_no_curvature_leaves_mu_to_l(kind: str, seed: int) -> None:
    objective = random_objective(kind, seed)
    points = points_in_ball(np.random.default_rng(seed), 12, objective.dim, RADIUS)
    assert_constants_hold(objective, RADIUS, points, all_samples(objective)[0])


@pytest.mark.parametrize("name", ["bernoulli", "toy2d", "softmax"])
def test_constants_of_the_named_problems_hold(name: str) -> None:
    problem = make_problem(name)
    points = points_in_ball(np.random.default_rng(0), 12, problem.dim, problem.radius)
    for objective in problem.objectives:
        assert_constants_hold(objective, problem.radius, points, all_samples(objective)[0])
        assert objective.constants(problem.radius).strong_convexity > 0.0


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_quadratic_second_moment_is_at_most_m_squared(seed: int) -> None:
    """E|g|^2 = |grad f|^2 + sigma^2 d. L and mu are the extreme eigenvalues, everywhere."""
    objective = random_quadratic(seed)
    constants = objective.constants(RADIUS)
    points = points_in_ball(np.random.default_rng(seed), 50, objective.dim, RADIUS)
    second = np.sum(objective.gradient(points) ** 2, axis=1) + 0.49 * objective.dim
    assert np.all(second <= constants.gradient_norm**2 * (1.0 + EXACT))
    eigenvalues = np.linalg.eigvalsh(objective.hessian(points[0]))
    np.testing.assert_allclose(
        [constants.strong_convexity, constants.smoothness], eigenvalues[[0, -1]], rtol=EXACT
    )


@settings(deadline=None, max_examples=50)
@given(SEEDS)
def test_constants_are_at_most_those_of_the_feature_norm(seed: int) -> None:
    """M_DPO <= 2 beta Phi, L_DPO <= beta^2 Phi^2, M_SFT <= 2 Phi, L_SFT <= Phi^2."""
    policy = random_policy(seed)
    beta, phi = policy.beta, policy.phi
    dpo, sft = policy.dpo().constants(RADIUS), policy.sft().constants(RADIUS)
    slack = 1.0 + EXACT
    assert dpo.gradient_norm <= 2.0 * beta * phi * slack
    assert dpo.smoothness <= beta**2 * phi**2 * slack
    assert sft.gradient_norm <= 2.0 * phi * slack
    assert sft.smoothness <= phi**2 * slack


def test_feature_norm_constants_are_attained_by_opposite_features() -> None:
    """Two responses at +-Phi: the bounds by Phi are then equalities."""
    features = np.array([[[1.5], [-1.5]]])
    dpo = LogisticDPO(features[:, 0] - features[:, 1], np.array([0.5]), 0.4, np.zeros(1))
    sft = SoftmaxSFT(features, np.array([[0.5, 0.5]]))
    np.testing.assert_allclose(dpo.constants(1.0)[:2], [2 * 0.4 * 1.5, 0.4**2 * 1.5**2], rtol=EXACT)
    np.testing.assert_allclose(sft.constants(1.0)[:2], [2 * 1.5, 1.5**2], rtol=EXACT)


def test_constants_are_plain_floats() -> None:
    for kind in KINDS:
        assert all(type(c) is float for c in random_objective(kind, 9).constants(RADIUS))


# --- extremes


@pytest.mark.parametrize("kind", ["logistic", "softmax"])
@settings(deadline=None, max_examples=20)
@given(seed=SEEDS)
def test_losses_stay_finite_far_out(kind: str, seed: int) -> None:
    """|theta| = 1e4: no overflow (a warning is an error), and the value of the linear limit.

    softplus(s) - max(s, 0) and logsumexp(l) - max(l) lie in [0, log n].
    """
    objective = random_objective(kind, seed)
    direction = random_theta(seed, objective.dim)
    theta = 1e4 * direction / np.linalg.norm(direction)
    value = objective.value(theta)
    assert np.isfinite(value)
    assert np.all(np.isfinite(objective.gradient(theta)))
    assert np.all(np.isfinite(objective.hessian(theta)))
    gradients, losses = sample_gradients(objective, theta, all_samples(objective)[0])
    assert np.all(np.isfinite(gradients))
    assert np.all(np.isfinite(losses))

    if isinstance(objective, LogisticDPO):
        margins = objective.beta * objective.differences @ (theta - objective.theta_ref)
        limit = np.mean(np.maximum(margins, 0.0) - objective.preference * margins)
        slack = np.log(2.0)
    else:
        assert isinstance(objective, SoftmaxSFT)
        logits = objective.features @ theta
        limit = np.mean(logits.max(axis=1) - np.sum(objective.labels * logits, axis=1))
        slack = np.log(logits.shape[1])
    assert limit - 1e-8 <= value <= limit + slack + 1e-8  # values of 1e4 with eps 2e-16: 1e-11


# --- SFT's entropy, response log-probabilities


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_sft_loss_is_at_least_the_entropy_of_the_labels(seed: int) -> None:
    objective = random_policy(seed).sft()
    points = 5.0 * np.random.default_rng(seed).standard_normal((20, objective.dim))
    assert np.all(objective.value(points) >= objective.entropy() - EXACT)


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_sft_loss_of_the_demonstrating_policy_is_the_entropy(seed: int) -> None:
    features = random_policy(seed).features
    theta = random_theta(seed, features.shape[2])
    objective = SoftmaxSFT(features, np.exp(response_log_probs(features, theta)))
    np.testing.assert_allclose(objective.value(theta), objective.entropy(), rtol=EXACT, atol=EXACT)
    np.testing.assert_allclose(objective.gradient(theta), 0.0, rtol=0, atol=EXACT)


def test_entropy_of_a_certain_label_is_zero() -> None:
    assert SoftmaxSFT(np.zeros((1, 2, 1)), np.array([[1.0, 0.0]])).entropy() == 0.0


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_response_log_probs_are_normalised_and_differ_by_logits(seed: int) -> None:
    features = random_policy(seed).features
    theta = random_theta(seed, features.shape[2])
    log_probs = response_log_probs(features, theta)
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=-1), 1.0, rtol=EXACT)
    logits = features @ theta
    np.testing.assert_allclose(
        log_probs - log_probs[:, :1], logits - logits[:, :1], rtol=0, atol=EXACT * 10
    )
