"""The optimisation loop: reproducible, exact where noise-free, and as good as the theory says."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from _asserts import EXACT, mean_and_error, projected_gradient_descent, sample_gradients
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from theory.kernels import KERNELS
from theory.objectives import Quadratic
from theory.optima import problem_optima
from theory.optimizers import Memory
from theory.problems import PROBLEMS, Problem, make_problem, quadratic
from theory.randomness import BLOCK, Stream
from theory.schedulers import (
    Alright,
    Alternate,
    Importance,
    Maxright,
    Mix,
    Probe,
    Scheduler,
    ScheduleState,
    Sequential,
    Single,
    objective_weights,
)
from theory.simulate import AHEAD, ITERATES, StepSize, Trace, log_spaced_steps, simulate
from theory.tasks import Task

Array = NDArray[np.float64]

EVERY_PROBLEM = pytest.mark.parametrize("name", PROBLEMS)
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
    return simulate(
        problem, scheduler, num_steps=num_steps, step_size=step_size, seeds=seeds, **options
    )


def optimum_values(problem: Problem) -> tuple[float, float]:
    return problem_optima(problem).values


def noise_free(radius: float | None = None, seed: int = 0) -> Problem:
    problem = quadratic(dim=4, noise=0.0, seed=seed)
    return problem if radius is None else replace(problem, radius=radius)


def centred_quadratic(dim: int, noise: float) -> Problem:
    """Both objectives are one noisy quadratic whose minimiser is the start: no bias, only noise."""
    objective = quadratic(dim=dim, noise=noise).objectives[Task.DPO]
    assert isinstance(objective, Quadratic)
    centred = replace(objective, center=np.zeros(dim))
    return Problem("centred", (centred, centred), radius=100.0, step_scale=0.1)


def assert_same_runs(trace: Trace, other: Trace) -> None:
    """Bit for bit."""
    for iterate in ITERATES:
        np.testing.assert_array_equal(trace.theta[iterate], other.theta[iterate])
    np.testing.assert_array_equal(trace.gradients, other.gradients)
    np.testing.assert_array_equal(trace.steps, other.steps)


def mean_gap(values: Array, optimum: float) -> tuple[float, float]:
    return mean_and_error(values - optimum)


# --- shapes and records


@EVERY_PROBLEM
def test_a_trace_has_one_theta_per_record_run_and_iterate(name: str) -> None:
    problem = make_problem(name)
    trace = run(problem, Mix(0.5), 30, record_weights=True)
    assert trace.steps[-1] == 30
    assert set(trace.theta) == set(ITERATES)
    for theta in trace.theta.values():
        assert theta.shape == (len(trace.steps), 3, problem.dim)
        assert np.all(np.isfinite(theta))
    assert trace.gradients.shape == trace.probes.shape == (len(trace.steps), 3, 2)
    assert trace.weights is not None
    assert trace.weights.shape == (30, 3, 2)
    assert run(problem, Mix(0.5), 3).weights is None


@given(st.integers(1, 10**7), st.integers(1, 10))
def test_log_spaced_steps_rise_to_the_last_step(num_steps: int, per_decade: int) -> None:
    steps = log_spaced_steps(num_steps, per_decade)
    assert steps[-1] == num_steps
    assert steps[0] == min(10, num_steps)
    assert np.all(np.diff(steps) > 0)
    decades = math.log10(num_steps / min(10, num_steps))
    assert len(steps) <= math.ceil(per_decade * decades) + 1


def test_log_spaced_steps_of_a_thousand() -> None:
    assert log_spaced_steps(1000, per_decade=2).tolist() == [10, 32, 100, 316, 1000]


@pytest.mark.parametrize("name", ["bernoulli", "quadratic"])
def test_a_record_is_what_a_shorter_run_would_have_ended_with(name: str) -> None:
    problem = make_problem(name)
    scheduler = Alright(LAMS, SEEDS)
    record = [1, 2, 17, 60]
    trace = run(problem, scheduler, 60, record_steps=record)
    assert trace.steps.tolist() == record
    for index, steps in enumerate(record):
        short = run(problem, scheduler, steps, record_steps=[steps])
        for iterate in ITERATES:
            np.testing.assert_array_equal(trace.theta[iterate][index], short.theta[iterate][0])
        np.testing.assert_array_equal(trace.gradients[index], short.gradients[0])


@pytest.mark.parametrize("record", [[10, 5], [5, 5, 10], [0, 10], [5, 20], [20], []])
def test_records_are_labelled_with_their_own_step_or_refused(record: list[int]) -> None:
    problem = noise_free()
    try:
        trace = run(problem, Mix(0.5), 10, record_steps=record)
    except ValueError as error:
        assert "record_steps" in str(error)  # noqa: PT017
        return
    assert len(trace.steps) == len(trace.theta["last"])
    for step, theta in zip(trace.steps.tolist(), trace.theta["last"], strict=True):
        np.testing.assert_array_equal(theta, run(problem, Mix(0.5), step).theta["last"][-1])


@pytest.mark.parametrize("num_steps", [0, -1])
def test_a_simulation_without_steps_is_an_error(num_steps: int) -> None:
    with pytest.raises(ValueError, match="num_steps is"):
        run(noise_free(), Mix(0.5), num_steps)


@pytest.mark.parametrize("scheduler", [Mix((0.1, 0.2)), Alright((0.1,) * 4), Sequential((1, 2))])
def test_a_batched_scheduler_needs_one_seed_per_run(scheduler: Scheduler) -> None:
    with pytest.raises(ValueError, match="runs, but there are 3"):
        run(noise_free(), scheduler, 5)


# --- the step size


@given(st.floats(0.01, 10.0))
def test_step_sizes(scale: float) -> None:
    t = np.array([1, 4, 9, 100])
    np.testing.assert_allclose(
        StepSize(scale)(t), [scale, scale / 2, scale / 3, scale / 10], rtol=EXACT
    )
    assert StepSize(scale, decay=False)(t).tolist() == [scale] * 4


# --- reproducible, whoever shares the batch


def value_free(index: int | None) -> list[Scheduler]:
    """The value-free schedulers for the whole batch, or for its run `index` alone."""

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
    ]


@EVERY_PROBLEM
def test_a_run_is_the_same_alone_and_in_any_batch(name: str) -> None:
    problem = make_problem(name)
    for batched, *single in zip(
        value_free(None), *(value_free(i) for i in range(len(SEEDS))), strict=True
    ):
        together = run(problem, batched, 40)
        for index, scheduler in enumerate(single):
            alone = run(problem, scheduler, 40, seeds=SEEDS[index : index + 1])
            for iterate in ITERATES:
                np.testing.assert_array_equal(
                    together.theta[iterate][:, index], alone.theta[iterate][:, 0]
                )


@EVERY_PROBLEM
@pytest.mark.parametrize("period", [1, 5])
def test_a_maxright_run_is_the_same_alone_and_in_a_batch(name: str, period: int) -> None:
    """Full losses go through BLAS, whose rounding depends on the batch: decisions may only differ
    on a tie. None occurs here, and the steps themselves do not see the losses."""
    problem = make_problem(name)
    optimum = optimum_values(problem)
    together = run(problem, Maxright(LAMS, optimum, period), 40, record_weights=True)
    for index, (lam, seed) in enumerate(zip(LAMS, SEEDS, strict=True)):
        alone = run(
            problem, Maxright((lam,), optimum, period), 40, seeds=(seed,), record_weights=True
        )
        assert together.weights is not None
        assert alone.weights is not None
        np.testing.assert_array_equal(together.weights[:, index], alone.weights[:, 0])
        np.testing.assert_array_equal(together.theta["last"][:, index], alone.theta["last"][:, 0])


def test_a_simulation_is_reproducible_across_a_block_boundary() -> None:
    problem = make_problem("bernoulli")
    first = run(problem, Alright(LAMS, SEEDS), BLOCK + 20)
    run(problem, Mix(0.3), 10, seeds=(77, 78))  # something else in between
    assert_same_runs(first, run(problem, Alright(LAMS, SEEDS), BLOCK + 20))


@EVERY_PROBLEM
def test_runs_with_one_seed_are_equal_and_with_two_seeds_are_not(name: str) -> None:
    trace = run(make_problem(name), Mix(0.5), 30, seeds=(4, 6, 4))
    last = trace.theta["last"][-1]
    np.testing.assert_array_equal(last[0], last[2])
    assert np.any(last[0] != last[1])


@EVERY_PROBLEM
@pytest.mark.parametrize(("lam", "task"), [(1.0, Task.DPO), (0.0, Task.SFT)])
def test_at_lam_0_and_1_every_joint_method_is_a_single_objective(
    name: str, lam: float, task: Task
) -> None:
    """Runs that share a seed see the same samples under every scheduler."""
    problem = make_problem(name)
    expected = run(problem, Single(task), 50)
    assert_same_runs(run(problem, Alright(lam, seed=1), 50), expected)
    assert_same_runs(run(problem, Mix(lam), 50), expected)


@pytest.mark.parametrize("order", ["dpo_then_sft", "sft_then_dpo"])
def test_a_sequence_without_one_of_its_stages_is_a_single_objective(order: str) -> None:
    problem = make_problem("toy2d")
    first, second = (Task.DPO, Task.SFT) if order == "dpo_then_sft" else (Task.SFT, Task.DPO)
    assert_same_runs(run(problem, Sequential(50, order), 50), run(problem, Single(first), 50))
    assert_same_runs(run(problem, Sequential(0, order), 50), run(problem, Single(second), 50))


# --- against a NumPy loop, without noise

STEP_SIZES = pytest.mark.parametrize(
    "step_size", [StepSize(0.4), StepSize(0.3, decay=False)], ids=["decaying", "constant"]
)


@STEP_SIZES
@pytest.mark.parametrize("radius", [0.5, 4.0])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_mix_is_projected_gradient_descent_on_f_mix(
    lam: float, radius: float, step_size: StepSize
) -> None:
    problem = noise_free(radius)
    trace = run(problem, Mix(lam), 60, seeds=(0,), step_size=step_size)
    expected = projected_gradient_descent(
        problem, [(lam, 1.0 - lam)] * 60, step_size, problem.start
    )
    for iterate in ITERATES:
        np.testing.assert_allclose(
            trace.theta[iterate][-1, 0], expected[iterate], rtol=0, atol=EXACT
        )
    on_boundary = np.linalg.norm(trace.theta["last"][:, 0], axis=1) > radius - EXACT
    assert on_boundary.any() == (radius == 0.5)


@STEP_SIZES
def test_alright_is_projected_gradient_descent_along_its_decisions(step_size: StepSize) -> None:
    problem = noise_free(0.5)
    trace = run(problem, Alright(LAMS, SEEDS), 60, step_size=step_size, record_weights=True)
    assert trace.weights is not None
    for index in range(len(SEEDS)):
        expected = projected_gradient_descent(
            problem, trace.weights[:, index].tolist(), step_size, problem.start
        )
        for iterate in ITERATES:
            np.testing.assert_allclose(
                trace.theta[iterate][-1, index], expected[iterate], rtol=0, atol=EXACT
            )


@pytest.mark.parametrize("scale_steps", [False, True])
@pytest.mark.parametrize("period", [1, 4])
def test_maxright_is_projected_gradient_descent_along_its_decisions(
    period: int, scale_steps: bool
) -> None:
    problem = noise_free(0.5)
    scheduler = Maxright(LAMS, optimum_values(problem), period, scale_steps)
    trace = run(problem, scheduler, 60, record_weights=True)
    assert trace.weights is not None
    for index in range(len(SEEDS)):
        weights = trace.weights[:, index].tolist()
        expected = projected_gradient_descent(problem, weights, DECAY, problem.start)
        for iterate in ITERATES:
            np.testing.assert_allclose(
                trace.theta[iterate][-1, index], expected[iterate], rtol=0, atol=EXACT
            )


@EVERY_PROBLEM
@pytest.mark.parametrize("period", [1, 3, 7])
def test_maxright_decides_by_full_losses_that_are_as_old_as_documented(
    name: str, period: int
) -> None:
    """Replayed along the noisy path: both full losses at a refresh, then the stepped one's only,
    taken before its step."""
    problem, lam, num_steps = make_problem(name), 0.4, 60
    optimum = optimum_values(problem)
    trace = run(
        problem,
        Maxright(lam, optimum, period),
        num_steps,
        seeds=(0,),
        step_size=StepSize(problem.step_scale),
        record_steps=range(1, num_steps + 1),
        record_weights=True,
    )
    assert trace.weights is not None
    path = [problem.start, *trace.theta["last"][:-1, 0]]
    values, decisions = np.zeros(2), []
    for step, theta in enumerate(path):
        current = problem.losses(theta)
        if step % period == 0:
            values = current.copy()
        chosen = int(np.argmax(objective_weights(lam) * (values - np.array(optimum))))
        decisions.append(np.eye(2)[chosen])
        values[chosen] = current[chosen]
    np.testing.assert_array_equal(trace.weights[:, 0], decisions)
    assert len(np.unique(decisions, axis=0)) == 2  # both objectives had their turn


@STEP_SIZES
@pytest.mark.parametrize("order", ["dpo_then_sft", "sft_then_dpo"])
@pytest.mark.parametrize("radius", [0.5, 4.0])
def test_sequential_is_two_runs_with_fresh_step_sizes_and_averages(
    order: str, radius: float, step_size: StepSize
) -> None:
    problem = noise_free(radius)
    first, second = [(1.0, 0.0), (0.0, 1.0)] if order == "dpo_then_sft" else [(0, 1), (1, 0)]
    trace = run(
        problem,
        Sequential(25, order),
        60,
        seeds=(0,),
        step_size=step_size,
        record_steps=[25, 26, 60],
    )
    stage1 = projected_gradient_descent(problem, [first] * 25, step_size, problem.start)
    start = projected_gradient_descent(problem, [second], step_size, stage1["last"])
    stage2 = projected_gradient_descent(problem, [second] * 35, step_size, stage1["last"])
    for index, expected in enumerate((stage1, start, stage2)):
        for iterate in ITERATES:
            np.testing.assert_allclose(
                trace.theta[iterate][index, 0], expected[iterate], rtol=0, atol=EXACT
            )


def test_the_stages_of_a_batch_restart_each_at_its_own_step() -> None:
    problem = noise_free()
    splits = (10, 20, 35)
    trace = run(problem, Sequential(splits), 40)
    for index, split in enumerate(splits):
        stage1 = projected_gradient_descent(problem, [(1, 0)] * split, DECAY, problem.start)
        stage2 = projected_gradient_descent(problem, [(0, 1)] * (40 - split), DECAY, stage1["last"])
        for iterate in ITERATES:
            np.testing.assert_allclose(
                trace.theta[iterate][-1, index], stage2[iterate], rtol=0, atol=EXACT
            )


@pytest.mark.parametrize("last", list(Task))
@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9])
def test_sequential_training_ends_at_its_predicted_gap_and_mix_at_none(
    lam: float, last: Task
) -> None:
    """The lower bound of the paper, without noise: G_Mix tends to the limit, not to 0.

    Gradient descent with step 0.4 contracts by 1 - 0.4 * 0.5 or better: 0.8^200 is 1e-20.
    """
    problem = noise_free()
    order = "dpo_then_sft" if last == Task.SFT else "sft_then_dpo"
    constant = StepSize(0.4, decay=False)
    lowest = problem_optima(problem).mix(lam).value
    end = run(problem, Sequential(200, order), 400, (0,), constant).theta["last"][-1, 0]
    joint = run(problem, Mix(lam), 400, (0,), constant).theta["last"][-1, 0]
    assert problem.mix_gap_limit is not None
    limit = problem.mix_gap_limit(last, lam)
    assert limit > 1e-3
    assert float(problem.mix(lam).value(end)) - lowest == pytest.approx(limit, abs=1e-10)
    assert float(problem.mix(lam).value(joint)) - lowest == pytest.approx(0.0, abs=1e-10)


# --- the ball, and the counts


@EVERY_PROBLEM
def test_iterates_and_their_averages_stay_in_the_ball(name: str) -> None:
    problem = replace(make_problem(name), radius=0.3)
    wild = StepSize(20.0, decay=False)
    optimum = (0.0, 0.0)
    for scheduler in (*value_free(None), Maxright(LAMS, optimum, 3)):
        trace = run(problem, scheduler, 50, step_size=wild)
        norms = {name: np.linalg.norm(t, axis=-1) for name, t in trace.theta.items()}
        for norm in norms.values():
            assert norm.max() <= 0.3 * (1.0 + EXACT)
        assert norms["last"].max() > 0.3 * (1.0 - EXACT)  # the projection was at work


def counts(scheduler: Scheduler, num_steps: int = 57) -> tuple[Array, Array, Array]:
    """Gradients (runs, 2), probes (runs, 2) and decisions (T, runs, 2) of a run on toy2d."""
    trace = run(make_problem("toy2d"), scheduler, num_steps, record_weights=True)
    assert trace.weights is not None
    return trace.gradients[-1], trace.probes[-1], trace.weights


def test_mix_pays_for_two_gradients_per_step() -> None:
    gradients, probes, _ = counts(Mix(LAMS))
    assert gradients.tolist() == [[57, 57]] * 3
    assert probes.sum() == 0


def test_alright_pays_for_one_gradient_per_step() -> None:
    gradients, probes, weights = counts(Alright(LAMS, SEEDS))
    assert gradients.sum(axis=1).tolist() == [57] * 3
    np.testing.assert_array_equal(gradients, weights.sum(axis=0))
    assert probes.sum() == 0


@pytest.mark.parametrize("order", ["dpo_then_sft", "sft_then_dpo"])
def test_sequential_pays_for_its_two_stages(order: str) -> None:
    gradients, probes, _ = counts(Sequential((0, 20, 57), order))
    first, second = (0, 1) if order == "dpo_then_sft" else (1, 0)
    assert gradients[:, first].tolist() == [0, 20, 57]
    assert gradients[:, second].tolist() == [57, 37, 0]
    assert probes.sum() == 0


def test_exact_maxright_probes_both_losses_at_every_step() -> None:
    optimum = optimum_values(make_problem("toy2d"))
    gradients, probes, weights = counts(Maxright(LAMS, optimum, 1))
    np.testing.assert_array_equal(gradients, weights.sum(axis=0))
    assert probes.tolist() == [[57, 57]] * 3


@pytest.mark.parametrize("period", [2, 10, 100])
def test_stale_maxright_probes_both_losses_per_refresh_and_one_per_step(period: int) -> None:
    optimum = optimum_values(make_problem("toy2d"))
    gradients, probes, weights = counts(Maxright(LAMS, optimum, period))
    np.testing.assert_array_equal(gradients, weights.sum(axis=0))
    assert gradients.sum(axis=1).tolist() == [57] * 3
    np.testing.assert_array_equal(probes, -(-57 // period) + gradients)


def test_scaled_steps_do_not_change_the_counts() -> None:
    optimum = optimum_values(make_problem("toy2d"))
    gradients, _, _ = counts(Maxright(LAMS, optimum, 5, scale_steps=True))
    assert gradients.sum(axis=1).tolist() == [57] * 3


def test_counts_accumulate_over_the_records() -> None:
    trace = run(make_problem("bernoulli"), Mix(0.5), 40, record_steps=[1, 10, 40])
    assert trace.gradients[:, 0, 0].tolist() == [1, 10, 40]


# --- noise: closed forms of SGD on a quadratic


def test_sgd_s_noise_floor_and_averaging_have_their_closed_forms() -> None:
    """E[f - f*] is alpha tr(V)/4 at the last iterate and tr(H^-1 V)/(2T) for the uniform average.

    Next orders: 1/(1 - alpha h/2) <= 1.05 for the first and, for the second, the start-up of the
    averaging, about 1/(alpha h T) = 2% for the smallest h: within the 15% allowed here on top of 4
    standard errors. The last iterate is recorded every 200 steps, 5 relaxation times apart.
    """
    dim, noise, alpha, num_steps = 3, 0.5, 0.05, 2000
    problem = centred_quadratic(dim, noise)
    objective = problem.objectives[Task.DPO]
    trace = run(
        problem,
        Single(Task.DPO),
        num_steps,
        seeds=range(400),
        step_size=StepSize(alpha, decay=False),
        record_steps=range(400, num_steps + 1, 200),
    )
    floor = alpha * noise**2 * dim / 4
    measured, error = mean_and_error(objective.value(trace.theta["last"]).mean(axis=0))
    assert abs(measured - floor) <= 0.15 * floor + 4 * error
    assert error < 0.05 * floor

    eigenvalues = np.linalg.eigvalsh(objective.hessian(problem.start))
    average = noise**2 * np.sum(1.0 / eigenvalues) / (2 * num_steps)
    measured, error = mean_and_error(objective.value(trace.theta["uniform"][-1]))
    assert abs(measured - average) <= 0.15 * average + 4 * error
    assert error < 0.06 * average


def test_sgd_s_mean_is_gradient_descent() -> None:
    """On a quadratic the noise is linear: E theta_t is the noise-free iterate."""
    problem = replace(quadratic(dim=3, noise=0.5), radius=100.0)
    trace = run(problem, Mix(0.4), 50, seeds=range(2000), record_steps=[50])
    expected = projected_gradient_descent(problem, [(0.4, 0.6)] * 50, DECAY, problem.start)
    for iterate in ITERATES:
        theta = trace.theta[iterate][0]
        error = theta.std(axis=0, ddof=1) / math.sqrt(2000)
        assert np.all(np.abs(theta.mean(axis=0) - expected[iterate]) <= 4.5 * error)


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
    """Alternates; at every 7th step it looks at the losses and steps on the larger."""

    def select(self, state: ScheduleState, probe: Probe) -> tuple[Array, ScheduleState]:
        if state.step % 7:
            return np.eye(2)[state.step % 2], state
        losses = probe()
        return np.eye(2)[losses.argmax(axis=-1)], state


@EVERY_PROBLEM
def test_steps_decided_ahead_are_the_steps_taken_one_at_a_time(name: str) -> None:
    problem = make_problem(name)
    record = [1, AHEAD - 1, AHEAD, AHEAD + 1, 2 * AHEAD + 30]
    schedulers = [*value_free(None), Sequential((AHEAD - 1, AHEAD, AHEAD + 1)), Glance()]
    for scheduler in schedulers:
        options = {"record_steps": record, "record_weights": True}
        ahead = run(problem, scheduler, 2 * AHEAD + 40, **options)
        single = run(problem, scheduler, 2 * AHEAD + 40, rule=DoNothing(), **options)
        assert_same_runs(ahead, single)
        assert ahead.weights is not None
        assert single.weights is not None
        assert len(ahead.weights) == 2 * AHEAD + 40
        np.testing.assert_array_equal(ahead.weights, single.weights)
        np.testing.assert_array_equal(ahead.probes, single.probes)


def test_steps_decided_ahead_respect_the_blocks_of_the_random_numbers() -> None:
    problem = make_problem("bernoulli")
    scheduler = Alright(LAMS, SEEDS)
    steps = BLOCK + AHEAD + 3
    ahead = run(problem, scheduler, steps, record_steps=[700, steps])
    assert_same_runs(
        ahead, run(problem, scheduler, steps, record_steps=[700, steps], rule=DoNothing())
    )


@EVERY_PROBLEM
def test_an_objective_s_kernel_is_known_by_its_data(name: str) -> None:
    for objective in make_problem(name).objectives:
        kernel, data = objective.compiled
        assert KERNELS[tuple(np.ndim(part) for part in data)] is kernel


# --- minibatches


@EVERY_PROBLEM
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_minibatch_gradient_is_the_mean_over_its_samples(name: str, batch_size: int) -> None:
    """Each of the first three steps, from theta_t and the samples t b, .., t b + b - 1."""
    problem, lam, alpha = make_problem(name), 0.3, 0.01
    trace = run(
        problem,
        Mix(lam),
        3,
        seeds=(5,),
        step_size=StepSize(alpha, decay=False),
        record_steps=[1, 2, 3],
        batch_size=batch_size,
    )
    theta = problem.start
    for step, after in enumerate(trace.theta["last"][:, 0]):
        rows = slice(step * batch_size, (step + 1) * batch_size)
        gradient = np.zeros(problem.dim)
        streams = (Stream.DPO_SAMPLE, Stream.SFT_SAMPLE)
        for w, f, stream in zip((lam, 1 - lam), problem.objectives, streams, strict=True):
            samples, _ = sample_gradients(f, theta, f.draws((5,), stream, 0)[0, rows])
            gradient += w * samples.mean(axis=0)
        np.testing.assert_allclose(after, theta - alpha * gradient, rtol=0, atol=EXACT)
        theta = after


def test_without_noise_the_batch_size_changes_nothing() -> None:
    problem = noise_free()
    single = run(problem, Alright(LAMS, SEEDS), 50)
    for batch_size in (2, 5):
        batch = run(problem, Alright(LAMS, SEEDS), 50, batch_size=batch_size)
        for iterate in ITERATES:
            np.testing.assert_allclose(
                batch.theta[iterate], single.theta[iterate], rtol=0, atol=EXACT
            )
        np.testing.assert_array_equal(batch.gradients, single.gradients)


def test_a_minibatch_of_b_has_one_bth_of_the_noise() -> None:
    """Squared length of the first step's noise; relative error sqrt(2 / (3 * 800)) = 2.9% each."""
    problem = centred_quadratic(dim=3, noise=0.5)
    squares = {
        size: np.sum(
            run(problem, Single(Task.DPO), 1, seeds=range(800), batch_size=size).theta["last"][-1]
            ** 2,
        )
        for size in (1, 8)
    }
    assert squares[1] / squares[8] == pytest.approx(8.0, rel=4.5 * math.sqrt(2) * 0.029)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_an_empty_minibatch_is_an_error(batch_size: int) -> None:
    with pytest.raises(ValueError, match="batch_size is"):
        run(noise_free(), Mix(0.5), 3, batch_size=batch_size)


