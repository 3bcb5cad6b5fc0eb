"""Objectives that are not of the package: what runs is their own stochastic gradient, always."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _asserts import EXACT, assert_one_line_error, projected_gradient_descent
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from numpy.typing import NDArray
from scipy.special import expit, softmax

from theory import kernels
from theory.kernels import LogisticData, QuadraticData, SoftmaxData
from theory.objectives import Constants, LogisticDPO, Quadratic, SoftmaxSFT, StochasticObjective
from theory.optima import problem_optima
from theory.problems import PROBLEMS, Problem, make_problem
from theory.randomness import Stream
from theory.schedulers import Alright, Maxright, Mix, Sequential
from theory.scheduling import Scheduler
from theory.simulate import ITERATES, StepSize, simulate

Array = NDArray[np.float64]

# Data of every built-in shape, and of others: plain tuples and the built-in types themselves.
SHAPES: dict[str, Callable[[Array, Array], tuple[Any, ...]]] = {
    "none": lambda a, b: (a, b),
    "logistic": lambda a, b: (a, b, b.copy()),
    "quadratic": lambda a, b: (a, b, 1.0),
    "softmax": lambda a, b: (a[:, None, :].copy(), b[:, None].copy(), b[:, None].copy()),
    "LogisticData": lambda a, b: LogisticData(a, b, b.copy()),
    "QuadraticData": lambda a, b: QuadraticData(a, b, 1.0),
    "SoftmaxData": lambda a, b: SoftmaxData(a[:, None], b[:, None], b[:, None]),
}


def loop_over_runs(theta, weights, column, draws, seed_index, offset, *rest):  # type: ignore[no-untyped-def]
    """Least squares, one row a sample, whatever the shape of the data."""
    rows, targets, out, losses = rest[0], rest[1], rest[-2], rest[-1]
    flat = rows.reshape(rows.shape[0], rows.shape[-1])
    for r in range(theta.shape[0]):
        losses[r, column] = np.nan
        if weights[r, column] != 0.0:
            i = int(draws[seed_index[r], offset, 0] * rows.shape[0])
            residual = -targets.reshape(-1)[i]
            for j in range(theta.shape[1]):
                residual += flat[i, j] * theta[r, j]
            for j in range(theta.shape[1]):
                out[r, j] += weights[r, column] * residual * flat[i, j]
            losses[r, column] = residual**2 / 2


KERNELS = {"numba": njit(loop_over_runs), "python": loop_over_runs}


@dataclass(frozen=True, eq=False)
class LeastSquares(StochasticObjective):
    """mean_i (a_i . theta - b_i)^2 / 2."""

    a: Array
    b: Array

    @property
    def dim(self) -> int:
        return self.a.shape[1]

    def value(self, theta: Array) -> Array:
        return np.mean((theta @ self.a.T - self.b) ** 2, axis=-1) / 2

    def gradient(self, theta: Array) -> Array:
        return (theta @ self.a.T - self.b) @ self.a / len(self.b)

    def hessian(self, theta: Array) -> Array:
        return self.a.T @ self.a / len(self.b)

    def constants(self, radius: float) -> Constants:
        spectrum = np.linalg.eigvalsh(self.hessian(np.zeros(self.dim)))
        norms = np.linalg.norm(self.a, axis=1)
        largest = float(np.max(norms * (radius * norms + np.abs(self.b))))
        return Constants(largest, float(spectrum[-1]), max(float(spectrum[0]), 0.0))


@dataclass(frozen=True, eq=False)
class Compiled(LeastSquares):
    kernel: str = "numba"
    shape: str = "none"

    @property
    def compiled(self) -> tuple[Any, tuple[Any, ...]]:
        return KERNELS[self.kernel], SHAPES[self.shape](self.a, self.b)


class Sampled(LeastSquares):
    def stochastic_gradient(self, theta: Array, draws: Array) -> tuple[Array, Array]:
        i = (draws[:, 0] * len(self.b)).astype(int)
        residual = np.sum(self.a[i] * theta, axis=1) - self.b[i]
        return residual[:, None] * self.a[i], residual**2 / 2


class Added(LeastSquares):
    """Does the bookkeeping itself."""

    def add_stochastic_gradient(self, *arguments: Any) -> None:
        loop_over_runs(*arguments[:6], self.a, self.b, *arguments[6:])


class Heir(LogisticDPO):
    """Inherits a kernel but samples otherwise: always the label +1."""

    def stochastic_gradient(self, theta: Array, draws: Array) -> tuple[Array, Array]:
        rows = self.beta * self.differences[(draws[:, 0] * len(self.differences)).astype(int)]
        margins = np.sum(rows * (theta - self.theta_ref), axis=1)
        return -expit(-margins)[:, None] * rows, np.logaddexp(0.0, -margins)


FOREIGN: dict[str, Callable[[Array, Array], StochasticObjective]] = {
    **{f"{k}, {s}": partial(Compiled, kernel=k, shape=s) for k in KERNELS for s in SHAPES},
    "sampled": Sampled,
    "added": Added,
    "heir": lambda a, b: Heir(a, expit(b), 0.8, np.ones(a.shape[1])),
}
BUILT_IN: dict[str, Callable[[Array, Array], StochasticObjective]] = {
    "logistic": lambda a, b: LogisticDPO(a, expit(b), 0.8, np.ones(a.shape[1])),
    "quadratic": lambda a, b: Quadratic(a.T @ a, a[0], 0.3),
    "softmax": lambda a, b: SoftmaxSFT(
        np.stack([a, -a], axis=1), np.stack([expit(b), expit(-b)], 1)
    ),
}


def slope_of(objective: StochasticObjective, theta: Array, u: Array) -> Array:
    """One stochastic gradient from the definition of its loss: theta (d,), u (width,)."""
    if isinstance(objective, Quadratic):
        return objective.matrix @ (theta - objective.center) + objective.noise * u
    if isinstance(objective, LeastSquares):
        i = int(u[0] * len(objective.b))
        return (objective.a[i] @ theta - objective.b[i]) * objective.a[i]
    if isinstance(objective, LogisticDPO):
        i = int(u[0] * len(objective.differences))
        certain = isinstance(objective, Heir)
        label = 1.0 if certain or u[1] < objective.preference[i] else -1.0
        row = objective.beta * objective.differences[i]
        return -label * expit(-label * row @ (theta - objective.theta_ref)) * row
    assert isinstance(objective, SoftmaxSFT)
    x = int(u[0] * len(objective.features))
    y = int(u[1] >= objective.labels[x, 0])
    return softmax(objective.features[x] @ theta) @ objective.features[x] - objective.features[x, y]


SCHEDULERS: dict[str, Scheduler] = {
    "mix": Mix((0.3, 0.6)),
    "alright": Alright((0.3, 0.6), seed=(1, 2)),
    "sequential": Sequential(20),
    "maxright": Maxright((0.3, 0.6), (0.0, 0.0), refresh_every=3),
}


def assert_path(
    make: Sequence[Callable[[Array, Array], StochasticObjective]],
    schedule: str,
    rows: int,
    dim: int,
    batch: int,
    seed: int,
) -> None:
    """Both runs of a batch end where a NumPy loop over their own samples ends."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, rows, dim)), rng.standard_normal((2, rows))
    dpo, sft = (f(*data) for f, *data in zip(make, a, b, strict=True))
    problem = Problem("own", (dpo, sft), 1.5, 0.4, start=np.full(dim, 0.1))
    scheduler, step_size, seeds = SCHEDULERS[schedule], StepSize(0.4), (5, 9)
    steps = 20 if schedule == "sequential" else 40
    trace = simulate(
        problem, scheduler, num_steps=40, step_size=step_size, seeds=seeds,
        record_steps=[steps], record_weights=True, batch_size=batch,
    )  # fmt: skip
    assert trace.weights is not None
    for run, own in enumerate(seeds):
        streams = (Stream.DPO_SAMPLE, Stream.SFT_SAMPLE)
        draws = [f.draws((own,), s, 0)[0] for f, s in zip(problem.objectives, streams, strict=True)]

        def slope(t: int, i: int, theta: Array, draws: list[Array] = draws) -> Array:
            samples = draws[i][t * batch : (t + 1) * batch]
            return np.mean([slope_of(problem.objectives[i], theta, u) for u in samples], axis=0)

        weights = trace.weights[:steps, run].tolist()
        end = projected_gradient_descent(problem, weights, step_size, problem.start, slope)
        for iterate in ITERATES:
            found = trace.theta[iterate][0, run]
            np.testing.assert_allclose(found, end[iterate], rtol=0, atol=10 * EXACT)


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(sorted(FOREIGN)),
    st.sampled_from(sorted(FOREIGN | BUILT_IN)),
    st.booleans(),
    st.tuples(
        st.sampled_from(sorted(SCHEDULERS)),
        st.integers(1, 5),
        st.integers(1, 4),
        st.sampled_from([1, 3]),
        st.integers(0, 10**6),
    ),
)
def test_a_foreign_objective_takes_the_path_of_a_numpy_loop(
    foreign: str, other: str, swap: bool, case: tuple[str, int, int, int, int]
) -> None:
    """Any shapes and types of data, any partner: the steps are along its own samples."""
    pair = [FOREIGN[foreign], (FOREIGN | BUILT_IN)[other]]
    assert_path(pair[::-1] if swap else pair, *case)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("pair", list(product(BUILT_IN, repeat=2)), ids=", ".join)
