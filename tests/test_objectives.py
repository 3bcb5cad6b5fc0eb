"""The objectives against finite differences, torch autograd and enumeration of every sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from _asserts import (
    EXACT,
    assert_constants_hold,
    assert_gradient_matches_finite_differences,
    assert_hessian_matches_finite_differences,
    assert_is_convex_along_segments,
    assert_lies_above_its_tangents,
    points_in_ball,
    sample_gradients,
)
from _instances import (
    POLICIES,
    SEEDS,
    WITH_SUM,
    all_samples,
    random_function,
    random_objective,
    random_policy,
    random_quadratic,
    random_theta,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from theory.objectives import (
    LogisticDPO,
    SoftmaxSFT,
    response_log_probs,
)
from theory.problems import PROBLEMS, make_problem

Array = NDArray[np.float64]

RADIUS = 3.0

# --- derivatives against finite differences


@WITH_SUM
@settings(deadline=None, max_examples=30)
@given(seed=SEEDS)
def test_derivatives_match_finite_differences(kind: str, seed: int) -> None:
    objective = random_function(kind, seed)
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


def torch_losses(seed: int) -> dict[str, Any]:
    """All losses from their definitions; of a policy and a reference as a trainer computes them."""
    torch = pytest.importorskip("torch")
    policy, quadratic = random_policy(seed), random_quadratic(seed)
    features, labels = torch.tensor(policy.features), torch.tensor(policy.labels)
    preference = torch.tensor(policy.preference)
    reference = torch.log_softmax(features @ torch.tensor(policy.theta_ref), dim=-1)
    matrix, center = torch.tensor(quadratic.matrix), torch.tensor(quadratic.center)

    def based(theta: Any) -> Any:
        own = policy.based()
        labels = torch.tensor(own.labels)
        log_probs = torch.log_softmax(features @ theta + torch.tensor(own.log_base), dim=-1)
        return -torch.where(labels > 0.0, labels * log_probs, 0.0).sum(dim=-1).mean()

    def sft(theta: Any) -> Any:
        log_probs = torch.log_softmax(features @ theta, dim=-1)
        return -(labels * log_probs).sum(dim=-1).mean()

    def dpo(theta: Any) -> Any:
        rewards = policy.beta * (torch.log_softmax(features @ theta, dim=-1) - reference)
        chosen, rejected = (rewards[policy.prompt, side] for side in (policy.left, policy.right))
        logsigmoid = torch.nn.functional.logsigmoid
        loss = -preference * logsigmoid(chosen - rejected)
        return (loss - (1.0 - preference) * logsigmoid(rejected - chosen)).mean()

    return {
        "logistic": dpo,
        "softmax": sft,
        "based": based,
        "sum": lambda theta: 0.3 * dpo(theta) + 0.7 * sft(theta),
        "quadratic": lambda theta: 0.5 * (theta - center) @ matrix @ (theta - center),
    }


@WITH_SUM
@settings(deadline=None, max_examples=15)
@given(seed=SEEDS)
def test_losses_match_autograd_of_their_definitions(kind: str, seed: int) -> None:
    """The normalisers of DPO cancel at response level; float64, hence 1e-11 on derivatives."""
    torch = pytest.importorskip("torch")
    objective, loss = random_function(kind, seed), torch_losses(seed)[kind]
    theta = random_theta(seed, objective.dim)
    point = torch.tensor(theta, requires_grad=True)
    value = loss(point)
    (gradient,) = torch.autograd.grad(value, point)
    hessian = torch.autograd.functional.hessian(loss, point)
    np.testing.assert_allclose(objective.value(theta), value.item(), rtol=EXACT, atol=EXACT)
    np.testing.assert_allclose(objective.gradient(theta), gradient.numpy(), rtol=0, atol=1e-11)
    np.testing.assert_allclose(objective.hessian(theta), hessian.numpy(), rtol=0, atol=1e-11)


# --- convexity


@WITH_SUM
@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, scale=st.sampled_from([0.1, 1.0, 10.0, 100.0]))
def test_objectives_are_convex(kind: str, seed: int, scale: float) -> None:
    objective = random_function(kind, seed)
    rng = np.random.default_rng([seed, 2])
    starts, ends = scale * rng.standard_normal((2, 20, objective.dim))
    assert_is_convex_along_segments(objective, starts, ends)
    assert_lies_above_its_tangents(objective, starts, ends)


@WITH_SUM
@settings(deadline=None, max_examples=20)
@given(seed=SEEDS)
def test_batched_evaluation_equals_pointwise_evaluation(kind: str, seed: int) -> None:
    objective = random_function(kind, seed)
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


@POLICIES
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
    assert all(type(constant) is float for constant in constants)
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
def test_sft_loss_is_least_at_the_demonstrating_policy_where_it_is_the_entropy(seed: int) -> None:
    objective = random_policy(seed).sft()
    points = 5.0 * np.random.default_rng(seed).standard_normal((20, objective.dim))
    assert np.all(objective.value(points) >= objective.entropy() - EXACT)
    theta = random_theta(seed, objective.dim)
    own = SoftmaxSFT(objective.features, np.exp(response_log_probs(objective.features, theta)))
    np.testing.assert_allclose(own.value(theta), own.entropy(), rtol=EXACT, atol=EXACT)
    np.testing.assert_allclose(own.gradient(theta), 0.0, rtol=0, atol=EXACT)


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