# --- the convergence theorems, as upper bounds


def alright_bound(distance: float, second_moment: float, scale: float, steps: int) -> float:
    """T1: (D^2 + c^2 M^2 (1 + ln T)) / (4 c (sqrt(T + 1) - 1)), the weighted average."""
    numerator = distance**2 + scale**2 * second_moment * (1.0 + math.log(steps))
    return numerator / (4.0 * scale * (math.sqrt(steps + 1) - 1.0))


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("name", ["bernoulli", "toy2d"])
def test_alright_s_weighted_average_is_within_its_bound(name: str, lam: float) -> None:
    problem = make_problem(name)
    seeds = tuple(range(100))
    trace = run(
        problem,
        Alright((lam,) * 100, seeds),
        1000,
        seeds=seeds,
        step_size=StepSize(problem.step_scale),
        record_steps=[10, 100, 1000],
    )
    optimum = problem_optima(problem).mix(lam)
    moments = [f.constants(problem.radius).gradient_norm ** 2 for f in problem.objectives]
    second_moment = lam * moments[0] + (1.0 - lam) * moments[1]
    distance = float(np.linalg.norm(problem.start - optimum.theta))
    for index, steps in enumerate(trace.steps.tolist()):
        gaps = problem.mix(lam).value(trace.theta["weighted"][index])
        gap, error = mean_gap(gaps, optimum.value)
        bound = alright_bound(distance, second_moment, problem.step_scale, steps)
        assert -1e-8 <= gap <= bound + 4 * error


