"""Where MAXRIGHT's losses come from: certified decisions, counted probes, independent samples."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from _asserts import EXACT, points_in_ball, sample_gradients
from numpy.typing import NDArray

from theory.kernels import tangent_bounds
from theory.objectives import Quadratic
from theory.optima import problem_optima
from theory.problems import PROBLEMS, Problem, make_problem
from theory.schedulers import Array, Maxright, Mix
from theory.scheduling import Probe, Scheduler, ScheduleState
from theory.simulate import Loop, StepSize, Trace, simulate
from theory.tasks import Task
from theory.values import PROBE_STREAMS, SAMPLE_STREAMS

EVERY_PROBLEM = pytest.mark.parametrize("name", PROBLEMS)
LAMS = (0.05, 0.2, 0.5, 0.8, 0.95)
STEPS = 400


def maxright(name: str, values: str, num_steps: int = STEPS, **options: float) -> Trace:
    problem = make_problem(name)
    scheduler = Maxright(LAMS, problem_optima(problem).values, **options)  # type: ignore[arg-type]
    return simulate(
        problem,
        scheduler,
        num_steps=num_steps,
        step_size=StepSize(problem.step_scale),
        seeds=range(len(LAMS)),
        values=values,
        record_weights=True,
    )


@dataclass(frozen=True)
class Recorder(Scheduler):
    """Steps on both objectives; remembers what it is told about the losses at every step."""

    probed: list[Array] = field(default_factory=list)
    observed: list[Array] = field(default_factory=list)

    @property
    def reads_losses(self) -> bool:
        return True

    @property
    def forgets_values(self) -> bool:
        return False

    def select(self, state: ScheduleState, probe: Probe) -> tuple[Array, ScheduleState]:
        self.probed.append(probe().copy())
        return np.array([0.5, 0.5]), state

    def observe(self, state: ScheduleState, losses: Array | None = None) -> ScheduleState:
        assert losses is not None
        self.observed.append(losses.copy())
        return ScheduleState(state.step + 1)


def record(
    name: str, values: str, runs: int, num_steps: int, batch_size: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64], Trace]:
    """Losses probed and observed, (steps, runs, 2) each, and the trace with every iterate."""
    problem, recorder = make_problem(name), Recorder()
    trace = simulate(
        problem,
        recorder,
        num_steps=num_steps,
        step_size=StepSize(problem.step_scale),
        seeds=range(runs),
        record_steps=range(1, num_steps + 1),
        batch_size=batch_size,
        values=values,
    )
    return np.stack(recorder.probed), np.stack(recorder.observed), trace


# --- lazy: the decisions of exact values at fewer evaluations


@EVERY_PROBLEM
@pytest.mark.parametrize("scale_steps", [False, True])
def test_lazy_values_decide_as_exact_ones_and_never_probe_more(
    name: str, scale_steps: bool
) -> None:
    exact = maxright(name, "exact", refresh_every=1, scale_steps=scale_steps)
    lazy = maxright(name, "lazy", refresh_every=1, scale_steps=scale_steps)
    assert exact.weights is not None
    assert lazy.weights is not None
    np.testing.assert_array_equal(lazy.weights, exact.weights)
    np.testing.assert_array_equal(lazy.theta["last"], exact.theta["last"])
    assert len(np.unique(exact.weights[:, 2], axis=0)) == 2  # both objectives had their turn
    assert np.all(lazy.probes <= exact.probes)
    assert lazy.probes[-1].sum() < 0.7 * exact.probes[-1].sum()


@EVERY_PROBLEM
def test_the_bounds_of_lazy_values_bracket_every_loss(name: str) -> None:
    """f(a) + <g, d> <= f(a + d) <= f(a) + <g, d> + L |d|^2 / 2, whatever a and d in the ball."""
    problem = make_problem(name)
    rng = np.random.default_rng(0)
    runs, dim = 200, problem.dim
    points = points_in_ball(rng, runs, dim, problem.radius)
    anchors = points_in_ball(rng, 2 * runs, dim, problem.radius)[rng.permutation(2 * runs)]
    anchors = anchors.reshape(runs, 2, dim)
    anchors[0] = points[0]  # no displacement: no gap
    objectives = problem.objectives
    values = np.stack([f.value(anchors[:, i]) for i, f in enumerate(objectives)], axis=1)
    slopes = np.stack([f.gradient(anchors[:, i]) for i, f in enumerate(objectives)], axis=1)
    smoothness = np.array([f.constants(problem.radius).smoothness for f in objectives])
    low, high = np.empty((runs, 2)), np.empty((runs, 2))
    tangent_bounds(points, anchors, values, slopes, smoothness, low, high)
    losses = problem.losses(points)
    rounding = EXACT * (1.0 + np.abs(losses) + np.abs(low) + np.abs(high))
    assert np.all(low <= losses + rounding)
    assert np.all(losses <= high + rounding)
    np.testing.assert_array_equal(low[0], values[0])
    np.testing.assert_array_equal(high[0], values[0])


# --- exact, fresh, same: what the scheduler is told


@EVERY_PROBLEM
def test_exact_values_are_the_full_losses_before_the_step(name: str) -> None:
    probed, observed, trace = record(name, "exact", runs=3, num_steps=20)
    problem = make_problem(name)
    path = np.concatenate([np.zeros((1, 3, problem.dim)), trace.theta["last"][:-1]])
    losses = problem.losses(path)
    np.testing.assert_allclose(probed, losses, rtol=EXACT, atol=EXACT)
    np.testing.assert_allclose(observed, losses, rtol=EXACT, atol=EXACT)


@EVERY_PROBLEM
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_same_minibatch_is_probed_and_stepped_on(name: str, batch_size: int) -> None:
    probed, observed, _ = record(name, "same", runs=4, num_steps=20, batch_size=batch_size)
    np.testing.assert_array_equal(probed, observed)


@pytest.mark.parametrize("name", ["quadratic", "softmax"])
def test_a_fresh_minibatch_is_independent_of_the_one_stepped_on(name: str) -> None:
    """At the start, where every run has the same parameters: correlation 0 within 4.5 errors."""
    runs = 1000
    probed, observed, _ = record(name, "fresh", runs=runs, num_steps=1)
    for task in range(2):
        if np.ptp(observed[0, :, task]) > EXACT:  # softmax: both losses are constant at theta = 0
            correlation = np.corrcoef(probed[0, :, task], observed[0, :, task])[0, 1]
            assert abs(correlation) <= 4.5 / np.sqrt(runs)
    later, own, _ = record(name, "fresh", runs=300, num_steps=3)
    assert np.all(np.any(later[1:] != own[1:], axis=(0, 1)))


@EVERY_PROBLEM
@pytest.mark.parametrize("values", ["fresh", "same"])
def test_minibatch_values_are_unbiased(name: str, values: str) -> None:
    """Averaged over seeds at the second step they differ from the full losses by noise only."""
    probed, _, trace = record(name, values, runs=1000, num_steps=2)
    problem = make_problem(name)
    error = probed[1] - problem.losses(trace.theta["last"][0])
    deviation = error.std(axis=0, ddof=1) / np.sqrt(len(error))
    assert np.all(deviation > 0.0)
    assert np.all(np.abs(error.mean(axis=0)) <= 4.5 * deviation)


def test_a_minibatch_of_16_has_a_sixteenth_of_the_variance() -> None:
    """Relative standard error of a Gaussian variance over 1000 seeds: sqrt(2 / 1000) = 4.5%."""
    single, _, _ = record("quadratic", "fresh", runs=1000, num_steps=1)
    batch, _, _ = record("quadratic", "fresh", runs=1000, num_steps=1, batch_size=16)
    ratio = single[0].var(axis=0) / batch[0].var(axis=0)
    np.testing.assert_allclose(ratio, 16.0, rtol=4.5 * np.sqrt(2) * 0.045)


# --- what each source costs


@pytest.mark.parametrize("values", ["fresh", "same"])
@pytest.mark.parametrize("period", [1, 7])
def test_minibatch_probes_are_paid_at_refreshes_only(values: str, period: int) -> None:
    trace = maxright("toy2d", values, num_steps=57, refresh_every=period)
    assert np.all(trace.probes[-1] == -(-57 // period))
    assert np.all(trace.gradients[-1].sum(axis=1) == 57)


def test_probing_does_not_disturb_the_samples_of_the_steps() -> None:
    """Along equal decisions the paths are equal, whatever the values came from."""
    problem = make_problem("softmax")
    paths = [
        simulate(
            problem,
            Maxright(1.0, (0.0, 0.0), refresh_every=1),  # lam = 1: always DPO, once f_DPO > 0
            num_steps=30,
            step_size=StepSize(1.0),
            seeds=range(3),
            values=values,
        ).theta["last"]
        for values in ("exact", "lazy", "fresh", "same")
    ]
    for path in paths[1:]:
        np.testing.assert_array_equal(path, paths[0])


# --- Gram matrices


@dataclass(frozen=True)
class MinNorm(Scheduler):
    """Steps along the shortest convex combination of the two gradients (MGDA); remembers them."""

    grams: list[Array] = field(default_factory=list)
    reads_gram = True

    def select(self, state: ScheduleState, probe: Probe) -> tuple[Array, ScheduleState]:
        self.grams.append(probe.gram().copy())
        first, inner, second = np.moveaxis(self.grams[-1], -1, 0)
        spread = np.maximum(first - 2.0 * inner + second, 1e-300)
        share = np.clip((second - inner) / spread, 0.0, 1.0)
        return np.stack([share, 1.0 - share], axis=-1), state


@EVERY_PROBLEM
@pytest.mark.parametrize("values", ["exact", "fresh", "same"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_gram_matrix_is_that_of_the_gradients_at_the_current_parameters(
    name: str, values: str, batch_size: int
) -> None:
    """Of the full gradients, or the mean over the samples t b, .., t b + b - 1 of a minibatch."""
    problem, scheduler, seeds, steps = make_problem(name), MinNorm(), (3, 4), 20
    step_size = StepSize(0.01, decay=False)
    trace = simulate(
        problem, scheduler, num_steps=steps, step_size=step_size, seeds=seeds, values=values,
        batch_size=batch_size, record_steps=range(1, steps + 1), record_weights=True,
    )  # fmt: skip
    assert trace.weights is not None
    streams = PROBE_STREAMS if values == "fresh" else SAMPLE_STREAMS
    path = np.concatenate([np.zeros((1, 2, problem.dim)), trace.theta["last"]])
    for t, run in np.ndindex(steps, len(seeds)):
        theta, rows = path[t, run], slice(t * batch_size, (t + 1) * batch_size)
        gradients = np.stack([f.gradient(theta) for f in problem.objectives])
        if values != "exact":
            for task, f in enumerate(problem.objectives):
                draws = f.draws((seeds[run],), streams[Task(task)], 0)[0, rows]
                gradients[task] = sample_gradients(f, theta, draws)[0].mean(axis=0)
        expected = (gradients @ gradients.T)[[0, 0, 1], [0, 1, 1]]
        scale = 1.0 + expected.max()
        found = scheduler.grams[t][run]
        np.testing.assert_allclose(found, expected, rtol=0, atol=EXACT * scale)
        if values == "same":  # the step is along the very gradients of the Gram matrix
            moved = theta - 0.01 * trace.weights[t, run] @ gradients
            np.testing.assert_allclose(path[t + 1, run], moved, rtol=0, atol=EXACT * scale)
    assert np.all(trace.probes[-1] == (0 if values == "same" else steps))


class NoFullGradient(Quadratic):
    compiled = Quadratic.compiled

    def gradient(self, theta: Array) -> Array:
        raise AssertionError("nobody asked for it")


@pytest.mark.parametrize("values", ["exact", "fresh", "same"])
@pytest.mark.parametrize("scheduler", [Mix(0.5), Maxright(0.5, (0.0, 0.0), refresh_every=3)])
def test_a_schedule_that_asks_for_no_gradient_causes_none(
    values: str, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> Array:
        raise AssertionError("nobody asked for it")

    monkeypatch.setattr(Loop, "sample_gradients", refuse)
    objective = NoFullGradient(np.eye(2), np.ones(2), 0.1)
    problem = Problem("own", (objective, objective), 3.0, 1.0)
    simulate(
        problem, scheduler, num_steps=9, step_size=StepSize(0.1), seeds=range(2), values=values
    )


def test_lazy_values_say_what_a_schedule_that_asks_for_gradients_must_declare() -> None:
    @dataclass(frozen=True)
    class Silent(MinNorm):
        reads_gram = False
        forgets_values = True

    with pytest.raises(ValueError, match="values='lazy' gives no gradients: Silent must set"):
        simulate(
            make_problem("toy2d"), Silent(), num_steps=3, step_size=StepSize(0.1), seeds=(0,),
            values="lazy",
        )  # fmt: skip
