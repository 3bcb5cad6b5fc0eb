"""The optimisation loop: reproducible, exact where noise-free, and counted as it spends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from _asserts import EXACT, projected_gradient_descent
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from theory.optima import problem_optima
from theory.optimizers import Memory
from theory.problems import PROBLEMS, Problem, make_problem, quadratic
from theory.randomness import BLOCK
from theory.schedulers import (
    ORDERS,
    Alright,
    Alternate,
    Importance,
    Maxright,
    Mix,
    Sequential,
    Single,
    objective_weights,
)
from theory.scheduling import Probe, Scheduler, ScheduleState
from theory.simulate import AHEAD, ITERATES, StepSize, Trace, log_spaced_steps, simulate
from theory.tasks import Task

Array = NDArray[np.float64]

EVERY_PROBLEM = pytest.mark.parametrize("name", PROBLEMS)
EITHER_ORDER = pytest.mark.parametrize("order", ORDERS)
STEP_SIZES = pytest.mark.parametrize(
    "step_size", [StepSize(0.4), StepSize(0.3, decay=False)], ids=["decaying", "constant"]
)
DECAY = StepSize(0.5)
SEEDS = (5, 3, 9)
LAMS = (0.2, 0.5, 0.8)


def run(
    problem: Problem,
    scheduler: Scheduler,
    num_steps: int,
    seeds: Any = SEEDS,
    step_size: StepSize = DECAY,
    **options: Any,
) -> Trace:
    options = {"record_weights": True, **options}
    return simulate(
        problem, scheduler, num_steps=num_steps, step_size=step_size, seeds=seeds, **options
    )


def decisions(trace: Trace) -> Array:
    assert trace.weights is not None
    return trace.weights


def optimum_values(problem: Problem) -> tuple[float, float]:
    return problem_optima(problem).values


def noise_free(radius: float = 4.0) -> Problem:
    """A quadratic pair whose runs do not start at 0."""
    problem = quadratic(dim=4, noise=0.0)
    return replace(problem, radius=radius, start=np.array([0.1, -0.2, 0.0, 0.3]))


def assert_same_runs(trace: Trace, other: Trace) -> None:
    """Bit for bit."""
    for iterate in ITERATES:
        np.testing.assert_array_equal(trace.theta[iterate], other.theta[iterate])
    np.testing.assert_array_equal(trace.gradients, other.gradients)
    np.testing.assert_array_equal(trace.probes, other.probes)
    np.testing.assert_array_equal(trace.steps, other.steps)
    np.testing.assert_array_equal(decisions(trace), decisions(other))


def assert_ends(trace: Trace, record: int, index: int, expected: dict[str, Array]) -> None:
    for iterate in ITERATES:
        found = trace.theta[iterate][record, index]
        np.testing.assert_allclose(found, expected[iterate], rtol=0, atol=EXACT)


# --- shapes and records


@EVERY_PROBLEM
def test_a_trace_has_one_theta_per_record_run_and_iterate(name: str) -> None:
    problem = make_problem(name)
    trace = run(problem, Mix(0.5), 30)
    assert trace.steps[-1] == 30
    for iterate in ITERATES:
        theta = trace.theta[iterate]
        assert theta.shape == (len(trace.steps), 3, problem.dim)
        assert np.all(np.isfinite(theta))
    assert trace.gradients.shape == trace.probes.shape == (len(trace.steps), 3, 2)
    assert decisions(trace).shape == (30, 3, 2)
    assert run(problem, Mix(0.5), 3, record_weights=False).weights is None


@given(st.integers(1, 10**7), st.integers(1, 10))
def test_log_spaced_steps_rise_to_the_last_step(num_steps: int, per_decade: int) -> None:
    steps = log_spaced_steps(num_steps, per_decade)
    assert steps[-1] == num_steps
    assert steps[0] == min(10, num_steps)
    assert np.all(np.diff(steps) > 0)
    decades = math.log10(num_steps / min(10, num_steps))
    assert len(steps) <= math.ceil(per_decade * decades) + 1
    assert log_spaced_steps(1000, per_decade=2).tolist() == [10, 32, 100, 316, 1000]


@pytest.mark.parametrize("name", ["bernoulli", "quadratic"])
def test_a_record_is_what_a_shorter_run_would_have_ended_with(name: str) -> None:
    problem, record = make_problem(name), [1, 2, 17, 60]
    trace = run(problem, Alright(LAMS, SEEDS), 60, record_steps=record)
    assert trace.steps.tolist() == record
    for index, steps in enumerate(record):
        short = run(problem, Alright(LAMS, SEEDS), steps, record_steps=[steps])
        for iterate in ITERATES:
            np.testing.assert_array_equal(trace.theta[iterate][index], short.theta[iterate][0])
        np.testing.assert_array_equal(trace.gradients[index], short.gradients[0])


@given(st.floats(0.01, 10.0))
def test_step_sizes(scale: float) -> None:
    t = np.array([1, 4, 9, 100])
    expected = [scale, scale / 2, scale / 3, scale / 10]
    np.testing.assert_allclose(StepSize(scale)(t), expected, rtol=EXACT)
    assert StepSize(scale, decay=False)(t).tolist() == [scale] * 4


# --- reproducible, whoever shares the batch


def schedulers(
    index: int | None = None, optimum: tuple[float, float] = (0.0, 0.0)
) -> list[Scheduler]:
    """All schedulers for the whole batch, or for its run `index` alone."""

    def pick(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return values if index is None else (values[index],)

    return [
        Single(Task.DPO),
        Single(Task.SFT),
        Mix(pick(LAMS)),
        Alright(pick(LAMS), pick(SEEDS)),
        Sequential(pick((10, 0, 25)), "dpo_then_sft"),
        Sequential(pick((10, 0, 25)), "sft_then_dpo"),
        Importance(pick(LAMS), pick((0.5, 0.3, 0.6)), pick(SEEDS)),
        Alternate(pick(LAMS), pick((10, 2, 7))),
        *(Maxright(pick(LAMS), optimum, k, scaled) for k, scaled in ((1, False), (5, True))),
    ]


@EVERY_PROBLEM
def test_a_run_is_the_same_alone_and_in_any_batch(name: str) -> None:
    """Full losses go through BLAS, whose rounding depends on the batch: decisions of MAXRIGHT may
    differ on a tie. None occurs here, and the steps themselves do not see the losses."""
    problem = make_problem(name)
    optimum = optimum_values(problem)
    alone = [schedulers(i, optimum) for i in range(len(SEEDS))]
    for batched, *single in zip(schedulers(None, optimum), *alone, strict=True):
        together = run(problem, batched, 40)
        for index, scheduler in enumerate(single):
            own = run(problem, scheduler, 40, seeds=SEEDS[index : index + 1])
            np.testing.assert_array_equal(decisions(together)[:, index], decisions(own)[:, 0])
            for iterate in ITERATES:
                found = together.theta[iterate][:, index]
                np.testing.assert_array_equal(found, own.theta[iterate][:, 0])


def test_a_simulation_is_reproducible_across_a_block_boundary() -> None:
    problem = make_problem("bernoulli")
    first = run(problem, Alright(LAMS, SEEDS), BLOCK + 20)
    run(problem, Mix(0.3), 10, seeds=(77, 78))  # something else in between
    assert_same_runs(first, run(problem, Alright(LAMS, SEEDS), BLOCK + 20))


@EVERY_PROBLEM
def test_runs_with_one_seed_are_equal_and_with_two_seeds_are_not(name: str) -> None:
    last = run(make_problem(name), Mix(0.5), 30, seeds=(4, 6, 4)).theta["last"][-1]
    np.testing.assert_array_equal(last[0], last[2])
    assert np.any(last[0] != last[1])


@EVERY_PROBLEM
@pytest.mark.parametrize(("lam", "task"), [(1.0, Task.DPO), (0.0, Task.SFT)])
def test_schedules_that_step_on_one_objective_only_are_one(
    name: str, lam: float, task: Task
) -> None:
    """Runs that share a seed see the same samples under every scheduler."""
    problem = make_problem(name)
    expected = run(problem, Single(task), 50)
    same: list[Scheduler] = [Alright(lam, seed=1), Mix(lam)]
    same += [Sequential(50 if first == task else 0, order) for order, (first, _) in ORDERS.items()]
    for scheduler in same:
        assert_same_runs(run(problem, scheduler, 50), expected)


# --- against a NumPy loop, without noise

ALONG: dict[str, Callable[[tuple[float, float]], Scheduler]] = {
    **{f"mix {lam}": lambda _, lam=lam: Mix(lam) for lam in (0.0, 0.3, 1.0)},  # type: ignore[misc]
    **{  # type: ignore[dict-item]
        f"maxright {k} {s}": lambda optimum, k=k, s=s: Maxright(LAMS, optimum, k, s)
        for k in (1, 4)
        for s in (False, True)
    },
    "alright": lambda _: Alright(LAMS, SEEDS),
    "importance": lambda _: Importance(LAMS, 0.3, SEEDS),
    "alternate": lambda _: Alternate(LAMS, 7),
}


@STEP_SIZES
@pytest.mark.parametrize("radius", [0.5, 4.0])
@pytest.mark.parametrize("schedule", ALONG)
def test_a_run_is_projected_gradient_descent_along_its_decisions(
    schedule: str, radius: float, step_size: StepSize
) -> None:
    problem = noise_free(radius)
    scheduler = ALONG[schedule](optimum_values(problem))
    trace = run(problem, scheduler, 60, step_size=step_size)
    for index in range(len(SEEDS)):
        weights = decisions(trace)[:, index].tolist()
        end = projected_gradient_descent(problem, weights, step_size, problem.start)
        assert_ends(trace, -1, index, end)
    if isinstance(scheduler, Mix):
        assert np.all(decisions(trace) == objective_weights(scheduler.lam))
        on_boundary = np.linalg.norm(trace.theta["last"][:, 0], axis=1) > radius - EXACT
        assert on_boundary.any() == (radius == 0.5)


@EVERY_PROBLEM
@pytest.mark.parametrize("period", [1, 3, 7])
def test_maxright_decides_by_full_losses_that_are_as_old_as_documented(
    name: str, period: int
) -> None:
    """Replayed along the noisy path: both full losses at a refresh, then the stepped one's only,
    taken before its step."""
    problem, lam = make_problem(name), 0.4
    optimum = optimum_values(problem)
    scheduler, step_size = Maxright(lam, optimum, period), StepSize(problem.step_scale)
    trace = run(problem, scheduler, 60, (0,), step_size, record_steps=range(1, 61))
    values, chosen = np.zeros(2), []
    for step, theta in enumerate([problem.start, *trace.theta["last"][:-1, 0]]):
        current = problem.losses(theta)
        if step % period == 0:
            values = current.copy()
        chosen.append(int(np.argmax(objective_weights(lam) * (values - np.array(optimum)))))
        values[chosen[-1]] = current[chosen[-1]]
    np.testing.assert_array_equal(decisions(trace)[:, 0], np.eye(2)[chosen])
    assert set(chosen) == {0, 1}  # both objectives had their turn


@STEP_SIZES
@EITHER_ORDER
@pytest.mark.parametrize("radius", [0.5, 4.0])
def test_sequential_is_two_runs_with_fresh_step_sizes_and_averages(
    order: str, radius: float, step_size: StepSize
) -> None:
    """Each run of the batch at its own split; recorded at, just after and well after one."""
    problem, splits, records = noise_free(radius), (10, 25, 35), (25, 26, 60)
    first, second = np.eye(2)[list(ORDERS[order])].tolist()
    scheduler = Sequential(splits, order)
    trace = run(problem, scheduler, 60, step_size=step_size, record_steps=records)
    for index, split in enumerate(splits):
        for record, steps in enumerate(records):
            stage = [first] * min(steps, split)
            end = projected_gradient_descent(problem, stage, step_size, problem.start)
            if steps > split:
                stage = [second] * (steps - split)
                end = projected_gradient_descent(problem, stage, step_size, end["last"])
            assert_ends(trace, record, index, end)


@EITHER_ORDER
@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9])
def test_sequential_training_ends_at_its_predicted_gap_and_mix_at_none(
    lam: float, order: str
) -> None:
    """The lower bound of the paper, without noise: G_Mix tends to the limit, not to 0.

    Gradient descent with step 0.4 contracts by 1 - 0.4 * 0.5 or better: 0.8^200 is 1e-20.
    """
    problem, constant = noise_free(), StepSize(0.4, decay=False)
    assert problem.mix_gap_limit is not None
    limit = problem.mix_gap_limit(ORDERS[order][1], lam)
    assert limit > 1e-3
    lowest = problem_optima(problem).mix(lam).value
    for scheduler, gap in ((Sequential(200, order), limit), (Mix(lam), 0.0)):
        end = run(problem, scheduler, 400, (0,), constant).theta["last"][-1, 0]
        assert float(problem.mix(lam).value(end)) - lowest == pytest.approx(gap, abs=1e-10)


def test_sgd_s_mean_is_gradient_descent() -> None:
    """On a quadratic the noise is linear: E theta_t is the noise-free iterate."""
    problem = replace(quadratic(dim=3, noise=0.5), radius=100.0)
    trace = run(problem, Mix(0.4), 50, seeds=range(2000), record_steps=[50])
    expected = projected_gradient_descent(problem, [(0.4, 0.6)] * 50, DECAY, problem.start)
    for iterate in ITERATES:
        theta = trace.theta[iterate][0]
        error = theta.std(axis=0, ddof=1) / math.sqrt(2000)
        assert np.all(np.abs(theta.mean(axis=0) - expected[iterate]) <= 4.5 * error)


def test_without_noise_the_batch_size_changes_nothing() -> None:
    single = run(noise_free(), Alright(LAMS, SEEDS), 50)
    for batch_size in (2, 5):
        batch = run(noise_free(), Alright(LAMS, SEEDS), 50, batch_size=batch_size)
        for iterate, theta in single.theta.items():
            np.testing.assert_allclose(batch.theta[iterate], theta, rtol=0, atol=EXACT)
        np.testing.assert_array_equal(batch.gradients, single.gradients)


# --- the ball, and the counts


@EVERY_PROBLEM
def test_iterates_and_their_averages_stay_in_the_ball(name: str) -> None:
    problem = replace(make_problem(name), radius=0.3)
    for scheduler in schedulers():
        trace = run(problem, scheduler, 50, step_size=StepSize(20.0, decay=False))
        norms = {name: np.linalg.norm(t, axis=-1) for name, t in trace.theta.items()}
        for norm in norms.values():
            assert norm.max() <= 0.3 * (1.0 + EXACT)
        assert norms["last"].max() > 0.3 * (1.0 - EXACT)  # the projection was at work


def test_gradients_are_counted_where_the_weight_is_not_zero_and_probes_where_they_are_made() -> (
    None
):
    """Stale MAXRIGHT probes both losses per refresh and the stepped one's at every step."""
    problem = make_problem("toy2d")
    for scheduler in schedulers(optimum=optimum_values(problem)):
        trace = run(problem, scheduler, 57)
        gradients, probes = trace.gradients[-1], trace.probes[-1]
        np.testing.assert_array_equal(gradients, np.sum(decisions(trace) != 0.0, axis=0))
        assert np.all(gradients.sum(axis=1) == (114 if isinstance(scheduler, Mix) else 57))
        period = getattr(scheduler, "refresh_every", 0)
        expected = {0: 0 * gradients, 1: 0 * gradients + 57, 5: 12 + gradients}[period]
        np.testing.assert_array_equal(probes, expected)
        if isinstance(scheduler, Sequential):
            assert gradients[:, ORDERS[scheduler.order][0]].tolist() == [10, 0, 25]


