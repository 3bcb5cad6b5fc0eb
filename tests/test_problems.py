"""The named instances: interior minimisers, closed forms, lower bounds, and their parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from _asserts import EXACT, assert_one_line_error, points_in_ball
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit, rel_entr

from theory.objectives import LogisticDPO, Quadratic, SoftmaxSFT
from theory.optima import problem_optima
from theory.problems import (
    PROBLEMS,
    Problem,
    bernoulli,
    bernoulli_kl,
    make_problem,
    quadratic,
    softmax_problem,
    toy2d,
)
from theory.tasks import Task

TASKS = pytest.mark.parametrize("last", list(Task))
PROBABILITIES = st.floats(0.05, 0.95)  # |logit| < 3: inside the ball of radius 4
LAM = st.floats(0.01, 0.99)

# A certificate of 1e-8 bounds the value; Newton's end points have gradients of 1e-13, so that the
# optima themselves are good to rounding.
VALUE = 1e-10

INSTANCES: dict[str, Any] = {
    "bernoulli": bernoulli,
    "bernoulli skewed": lambda: bernoulli(p=0.3, q=0.8, beta=0.5),
    "toy2d": toy2d,
    "toy2d beta 0.3": lambda: toy2d(beta=0.3),
    **{f"quadratic {seed}": lambda seed=seed: quadratic(seed=seed) for seed in range(4)},
    "quadratic 20-d": lambda: quadratic(dim=20, distance=0.5),
    **{f"softmax {seed}": lambda seed=seed: softmax_problem(seed=seed) for seed in range(3)},
    "softmax small": lambda: softmax_problem(dim=4, responses=3, prompts=12, conflict=0.9),
}
CLOSED_FORM = ["bernoulli", *(f"quadratic {seed}" for seed in range(4)), "quadratic 20-d"]
EVERY_INSTANCE = pytest.mark.parametrize("instance", INSTANCES)


def mix_gap(problem: Problem, theta: np.ndarray, lam: float) -> float:
    optimum = problem_optima(problem).mix(lam).value
    return float(problem.mix(lam).value(theta)) - optimum


# --- minimisers


@EVERY_INSTANCE
def test_minimisers_are_interior(instance: str) -> None:
    """Stationary points strictly inside: no instance is separable."""
    problem = INSTANCES[instance]()
    optima = problem_optima(problem)
    for objective, optimum in zip(problem.objectives, optima.single, strict=True):
        assert optimum.interior
        assert np.linalg.norm(optimum.theta) < 0.95 * problem.radius
        assert np.linalg.norm(objective.gradient(optimum.theta)) < VALUE
    for lam in (0.05, 0.5, 0.95):
        assert optima.mix(lam).interior
        assert optima.max(lam).interior


@EVERY_INSTANCE
def test_closed_form_minimisers_are_the_certified_ones(instance: str) -> None:
    problem = INSTANCES[instance]()
    if problem.minimisers is None:
        assert problem.name == "softmax"
        return
    for closed, optimum in zip(problem.minimisers, problem_optima(problem).single, strict=True):
        # Gradients of 1e-13 over curvatures of 1e-2 and more.
        np.testing.assert_allclose(closed, optimum.theta, rtol=0, atol=1e-9)


@EVERY_INSTANCE
def test_the_two_objectives_conflict(instance: str) -> None:
    problem = INSTANCES[instance]()
    dpo, sft = problem_optima(problem).single
    losses = problem.losses(np.stack([dpo.theta, sft.theta]))
    assert losses[1, Task.DPO] - losses[0, Task.DPO] > 1e-3
    assert losses[0, Task.SFT] - losses[1, Task.SFT] > 1e-3


@EVERY_INSTANCE
def test_losses_are_the_objectives_in_task_order_and_f_mix_their_mean(instance: str) -> None:
    problem = INSTANCES[instance]()
    theta = points_in_ball(np.random.default_rng(0), 6, problem.dim, problem.radius)
    losses = problem.losses(theta)
    assert losses.shape == (6, 2)
    for task in Task:
        np.testing.assert_array_equal(losses[:, task], problem.objectives[task].value(theta))
    mix = 0.3 * losses[:, Task.DPO] + 0.7 * losses[:, Task.SFT]
    np.testing.assert_allclose(problem.mix(0.3).value(theta), mix, rtol=EXACT)
    assert problem.start.tolist() == [0.0] * problem.dim


# --- bernoulli


@settings(deadline=None, max_examples=50)
@given(PROBABILITIES, PROBABILITIES, st.floats(0.2, 2.0), st.floats(-4.0, 4.0))
def test_bernoulli_gaps_are_kl_divergences(p: float, q: float, beta: float, theta: float) -> None:
    """delta_DPO = KL(p || sigmoid(beta theta)), delta_SFT = KL(q || sigmoid(theta))."""
    problem = bernoulli(p, q, beta, radius=100.0)
    losses = problem.losses(np.array([theta]))
    entropies = [-a * np.log(a) - (1 - a) * np.log(1 - a) for a in (p, q)]
    divergences = [bernoulli_kl(p, expit(beta * theta)), bernoulli_kl(q, expit(theta))]
    np.testing.assert_allclose(losses - entropies, divergences, rtol=0, atol=EXACT)
    assert problem.minimisers is not None
    at_minimisers = [
        float(f.value(m)) for f, m in zip(problem.objectives, problem.minimisers, strict=True)
    ]
    np.testing.assert_allclose(at_minimisers, entropies, rtol=0, atol=EXACT)


@given(PROBABILITIES, PROBABILITIES)
def test_bernoulli_kl_is_the_relative_entropy(a: float, b: float) -> None:
    assert bernoulli_kl(a, b) == pytest.approx(
        a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b)), abs=EXACT
    )
    assert bernoulli_kl(a, a) == 0.0


def test_bernoulli_limit_is_claimed_for_beta_1_only() -> None:
    assert bernoulli(beta=0.5, radius=6.0).mix_gap_limit is None


@pytest.mark.parametrize("parameters", [{"p": 0.99}, {"q": 0.001}, {"p": 0.9, "beta": 0.5}])
def test_a_bernoulli_closed_form_is_that_of_the_ball_or_refused(parameters: Any) -> None:
    """|logit(p)/beta| > R: the minimiser on the ball is not the free one."""
    try:
        problem = bernoulli(**parameters)
    except ValueError:
        return
    for task, optimum in zip(Task, problem_optima(problem).single, strict=True):
        if problem.minimisers is not None:
            np.testing.assert_allclose(problem.minimisers[task], optimum.theta, atol=1e-9)
        if problem.mix_gap_limit is not None:
            limit = problem.mix_gap_limit(task, 0.5)
            assert limit == pytest.approx(mix_gap(problem, optimum.theta, 0.5), abs=VALUE)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.2, 1.5, float("nan")])
@pytest.mark.parametrize("name", ["p", "q"])
def test_bernoulli_probabilities_lie_strictly_between_0_and_1(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} is .*strictly between 0 and 1") as error:
        bernoulli(**{name: value})
    assert_one_line_error(str(error.value))


# --- limits of sequential training


@TASKS
@pytest.mark.parametrize("instance", CLOSED_FORM)
def test_the_limit_formula_is_the_gap_at_the_last_objective_s_minimiser(
    instance: str, last: Task
) -> None:
    problem = INSTANCES[instance]()
    assert problem.mix_gap_limit is not None
    assert problem.minimisers is not None
    for lam in np.linspace(0.0, 1.0, 21):
        gap = mix_gap(problem, problem.minimisers[last], float(lam))
        assert problem.mix_gap_limit(last, float(lam)) == pytest.approx(gap, abs=VALUE)


@settings(deadline=None, max_examples=50)
@given(PROBABILITIES, PROBABILITIES, st.integers(0, 1000), LAM, st.sampled_from(Task))
def test_the_limits_vanish_only_without_conflict(
    p: float, q: float, seed: int, lam: float, last: Task
) -> None:
    def limit(problem: Problem) -> float:
        assert problem.mix_gap_limit is not None
        return problem.mix_gap_limit(last, lam)

    assert limit(bernoulli(p, p)) == pytest.approx(0.0, abs=EXACT)
    assert abs(p - q) <= 1e-3 or limit(bernoulli(p, q)) > 1e-11
    assert limit(quadratic(distance=0.0, seed=seed)) == 0.0
    assert limit(quadratic(distance=1.0, seed=seed)) > 0.0


# --- quadratic, toy2d, softmax


@pytest.mark.parametrize("seed", range(4))
def test_quadratic_is_built_as_documented(seed: int) -> None:
    problem = quadratic(dim=6, noise=0.3, distance=1.6, seed=seed)
    dpo, sft = problem.objectives
    assert isinstance(dpo, Quadratic)
    assert isinstance(sft, Quadratic)
    for objective in (dpo, sft):
        np.testing.assert_array_equal(objective.matrix, objective.matrix.T)
        spectrum = np.linalg.eigvalsh(objective.matrix)
        np.testing.assert_allclose(spectrum, np.geomspace(0.5, 2.0, 6), rtol=EXACT)
        assert objective.noise == 0.3
    assert np.linalg.norm(dpo.center - sft.center) == pytest.approx(1.6, abs=EXACT)
    np.testing.assert_array_equal(dpo.center, -sft.center)
    assert np.abs(dpo.matrix @ sft.matrix - sft.matrix @ dpo.matrix).max() > 0.1


def test_toy2d_stationarity_is_exact() -> None:
    """Its labels come from policies of the class, so both gradients vanish at the parameters."""
    problem = toy2d()
    assert problem.minimisers is not None
    for objective, minimiser in zip(problem.objectives, problem.minimisers, strict=True):
        np.testing.assert_allclose(objective.gradient(minimiser), 0.0, rtol=0, atol=EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_softmax_labels_are_probabilities_that_allow_both_orders(seed: int) -> None:
    problem = softmax_problem(dim=6, responses=5, prompts=9, pairs_per_prompt=3, seed=seed)
    dpo, sft = problem.objectives
    assert isinstance(dpo, LogisticDPO)
    assert isinstance(sft, SoftmaxSFT)
    assert sft.features.shape == (9, 5, 6)
    assert dpo.differences.shape == (27, 6)
    np.testing.assert_allclose(np.linalg.norm(sft.features, axis=-1), 1.0, rtol=EXACT)
    np.testing.assert_allclose(sft.labels.sum(axis=1), 1.0, rtol=EXACT)
    assert sft.labels.min() > 0.0
    # A tenth of coin flips: between .05 and .95.
    assert dpo.preference.min() >= 0.05
    assert dpo.preference.max() <= 0.95
    # Pairs are of two different responses of one prompt.
    assert np.linalg.norm(dpo.differences, axis=1).min() > 0.0
    for pair, difference in enumerate(dpo.differences):
        features = sft.features[pair // 3]
        known = (features[:, None] - features[None]).reshape(-1, 6)
        assert np.abs(known - difference).max(axis=1).min() == 0.0


@pytest.mark.parametrize("conflict", [-1.1, 1.5, float("nan")])
def test_softmax_conflict_is_a_cosine(conflict: float) -> None:
    with pytest.raises(ValueError, match="conflict is") as error:
        softmax_problem(conflict=conflict)
    assert_one_line_error(str(error.value))


@pytest.mark.parametrize("seed", range(3))
def test_more_conflict_means_a_larger_ideal_gap(seed: int) -> None:
    """min f_Mix - (mean of the optima) grows with the angle between the two parameters."""

    def price(conflict: float) -> float:
        optima = problem_optima(softmax_problem(conflict=conflict, seed=seed))
        return optima.mix(0.5).value - float(np.mean(optima.values))

    aligned, orthogonal, opposed = price(-1.0), price(0.0), price(1.0)
    assert 0.0 <= aligned < orthogonal < opposed


@pytest.mark.parametrize("name", ["quadratic", "softmax"])
def test_random_problems_are_a_function_of_their_seed(name: str) -> None:
    first, again = make_problem(name, seed=3), make_problem(name, seed=3)
    theta = np.full(first.dim, 0.3)
    np.testing.assert_array_equal(first.losses(theta), again.losses(theta))
    assert np.any(first.losses(theta) != make_problem(name, seed=4).losses(theta))


# --- registry


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_knows_its_registered_name(name: str) -> None:
    assert make_problem(name).name == name


def test_parameters_reach_the_problem() -> None:
    problem = make_problem("bernoulli", p=0.7, radius=3.0)
    assert problem.radius == 3.0
    assert problem.minimisers is not None
    assert problem.minimisers[Task.DPO] == pytest.approx(logit(0.7))


def test_bernoulli_kl_of_certain_events() -> None:
    assert bernoulli_kl(1.0, 0.5) == pytest.approx(np.log(2.0))
    assert bernoulli_kl(0.0, 0.5) == pytest.approx(np.log(2.0))
    assert bernoulli_kl(0.5, 0.0) == np.inf == rel_entr(0.5, 0.0)