def test_the_built_in_loops_take_the_path_of_a_numpy_loop(
    pair: tuple[str, str], schedule: str, batch: int
) -> None:
    assert_path([BUILT_IN[name] for name in pair], schedule, 4, 3, batch, 0)


def test_a_foreign_objective_comes_close_to_its_optimum() -> None:
    """f_Mix* = 2.25 / 2: two targets A t and -A t. Another loss would not end there by chance."""
    a, truth = np.random.default_rng(0).standard_normal((1000, 3)), np.array([1.0, -1.0, 0.5])
    pair = (Sampled(a, a @ truth), Compiled(a, -a @ truth, shape="logistic"))
    problem = Problem("own", pair, 10.0, 0.1)
    options: dict[str, Any] = {"num_steps": 4000, "seeds": range(8), "record_steps": [4000]}
    trace = simulate(problem, Mix(0.5), step_size=StepSize(0.1), **options)
    optimum = problem_optima(problem).mix(0.5)
    assert optimum.value == pytest.approx(1.125, rel=0.1)
    assert np.all(problem.mix(0.5).value(trace.theta["weighted"][-1]) - optimum.value < 0.01)


class Flat(Sampled):
    def stochastic_gradient(self, theta: Array, draws: Array) -> tuple[Array, Array]:
        gradients, losses = super().stochastic_gradient(theta, draws)
        return gradients, losses[:, None]