# --- many steps in one go, or one at a time: the same bits


@dataclass(frozen=True)
class DoNothing:
    """A rule that changes nothing, under which the loop takes its steps one at a time."""

    def init(self, runs: int, dim: int) -> Memory:
        return {}

    def apply(self, gradient: Array, memory: Memory, local_step: NDArray[np.int64]) -> None:
        pass


@dataclass(frozen=True)
class Glance(Scheduler):
    """Alternates; at every 7th step it looks and steps on the larger loss or gradient."""

    gram: bool = False

    def select(self, state: ScheduleState, probe: Probe) -> tuple[Array, ScheduleState]:
        if state.step % 7:
            return np.eye(2)[state.step % 2], state
        sizes = probe.gram()[..., ::2] if self.gram else probe()
        return np.eye(2)[sizes.argmax(axis=-1)], state


@pytest.mark.parametrize(
    ("name", "steps"),
    [*((name, 2 * AHEAD + 40) for name in PROBLEMS), ("bernoulli", BLOCK + AHEAD + 3)],
)
def test_steps_decided_ahead_are_the_steps_taken_one_at_a_time(name: str, steps: int) -> None:
    problem = make_problem(name)
    record = [1, AHEAD - 1, AHEAD, AHEAD + 1, 2 * AHEAD + 30, steps]
    own = [Sequential((AHEAD - 1, AHEAD, AHEAD + 1)), Glance(), Glance(gram=True)]
    for scheduler in [*schedulers()[:-2], *own]:
        ahead = run(problem, scheduler, steps, record_steps=record)
        single = run(problem, scheduler, steps, record_steps=record, rule=DoNothing())
        assert_same_runs(ahead, single)
        looks = -(-steps // 7) if isinstance(scheduler, Glance) else 0
        assert np.all(ahead.probes[-1] == looks)
