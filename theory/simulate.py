"""The only optimisation loop: projected SGD on two objectives under a scheduler, many runs at once.

theta_{t+1} = P(theta_t - alpha_t sum_i w_{t,i} g_i(theta_t; z_t)),   P = projection on the ball,

with w_t from the scheduler. Three outputs are recorded: the last iterate, the uniform average and
the alpha-weighted average of theta_1..theta_t. Where a sequential schedule changes its objective,
the step size and the averages start anew, as two separate trainings would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from theory.kernels import projected_step
from theory.problems import Problem
from theory.randomness import BLOCK, Stream
from theory.schedulers import Scheduler
from theory.tasks import Task

Array = NDArray[np.float64]

ITERATES = ("last", "uniform", "weighted")
SAMPLE_STREAMS = {Task.DPO: Stream.DPO_SAMPLE, Task.SFT: Stream.SFT_SAMPLE}


@dataclass(frozen=True)
class StepSize:
    """alpha_t = scale / sqrt(t), or the constant `scale`; t counts from 1 in each stage."""

    scale: float
    decay: bool = True

    def __call__(self, t: NDArray[np.int64]) -> Array:
        return self.scale / np.sqrt(t) if self.decay else np.full(np.shape(t), self.scale)


@dataclass(frozen=True)
class Trace:
    """What a simulation leaves: K recorded steps of `runs` runs.

    `theta[iterate]` has shape (K, runs, d); `gradients` and `probes` (K, runs, 2) count stochastic
    gradients and full loss evaluations per objective up to that step.
    """

    steps: NDArray[np.int64]
    theta: dict[str, Array]
    gradients: NDArray[np.int64]
    probes: NDArray[np.int64]
    weights: NDArray[np.float64] | None = None
    """(T, runs, 2): the decisions, if they were asked for."""


def log_spaced_steps(num_steps: int, per_decade: int = 4) -> NDArray[np.int64]:
    """Record steps: about `per_decade` per decade from 10 on, always ending with `num_steps`."""
    first = min(10, num_steps)
    count = max(int(np.ceil(per_decade * np.log10(num_steps / first))) + 1, 1)
    steps = np.geomspace(first, num_steps, count).round().astype(np.int64)
    return np.unique(np.append(steps, num_steps))


def simulate(
    problem: Problem,
    scheduler: Scheduler,
    *,
    num_steps: int,
    step_size: StepSize,
    seeds: Sequence[int],
    record_steps: Sequence[int] | NDArray[np.int64] | None = None,
    record_weights: bool = False,
) -> Trace:
    """Run projected SGD on `problem` once per entry of `seeds`, all runs in one batch.

    The samples of step t of the run with seed s are a pure function of (s, objective, t): runs
    that share a seed see the same data under every scheduler. `scheduler.runs` must be () (then all
    runs share its decisions: for independent ALRIGHT runs give it one seed per run) or
    (len(seeds),).
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    if scheduler.runs not in ((), (len(seeds),)):
        raise ValueError(f"the scheduler has {scheduler.runs} runs, but there are {len(seeds)}")
    record = log_spaced_steps(num_steps) if record_steps is None else np.asarray(record_steps)
    if record.size == 0 or record[0] < 1 or record[-1] > num_steps or np.any(np.diff(record) < 1):
        raise ValueError(f"record_steps must increase strictly within 1..{num_steps}")
    loop = _Loop(problem, scheduler, step_size, tuple(int(s) for s in seeds))
    snapshots, decisions, wanted = [], [], set(record.tolist())
    for step in range(num_steps):
        weights = loop.advance()
        if record_weights:
            decisions.append(weights)
        if step + 1 in wanted:
            snapshots.append(loop.snapshot())
    theta = {name: np.stack([s[0][name] for s in snapshots]) for name in ITERATES}
    return Trace(
        steps=record,
        theta=theta,
        gradients=np.stack([s[1] for s in snapshots]),
        probes=np.stack([s[2] for s in snapshots]),
        weights=np.stack(decisions) if record_weights else None,
    )


class _Loop:
    """The state of the running batch. `advance` is one iteration of the algorithm."""

    def __init__(
        self, problem: Problem, scheduler: Scheduler, step_size: StepSize, seeds: tuple[int, ...]
    ) -> None:
        runs, dim = len(seeds), problem.dim
        self.problem, self.scheduler, self.step_size = problem, scheduler, step_size
        self.state = scheduler.init()
        distinct, self.seed_index = np.unique(seeds, return_inverse=True)
        self.seeds = tuple(int(s) for s in distinct)
        self.theta = np.tile(problem.start, (runs, 1))
        self.gradient = np.zeros((runs, dim))
        self.losses = np.full((runs, 2), np.nan)
        self.uniform_sum = np.zeros((runs, dim))
        self.weighted_sum = np.zeros((runs, dim))
        self.alpha_sum = np.zeros(runs)
        self.iterates = np.zeros(runs)
        self.gradients = np.zeros((runs, 2), dtype=np.int64)
        self.probes = np.zeros((runs, 2), dtype=np.int64)

    def advance(self) -> Array:
        step = self.state.step
        weights, self.state = self.scheduler.select(self.state, self.probe)
        weights = np.broadcast_to(weights, self.losses.shape)
        exact = self.exact_losses(weights) if self.scheduler.reads_losses else None
        self._add_gradients(step, np.ascontiguousarray(weights))
        self._descend(step, np.ascontiguousarray(weights))
        self.state = self.scheduler.observe(self.state, exact)
        return weights

    def _add_gradients(self, step: int, weights: Array) -> None:
        block, offset = divmod(step, BLOCK)
        for task, objective in enumerate(self.problem.objectives):
            draws = objective.draws(self.seeds, SAMPLE_STREAMS[Task(task)], block)
            objective.add_stochastic_gradient(
                self.theta,
                weights,
                task,
                draws,
                self.seed_index,
                offset,
                self.gradient,
                self.losses,
            )

    def _descend(self, step: int, weights: Array) -> None:
        local = np.broadcast_to(step - self.scheduler.stage_start(step), self.iterates.shape)
        alpha = self.step_size(local + 1)
        restart = local == 0
        if restart.any():
            for total in (self.uniform_sum, self.weighted_sum, self.alpha_sum, self.iterates):
                total[restart] = 0.0
        self.alpha_sum += alpha
        self.iterates += 1
        projected_step(
            self.theta,
            self.gradient,
            weights,
            alpha,
            self.problem.radius,
            self.uniform_sum,
            self.weighted_sum,
            self.gradients,
        )

    def probe(self) -> Array:
        """Both losses in full, for every run: shape (runs, 2)."""
        self.probes += 1
        return np.stack([f.value(self.theta) for f in self.problem.objectives], axis=-1)

    def exact_losses(self, weights: Array) -> Array:
        """The full losses of the objectives that are stepped on, NaN elsewhere: (runs, 2)."""
        exact = np.full(weights.shape, np.nan)
        for task, objective in enumerate(self.problem.objectives):
            stepped = weights[:, task] != 0.0
            exact[stepped, task] = objective.value(self.theta[stepped])
        self.probes += weights != 0.0
        return exact

    def snapshot(self) -> tuple[dict[str, Array], NDArray[np.int64], NDArray[np.int64]]:
        theta = {
            "last": self.theta.copy(),
            "uniform": self.uniform_sum / self.iterates[:, None],
            "weighted": self.weighted_sum / self.alpha_sum[:, None],
        }
        return theta, self.gradients.copy(), self.probes.copy()
