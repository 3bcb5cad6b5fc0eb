"""Named problem instances: a DPO and an SFT objective in conflict, on one ball.

Every instance has stochastic labels with both preference orders, so that its minimisers lie inside
the ball; `tests/test_problems.py` asserts it. Separable data would put them on the boundary.

Besides the names in `PROBLEMS`, the path of a file that `python -m llm.features` wrote (FILE.npz)
names a problem: the features of a real model on real text. So does `package.module:function`, a
function of your own that returns a `Problem`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, rel_entr, softmax

from theory import checks
from theory.feature_file import FeatureFile, is_feature_file
from theory.foreign import is_foreign, load_object
from theory.objectives import LogisticDPO, Quadratic, SoftmaxSFT, StochasticObjective, WeightedSum
from theory.randomness import Stream, generator
from theory.schedulers import objective_weights
from theory.tasks import Task

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Problem:
    """Two objectives on the ball of radius `radius`, with a start and a default step size.

    `objectives` is ordered as `Task`: (DPO, SFT). `step_scale` is the default c of
    alpha_t = c / sqrt(t). `minimisers` holds closed-form minimisers of the two, where known.
    """

    name: str
    objectives: tuple[StochasticObjective, StochasticObjective]
    radius: float
    step_scale: float
    minimisers: tuple[Array, Array] | None = None
    mix_gap_limit: Callable[[Task, float], float] | None = None
    """(last objective, lam) -> G_Mix of the sequential limit, where a closed form is known."""
    start: Array = None  # type: ignore[assignment]
    """theta_0 in the ball. Without one 0: for the softmax problems pi_0, the base policy."""

    def __post_init__(self) -> None:
        objectives = _objectives(self.objectives)
        dim = objectives[0].dim
        radius = checks.number("radius", self.radius)
        start = checks.array("start", np.zeros(dim) if self.start is None else self.start, d=dim)
        if (norm := np.linalg.norm(start)) > radius * (1.0 + checks.ROUNDING):
            raise ValueError(f"start lies at |theta| = {norm:g}, outside the ball of {radius:g}")
        checks.assign(self, objectives=objectives, radius=radius, start=start)
        checks.assign(self, step_scale=checks.number("step_scale", self.step_scale))
        if self.minimisers is not None:
            dpo, sft = (checks.array("minimisers", theta, d=dim) for theta in self.minimisers)
            checks.assign(self, minimisers=(dpo, sft))

    @property
    def dim(self) -> int:
        return self.objectives[0].dim

    def mix(self, lam: float) -> WeightedSum:
        """f_Mix = lam f_DPO + (1 - lam) f_SFT."""
        return WeightedSum(self.objectives, objective_weights(lam).tolist())

    def losses(self, theta: Array) -> Array:
        """(f_DPO, f_SFT) on the last axis: theta (..., d) -> (..., 2)."""
        return np.stack([f.value(theta) for f in self.objectives], axis=-1)


def _objectives(given: Iterable[Any]) -> tuple[StochasticObjective, StochasticObjective]:
    objectives = tuple(given)
    for objective in objectives:
        if not isinstance(objective, StochasticObjective):
            kind = type(objective).__name__
            raise ValueError(f"an objective is a {kind}; derive it from StochasticObjective")
    if len(objectives) != len(Task):
        raise ValueError(f"there are {len(objectives)} objectives; give two, (DPO, SFT)")
    dpo, sft = objectives
    if dpo.dim != sft.dim:
        raise ValueError(f"the objectives have different dimensions: {dpo.dim} and {sft.dim}")
    return dpo, sft


def bernoulli(p: float = 0.9, q: float = 0.1, beta: float = 1.0, radius: float = 4.0) -> Problem:
    """One prompt, two responses A and B, phi(A) - phi(B) = 1, theta a number (BernPair).

    A is preferred with frequency p and demonstrated with frequency q:
    delta_DPO = KL(p || sigmoid(beta theta)), delta_SFT = KL(q || sigmoid(theta)). For beta = 1 and
    m = lam p + (1 - lam) q, f_Mix is the cross-entropy of m, so that the sequential limits are
    G_Mix = KL(m || q) >= 2 lam^2 (p - q)^2 when SFT comes last and KL(m || p) when DPO does
    (Pinsker): the lower-bound theorem of arXiv 2410.15483 in one line.
    """
    for name, value in (("p", p), ("q", q)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name} is {value}; it must lie strictly between 0 and 1")
    minimisers = (np.array([logit(p) / beta]), np.array([logit(q)]))
    outermost = max(abs(theta.item()) for theta in minimisers)
    if outermost >= radius:
        raise ValueError(
            f"a minimiser lies at |theta| = {outermost:.2f}: radius must exceed it, not {radius}"
        )
    dpo = LogisticDPO(np.ones((1, 1)), np.array([p]), beta, np.zeros(1))
    sft = SoftmaxSFT(np.array([[[1.0], [0.0]]]), np.array([[q, 1.0 - q]]))

    def limit(last: Task, lam: float) -> float:
        target = q if last == Task.SFT else p
        return bernoulli_kl(lam * p + (1.0 - lam) * q, target)

    return Problem(
        name="bernoulli",
        objectives=(dpo, sft),
        radius=radius,
        step_scale=4.0,
        minimisers=minimisers,
        mix_gap_limit=limit if beta == 1.0 else None,
    )


def quadratic(dim: int = 5, noise: float = 0.5, distance: float = 2.0, seed: int = 0) -> Problem:
    """Two strongly convex quadratics whose Hessians do not commute.

    H_i has eigenvalues from 0.5 to 2 in a random basis; the minimisers are `distance` apart, on
    opposite sides of 0. With H = lam H_1 + (1 - lam) H_2 and D = theta_1* - theta_2*, the
    sequential limit (SFT last) is lam^2 D' H_1 H^-1 H_1 D / 2; symmetrically for DPO last.
    """
    if distance < 0.0:
        raise ValueError(f"distance is {distance}; it must not be negative")
    rng = generator(seed, Stream.PROBLEM)
    bases = [np.linalg.qr(rng.standard_normal((dim, dim)))[0] for _ in Task]
    matrices = [(basis * np.geomspace(0.5, 2.0, dim)) @ basis.T for basis in bases]
    direction = rng.standard_normal(dim)
    half = 0.5 * distance * direction / np.linalg.norm(direction)
    dpo, sft = (
        Quadratic(_symmetric(h), c, noise) for h, c in zip(matrices, (half, -half), strict=True)
    )

    def limit(last: Task, lam: float) -> float:
        weights = objective_weights(lam)
        matrix = lam * dpo.matrix + (1.0 - lam) * sft.matrix
        abandoned = (dpo, sft)[last.other]
        pull = abandoned.matrix @ (dpo.center - sft.center)
        return float(weights[last.other] ** 2 * pull @ np.linalg.solve(matrix, pull) / 2)

    return Problem(
        name="quadratic",
        objectives=(dpo, sft),
        radius=2.0 * max(distance, 1.0),
        step_scale=1.0,
        minimisers=(dpo.center, sft.center),
        mix_gap_limit=limit,
    )


def toy2d(beta: float = 1.0) -> Problem:
    """Two parameters, so that paths can be drawn over the contours of f_Mix.

    Four responses at the corners of the square. The demonstrations favour the right-hand
    corners and, less, the upper ones; the preferences favour the left-hand and, more, the upper.
    """
    corners = np.array([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
    demonstrated, preferred = np.array([1.1, 0.2]), np.array([-0.7, 1.2])
    left, right = np.triu_indices(len(corners), k=1)
    differences = corners[left] - corners[right]
    dpo = LogisticDPO(differences, expit(beta * differences @ preferred), beta, np.zeros(2))
    sft = SoftmaxSFT(corners[None], softmax(corners @ demonstrated)[None])
    return Problem(
        name="toy2d",
        objectives=(dpo, sft),
        radius=4.0,
        step_scale=1.0,
        minimisers=(preferred, demonstrated),
    )


def softmax_problem(
    dim: int = 20,
    responses: int = 10,
    prompts: int = 50,
    pairs_per_prompt: int = 4,
    beta: float = 1.0,
    conflict: float = 0.5,
    seed: int = 0,
) -> Problem:
    """Random softmax policy on random features of norm 1, misspecified labels.

    Demonstrations come from a softmax policy with parameter a, blended with 10% random responses;
    preferences from a Bradley-Terry model with parameter b, blended with 10% coin flips.
    cos(a, b) = -conflict, |a| = |b| = 3.
    """
    if not -1.0 <= conflict <= 1.0:
        raise ValueError(f"conflict is {conflict}; it must lie in [-1, 1]")
    rng = generator(seed, Stream.PROBLEM)
    features = rng.standard_normal((prompts, responses, dim))
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    basis = np.linalg.qr(rng.standard_normal((dim, 2)))[0].T
    demonstrated = 3.0 * basis[0]
    preferred = 3.0 * (-conflict * basis[0] + np.sqrt(1.0 - conflict**2) * basis[1])

    random_labels = rng.dirichlet(np.ones(responses), size=prompts)
    labels = 0.9 * softmax(features @ demonstrated, axis=1) + 0.1 * random_labels
    left, right = _random_pairs(rng, prompts, responses, pairs_per_prompt)
    prompt = np.repeat(np.arange(prompts), pairs_per_prompt)
    differences = features[prompt, left] - features[prompt, right]
    preference = 0.9 * expit(beta * differences @ preferred) + 0.05
    return Problem(
        name="softmax",
        objectives=(
            LogisticDPO(differences, preference, beta, np.zeros(dim)),
            SoftmaxSFT(features, labels),
        ),
        radius=10.0,
        step_scale=4.0,
    )


def feature_problem(path: str) -> Problem:
    """The log-linear policy pi_0(y|x) exp(theta . phi(x, y)) on the candidates in a .npz file.

    f_DPO compares the candidates 0 and 1 of each preference prompt (the reference is pi_0, so that
    log pi_0 cancels), f_SFT scores the labels of each SFT prompt. `theory.feature_file` has the
    fields; a missing or damaged file is a `UserError`.
    """
    return problem_from_features(FeatureFile.load(path), name=path)


def problem_from_features(data: FeatureFile, name: str) -> Problem:
    differences = data.dpo_features[:, 0] - data.dpo_features[:, 1]
    return Problem(
        name=name,
        objectives=(
            LogisticDPO(differences, data.preference, data.beta, np.zeros(data.dim)),
            SoftmaxSFT(data.sft_features, data.sft_labels, data.sft_log_base),
        ),
        radius=data.radius,
        step_scale=data.step_scale,
    )


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "bernoulli": bernoulli,
    "quadratic": quadratic,
    "toy2d": toy2d,
    "softmax": softmax_problem,
}


def make_problem(name: str, **parameters: Any) -> Problem:
    """Build a problem by name, from a file or by a function of your own (package.module:function).

    Raises:
        ValueError: in one line, for an unknown name or parameter, a file that is none of
            `theory.feature_file`, or a function that cannot be had, fails or returns no `Problem`.
    """
    build = _builder(name)
    try:
        signature = inspect.signature(build)
        signature.bind(**parameters)
    except TypeError as error:
        known = ", ".join(signature.parameters) or "none"
        raise ValueError(f"problem {name!r}: {error} (its parameters: {known})") from error
    return _called(name, build, parameters) if is_foreign(name) else build(**parameters)


def _builder(name: str) -> Callable[..., Problem]:
    if is_feature_file(name):
        return lambda: feature_problem(name)
    if name in PROBLEMS:
        return PROBLEMS[name]
    if not is_foreign(name):
        known = ", ".join(PROBLEMS)
        raise ValueError(
            f"unknown problem {name!r}; choose from {known}, or give a .npz file or "
            "package.module:function"
        )
    build = load_object(name)
    if not callable(build):
        raise ValueError(f"problem {name!r} is no function")
    return cast(Callable[..., Problem], build)


def _called(name: str, build: Callable[..., Any], parameters: dict[str, Any]) -> Problem:
    try:
        problem = build(**parameters)
    except Exception as error:  # whatever a stranger's function raises
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"problem {name!r} failed: {said}") from error
    if not isinstance(problem, Problem):
        kind = type(problem).__name__
        raise ValueError(f"problem {name!r} returns a {kind}, not a theory.problems.Problem")
    return problem


def short_name(problem: str) -> str:
    """A problem's name in titles and file names: a feature file's stem, a function's own name."""
    return Path(problem.rpartition(":")[2]).stem


def bernoulli_kl(a: float, b: float) -> float:
    """KL(Bernoulli(a) || Bernoulli(b)) in nats."""
    return float(rel_entr(a, b) + rel_entr(1.0 - a, 1.0 - b))


def _random_pairs(
    rng: np.random.Generator, prompts: int, responses: int, pairs: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`pairs` pairs of two different responses for each prompt, flattened prompt by prompt."""
    left = rng.integers(responses, size=prompts * pairs)
    right = (left + rng.integers(1, responses, size=prompts * pairs)) % responses
    return left, right


def _symmetric(matrix: Array) -> Array:
    return 0.5 * (matrix + matrix.T)
