"""The only optimisation loop: projected SGD on two objectives under a scheduler, many runs at once.

theta_{t+1} = P(theta_t - alpha_t sum_i w_{t,i} g_i(theta_t; z_t)),   P = projection on the ball,

with w_t from the scheduler. Three outputs are recorded: the last iterate, the uniform average and
the alpha-weighted average of theta_1..theta_t. Where a sequential schedule changes its objective,
the step size, the optimiser's memory and the averages start anew, as separate trainings would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory import checks
from theory.kernels import descend, projected_step, sample
from theory.optimizers import Memory, Rule
from theory.problems import Problem
from theory.randomness import BLOCK, Stream
from theory.scheduling import Answers, Scheduler, ScheduleState
from theory.tasks import Task
from theory.values import NOT_LAZY, SAMPLE_STREAMS, SOURCES, ValueSource

Array = NDArray[np.float64]

ITERATES = ("last", "uniform", "weighted")
AHEAD = 128
"""Steps that a schedule may decide in advance, where it asks for nothing, to be taken in one go."""


@dataclass(frozen=True)
class StepSize:
    """alpha_t = scale / sqrt(t), or the constant `scale`; t counts from 1 in each stage."""

    scale: float
    decay: bool = True

    def __post_init__(self) -> None:
        checks.assign(self, scale=checks.number("scale", self.scale))

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
    batch_size: int = 1,
    values: str = "exact",
    rule: Rule | None = None,
) -> Trace:
    """Run projected SGD on `problem` once per entry of `seeds`, all runs in one batch.

    The samples of step t of the run with seed s are a pure function of (s, objective, t): runs
    that share a seed see the same data under every scheduler. `scheduler.runs` must be () (then all
    runs share its decisions: for independent ALRIGHT runs give it one seed per run) or
    (len(seeds),).

    A stochastic gradient is the mean over `batch_size` samples. `values` names the source of the
    losses and Gram matrices for schedulers that ask (`theory.values`); `rule` replaces plain SGD
    (`theory.optimizers`).
    """
    for name, count in (("num_steps", num_steps), ("batch_size", batch_size)):
        if count < 1:
            raise ValueError(f"{name} is {count}; it must be at least 1")
    if values not in SOURCES:
        raise ValueError(f"values is {values!r}; it must be one of {', '.join(SOURCES)}")
    if scheduler.runs not in ((), (len(seeds),)):
        raise ValueError(f"the scheduler has {scheduler.runs} runs, but there are {len(seeds)}")
    record = log_spaced_steps(num_steps) if record_steps is None else np.asarray(record_steps)
    if record.size == 0 or record[0] < 1 or record[-1] > num_steps or np.any(np.diff(record) < 1):
        raise ValueError(f"record_steps must increase strictly within 1..{num_steps}")
    if values == "lazy" and (scheduler.reads_losses or scheduler.reads_gram):
        raise ValueError(NOT_LAZY)
    loop = Loop(problem, scheduler, step_size, tuple(int(s) for s in seeds), batch_size, rule)
    source = SOURCES[values]()
    snapshots, decisions, wanted = [], [], set(record.tolist())
    for stop in sorted({*wanted, num_steps}):
        while loop.state.step < stop:
            weights = loop.advance(stop, source)
            if record_weights:
                decisions.append(weights)
        if stop in wanted:
            snapshots.append(loop.snapshot())
    theta = {name: np.stack([s[0][name] for s in snapshots]) for name in ITERATES}
    return Trace(
        steps=record,
        theta=theta,
        gradients=np.stack([s[1] for s in snapshots]),
        probes=np.stack([s[2] for s in snapshots]),
        weights=np.concatenate(decisions) if record_weights else None,
    )


class _NeedsProbe(Exception):
    """A scheduler asked for losses or gradients while it was deciding ahead."""


def _no_answer() -> Array:
    raise _NeedsProbe


NO_ANSWERS = Answers(_no_answer, _no_answer)


class Loop:
    """The state of the running batch. `advance` iterates the algorithm."""

    def __init__(
        self,
        problem: Problem,
        scheduler: Scheduler,
        step_size: StepSize,
        seeds: tuple[int, ...],
        batch_size: int,
        rule: Rule | None,
    ) -> None:
        runs, dim = len(seeds), problem.dim
        self.problem, self.scheduler, self.step_size = problem, scheduler, step_size
        self.batch_size, self.rule = batch_size, rule
        self.memory: Memory = {} if rule is None else rule.init(runs, dim)
        self.state = scheduler.init()
        distinct, self.seed_index = np.unique(seeds, return_inverse=True)
        self.seeds = tuple(int(s) for s in distinct)
        self.data = _data(problem)
        self.draws: dict[tuple[Stream, ...], tuple[int, tuple[Array, ...]]] = {}
        self.theta = np.tile(problem.start, (runs, 1))
        self.gradient = np.zeros((runs, dim))
        self.losses = np.full((runs, 2), np.nan)
        self.sums = (np.zeros((runs, dim)), np.zeros((runs, dim)))
        self.alpha_sum = np.zeros(runs)
        self.gradients = np.zeros((runs, 2), dtype=np.int64)
        self.probes = np.zeros((runs, 2), dtype=np.int64)

    def advance(self, stop: int, source: ValueSource) -> Array:
        """Take at least one step, none beyond `stop`; returns the decisions (steps, runs, 2)."""
        decisions, state = self._decide_ahead(stop)
        if not decisions:
            return self._take_step(source)[None]
        weights = np.stack(decisions)
        self._take_steps(weights)
        self.state = state
        return weights

    def _decide_ahead(self, stop: int) -> tuple[list[Array], ScheduleState]:
        """Decisions of the next steps as far as they need no probe (may be none); state after."""
        step, state, decisions = self.state.step, self.state, []
        plain = self.rule is None and self.batch_size == 1 and self.data is not None
        if plain and not self.scheduler.reads_losses:
            for _ in range(min(stop - step, AHEAD, BLOCK - step % BLOCK)):
                try:
                    weights, state = self.scheduler.select(state, NO_ANSWERS)
                except _NeedsProbe:
                    break
                state = self.scheduler.observe(state)
                decisions.append(np.broadcast_to(weights, self.losses.shape))
        return decisions, state

    def _take_steps(self, weights: Array) -> None:
        """Plain SGD on single samples along decided weights (steps, runs, 2)."""
        first = self.state.step
        block, offset = divmod(first, BLOCK)
        local = np.stack([self._local_step(first + i) for i in range(len(weights))])
        descend(
            self.data, self.theta, weights, self._draws(SAMPLE_STREAMS, block), self.seed_index,
            offset, self.gradient, self.losses, local, self.step_size(local + 1),
            self.problem.radius, self.sums, self.alpha_sum, self.gradients,
        )  # fmt: skip

    def _take_step(self, source: ValueSource) -> Array:
        """Decide, step, and let the scheduler observe; returns the weights (runs, 2)."""
        probe = Answers(lambda: source.probe(self), lambda: source.gram(self))
        weights, self.state = self.scheduler.select(self.state, probe)
        weights = np.array(np.broadcast_to(weights, self.losses.shape))
        self.losses = self._sample(SAMPLE_STREAMS, weights, self.gradient)
        observed = source.observed(self, weights) if self.scheduler.reads_losses else None
        local = self._local_step(self.state.step)
        if self.rule is not None:
            for memory in self.memory.values():
                memory[local == 0] = 0.0
            self.rule.apply(self.gradient, self.memory, local)
        projected_step(
            self.theta, self.gradient, weights, local, self.step_size(local + 1),
            self.problem.radius, self.sums, self.alpha_sum, self.gradients,
        )  # fmt: skip
        self.state = self.scheduler.observe(self.state, observed)
        return weights

    def _local_step(self, step: int) -> NDArray[np.int64]:
        """`step` counted from the start of its stage, for every run."""
        start = np.asarray(self.scheduler.stage_start(step), dtype=np.int64)
        return np.broadcast_to(step - start, self.alpha_sum.shape).copy()

    def sample_losses(self, streams: Mapping[Task, Stream]) -> Array:
        """Mean losses (runs, 2) over a minibatch of this step from `streams`."""
        return self._sample(streams, np.ones(self.losses.shape), np.zeros_like(self.gradient))

    def sample_gradients(self, streams: Mapping[Task, Stream]) -> Array:
        """Mean gradients (2, runs, d) over the same minibatch, one objective by one."""
        gradients = np.zeros((len(Task), *self.gradient.shape))
        for task in Task:
            self._sample(
                streams, np.tile(np.eye(len(Task))[task], (len(self.theta), 1)), gradients[task]
            )
        return gradients

    def _sample(self, streams: Mapping[Task, Stream], weights: Array, out: Array) -> Array:
        """Add the weighted minibatch gradients to `out`; returns the losses (runs, 2)."""
        losses, total = np.empty(weights.shape), np.zeros(weights.shape)
        shares = weights / self.batch_size
        for i in range(self.batch_size):
            block, offset = divmod(self.state.step * self.batch_size + i, BLOCK)
            self._add_gradients(shares, self._draws(streams, block), offset, out, losses)
            total += losses
        return total / self.batch_size

    def _add_gradients(
        self, weights: Array, draws: tuple[Array, ...], offset: int, out: Array, losses: Array
    ) -> None:
        """Of one sample; in one compiled call where both kernels are built in."""
        if self.data is not None:
            sample(self.data, self.theta, weights, draws, self.seed_index, offset, out, losses)
            return
        for column, objective in enumerate(self.problem.objectives):
            objective.add_stochastic_gradient(
                self.theta, weights, column, draws[column], self.seed_index, offset, out, losses
            )

    def _draws(self, streams: Mapping[Task, Stream], block: int) -> tuple[Array, ...]:
        """The random numbers of `block`, as own copies: numba is slow to pass read-only arrays."""
        names = tuple(streams.values())
        if self.draws.get(names, (None,))[0] != block:
            objectives = zip(names, self.problem.objectives, strict=True)
            draws = tuple(f.draws(self.seeds, name, block).copy() for name, f in objectives)
            for found, objective in zip(draws, self.problem.objectives, strict=True):
                if found.ndim != 3 or found.shape[:2] != (len(self.seeds), BLOCK):
                    name = f"{type(objective).__name__}.draws"
                    raise ValueError(f"{name} must be (seeds, {BLOCK}, width), not {found.shape}")
            self.draws[names] = (block, draws)
        return self.draws[names][1]

    def snapshot(self) -> tuple[dict[str, Array], NDArray[np.int64], NDArray[np.int64]]:
        theta = {
            "last": self.theta.copy(),
            "uniform": self.sums[0] / (self._local_step(self.state.step - 1) + 1)[:, None],
            "weighted": self.sums[1] / self.alpha_sum[:, None],
        }
        return theta, self.gradients.copy(), self.probes.copy()


def _data(problem: Problem) -> tuple[Any, ...] | None:
    """What the compiled loops take, if they know the kernels of both objectives."""
    if not all(f.built_in for f in problem.objectives):
        return None
    return tuple(f.compiled[1] for f in problem.objectives if f.compiled is not None)