class FewDraws(Sampled):
    def draws(self, seeds: tuple[int, ...], stream: Stream, block: int) -> Array:
        return super().draws(seeds, stream, block)[:, :7]


class Doubled(Sampled):
    """Another function, whose stochastic gradient is not the inherited one."""

    def value(self, theta: Array) -> Array:
        return 2.0 * super().value(theta)


class DoubledKernel(Compiled):
    gradient = Doubled.value


@pytest.mark.parametrize(
    ("objective", "mention"),
    [
        (LeastSquares, "LeastSquares has no stochastic gradient of its own"),
        (Doubled, "Doubled has no stochastic gradient of its own"),
        (DoubledKernel, "DoubledKernel has no stochastic gradient of its own"),
        (Flat, r"Flat.stochastic_gradient: losses have the shape \(1, 1\), not \(1,\)"),
        (FewDraws, r"FewDraws.draws must be \(seeds, 1024, width\)"),
    ],
)
def test_a_contract_that_is_not_kept_is_one_line(objective: Any, mention: str) -> None:
    mistaken = objective(np.eye(2), np.ones(2))
    problem = Problem("own", (mistaken, mistaken), 1.0, 1.0)
    with pytest.raises((ValueError, NotImplementedError), match=mention) as error:
        simulate(problem, Mix(0.5), num_steps=3, step_size=StepSize(1.0), seeds=(0,))
    assert_one_line_error(str(error.value))


def loops_compiled() -> int:
    """How many of the built-in loops this process compiles for all named problems."""
    for name in PROBLEMS:
        for batch_size in (1, 2):
            options: dict[str, Any] = {"num_steps": 3, "seeds": (0,), "batch_size": batch_size}
            simulate(make_problem(name), Mix(0.5), step_size=StepSize(1.0), **options)
    loops = (kernels.descend, kernels.sample, kernels.projected_step)
    return sum(sum(loop.stats.cache_misses.values()) for loop in loops)


def test_another_process_compiles_nothing_anew() -> None:
    """The built-in loops come from numba's cache on disk."""
    loops_compiled()
    code = "from test_foreign_objectives import loops_compiled; print(loops_compiled())"
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    assert int(done.stdout) == 0