@pytest.mark.parametrize("lam", [0.3, 0.5])
@pytest.mark.parametrize("name", ["bernoulli", "toy2d"])
def test_scaled_exact_maxright_s_weighted_average_is_within_its_bound(
    name: str, lam: float
) -> None:
    """T2: the subgradient method on f_Max, (D^2 + M_s^2 sum alpha^2) / (2 sum alpha)."""
    problem = make_problem(name)
    optima = problem_optima(problem)
    trace = run(
        problem,
        Maxright((lam,) * 50, optima.values, 1, scale_steps=True),
        500,
        seeds=range(50),
        step_size=StepSize(problem.step_scale),
        record_steps=[10, 100, 500],
    )
    weights = objective_weights(lam)
    norms = [f.constants(problem.radius).gradient_norm for f in problem.objectives]
    largest = float(np.max(weights * norms))
    lowest = optima.max(lam)
    distance = float(np.linalg.norm(problem.start - lowest.theta))
    for index, steps in enumerate(trace.steps.tolist()):
        alpha = problem.step_scale / np.sqrt(np.arange(1, steps + 1))
        bound = (distance**2 + largest**2 * np.sum(alpha**2)) / (2 * alpha.sum())
        losses = problem.losses(trace.theta["weighted"][index])
        heights = np.max(weights * (losses - np.array(optima.values)), axis=-1)
        gap, error = mean_gap(heights, lowest.value)
        assert -1e-8 <= gap <= bound + 4 * error


def test_joint_methods_keep_improving_where_sequential_training_has_stopped() -> None:
    """p = .9, q = .1, lam = 1/2: sequential ends near log(5/3), ALRIGHT far below it."""
    problem = make_problem("bernoulli")
    seeds = tuple(range(100))
    lowest = problem_optima(problem).mix(0.5).value
    step_size = StepSize(problem.step_scale)
    gaps = {}
    for label, scheduler in {
        "sequential": Sequential(1000),
        "alright": Alright((0.5,) * 100, seeds),
    }.items():
        trace = run(problem, scheduler, 2000, seeds, step_size, record_steps=[2000])
        values = problem.mix(0.5).value(trace.theta["uniform"][0])
        gaps[label] = mean_gap(values, lowest)
    assert abs(gaps["sequential"][0] - math.log(5 / 3)) <= 0.1
    assert gaps["alright"][0] + 4 * gaps["alright"][1] <= 0.02
