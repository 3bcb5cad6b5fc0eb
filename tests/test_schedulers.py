"""The schedulers as decision rules: shapes, frequencies, argmax, probes, resumption, registry."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from _asserts import (
    EXACT,
    assert_binomial,
    assert_is_plain_data,
    assert_one_hot,
    assert_one_line_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from theory.randomness import BLOCK
from theory.registry import make_scheduler, scheduler_options
from theory.schedulers import (
    ORDERS,
    REGISTRY,
    Alright,
    Alternate,
    Importance,
    Maxright,
    Mix,
    Scheduler,
    ScheduleState,
    Sequential,
    Single,
    objective_weights,
)
from theory.tasks import Task

Array = NDArray[np.float64]

DPO, SFT = [1.0, 0.0], [0.0, 1.0]
LAMS = st.floats(0.0, 1.0)
# Multiples of 1/64 below 2^10 times lam in quarters: MAXRIGHT's arithmetic on them is exact.
DYADIC = st.integers(-1000, 1000).map(lambda n: n / 64)
DYADIC_LAM = st.sampled_from([0.25, 0.5, 0.75])

OPTIONS: dict[str, dict[str, Any]] = {
    "sequential": {"first_steps": 7, "order": "sft_then_dpo"},
    "mix": {"lam": 0.3},
    "alright": {"lam": 0.3, "seed": 5},
    "maxright": {
        "lam": 0.3,
        "optimum": (0.1, 0.2),
        "refresh_every": 3,
        "scale_steps": True,
        "value_ema": 0.5,
    },
    "importance": {"lam": 0.3, "dpo_probability": 0.6, "seed": 5},
    "alternate": {"lam": 0.3, "cycle": 10},
    "dpo": {},
    "sft": {},
}
BATCHES: dict[str, Scheduler] = {
    "sequential": Sequential((0, 3, 20)),
    "mix": Mix((0.1, 0.5, 0.9)),
    "alright": Alright((0.1, 0.5, 0.9), seed=(4, 5, 6)),
    "maxright": Maxright((0.1, 0.5, 0.9), optimum=(0.1, 0.2), refresh_every=3),
    "importance": Importance((0.1, 0.5, 0.9), (0.5, 0.5, 0.2), seed=(4, 5, 6)),
    "alternate": Alternate((0.1, 0.5, 0.9), cycle=(10, 2, 7)),
}


def no_probe() -> Array:
    raise AssertionError("this scheduler must not probe")


class ToyLosses:
    """Losses of a training that goes well: loss_i = 1 / (1 + i-th objective's steps) + floor_i.

    Records the steps at which it is probed.
    """

    def __init__(self, runs: tuple[int, ...] = ()) -> None:
        self.floor = np.array([0.1, 0.2])
        self.counts = np.zeros((*runs, 2))
        self.probed: list[int] = []
        self.step = 0

    def values(self) -> Array:
        return 1.0 / (1.0 + self.counts) + self.floor

    def probe(self) -> Array:
        self.probed.append(self.step)
        return self.values()

    def take(self, weights: Array) -> Array:
        """Losses of the stepped objectives, NaN elsewhere, as the loops report them."""
        losses = np.where(weights != 0.0, self.values(), np.nan)
        self.counts += weights != 0.0
        self.step += 1
        return losses


def drive(
    scheduler: Scheduler,
    steps: int,
    losses: ToyLosses | None = None,
    state: ScheduleState | None = None,
) -> tuple[Array, ScheduleState]:
    """Weights of `steps` steps, (steps, *runs, 2), and the state they leave."""
    losses = losses or ToyLosses(scheduler.runs)
    state = scheduler.init() if state is None else state
    decisions = []
    for _ in range(steps):
        weights, state = scheduler.select(state, losses.probe)
        state = scheduler.observe(state, losses.take(weights))
        decisions.append(weights)
    return np.stack(decisions), state


def select_once(scheduler: Scheduler, values: Any) -> list[float]:
    weights, _ = scheduler.select(scheduler.init(), lambda: np.asarray(values, dtype=float))
    return weights.tolist()


# --- every scheduler


def test_task_order_is_dpo_then_sft_everywhere() -> None:
    assert objective_weights(0.3).tolist() == [0.3, 0.7]
    assert (int(Task.DPO), int(Task.SFT)) == (0, 1)
    assert Task.DPO.other is Task.SFT
    assert Task.SFT.other is Task.DPO


@pytest.mark.parametrize("name", REGISTRY)
def test_one_run_has_weights_of_shape_2_and_steps_are_counted(name: str) -> None:
    scheduler = make_scheduler(name, **OPTIONS[name])
    decisions, state = drive(scheduler, 12)
    assert scheduler.runs == ()
    assert decisions.shape == (12, 2)
    assert state.step == 12


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_has_one_row_of_weights_per_run(name: str) -> None:
    scheduler = BATCHES[name]
    decisions, _ = drive(scheduler, 12)
    assert scheduler.runs == (3,)
    assert decisions.shape == (12, 3, 2)


@pytest.mark.parametrize("name", ["sequential", "alright", "dpo", "sft"])
def test_one_objective_at_a_time_means_one_hot_weights(name: str) -> None:
    assert_one_hot(drive(make_scheduler(name, **OPTIONS[name]), 50)[0])


@pytest.mark.parametrize("name", ["sequential", "alright", "maxright"])
def test_one_hot_weights_in_batches(name: str) -> None:
    assert_one_hot(drive(BATCHES[name], 50)[0])


@pytest.mark.parametrize("name", [name for name in REGISTRY if name != "maxright"])
def test_only_maxright_probes(name: str) -> None:
    losses = ToyLosses()
    scheduler = make_scheduler(name, **OPTIONS[name])
    drive(scheduler, 50, losses)
    assert losses.probed == []
    assert not scheduler.reads_losses


@pytest.mark.parametrize("name", [*REGISTRY, *(f"{name} batch" for name in BATCHES)])
@pytest.mark.parametrize("pause", [0, 1, 7, 10])
def test_resuming_from_json_takes_the_same_decisions(name: str, pause: int) -> None:
    short = name.removesuffix(" batch")
    scheduler = BATCHES[short] if name.endswith("batch") else make_scheduler(short, **OPTIONS[name])
    expected, _ = drive(scheduler, 30)

    losses = ToyLosses(scheduler.runs)
    before, state = drive(scheduler, pause, losses) if pause else (expected[:0], scheduler.init())
    after, _ = drive(scheduler, 30 - pause, losses, assert_is_plain_data(state))
    np.testing.assert_array_equal(np.concatenate([before, after]), expected)


@pytest.mark.parametrize("name", REGISTRY)
def test_schedulers_are_immutable_values(name: str) -> None:
    scheduler = make_scheduler(name, **OPTIONS[name])
    twin = make_scheduler(name, **OPTIONS[name])
    assert scheduler == twin
    assert hash(scheduler) == hash(twin)
    field = dataclasses.fields(scheduler)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(scheduler, field, None)


@pytest.mark.parametrize("name", REGISTRY)
def test_select_does_not_change_the_state_it_is_given(name: str) -> None:
    scheduler = make_scheduler(name, **OPTIONS[name])
    state = ScheduleState(4, np.array([3.0, 4.0]))
    scheduler.select(state, no_probe)
    scheduler.observe(state, np.array([1.0, np.nan]))
    assert state.step == 4
    assert state.values is not None
    assert state.values.tolist() == [3.0, 4.0]


# --- single objectives and Mix


@pytest.mark.parametrize(("task", "expected"), [(Task.DPO, DPO), (Task.SFT, SFT)])
def test_single_steps_on_its_task_only(task: Task, expected: list[float]) -> None:
    assert drive(Single(task), 5)[0].tolist() == [expected] * 5
    assert drive(make_scheduler(task.label), 5)[0].tolist() == [expected] * 5


@given(LAMS)
@settings(deadline=None)
def test_mix_weights_are_lam_and_its_complement(lam: float) -> None:
    assert drive(Mix(lam), 2)[0].tolist() == [[lam, 1.0 - lam]] * 2


def test_mix_weights_are_shared_and_therefore_read_only() -> None:
    weights, _ = Mix(0.25).select(ScheduleState(), no_probe)
    with pytest.raises(ValueError, match="read-only"):
        weights[0] = 1.0


# --- Sequential


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 40), st.sampled_from(sorted(ORDERS)))
def test_sequential_takes_first_steps_on_one_then_the_rest_on_the_other(
    first_steps: int, order: str
) -> None:
    decisions, _ = drive(Sequential(first_steps, order), 30)
    first, second = (DPO, SFT) if order == "dpo_then_sft" else (SFT, DPO)
    taken = min(first_steps, 30)
    assert decisions.tolist() == [first] * taken + [second] * (30 - taken)


def test_sequential_order_defaults_to_what_people_do() -> None:
    assert Sequential(3) == Sequential(3, "sft_then_dpo")


def test_stage_starts_at_0_and_at_first_steps() -> None:
    scheduler = Sequential(3)
    assert [int(scheduler.stage_start(step)) for step in range(6)] == [0, 0, 0, 3, 3, 3]


@pytest.mark.parametrize("order", ORDERS)
def test_a_sequential_batch_equals_its_single_runs(order: str) -> None:
    first_steps = (0, 1, 5, 30, 99)
    batch = Sequential(first_steps, order)
    decisions, _ = drive(batch, 30)
    for run, count in enumerate(first_steps):
        single = Sequential(count, order)
        np.testing.assert_array_equal(decisions[:, run], drive(single, 30)[0])
        for step in (0, count - 1, count, count + 1):
            assert batch.stage_start(step)[run] == single.stage_start(step)


@pytest.mark.parametrize("name", [name for name in REGISTRY if name != "sequential"])
def test_joint_methods_have_one_stage(name: str) -> None:
    scheduler = make_scheduler(name, **OPTIONS[name])
    assert [scheduler.stage_start(step) for step in (0, 7, 1000)] == [0, 0, 0]


# --- ALRIGHT


@pytest.mark.parametrize("lam", [0.01, 0.1, 0.5, 0.9])
def test_alright_draws_dpo_with_frequency_lam_over_steps(lam: float) -> None:
    decisions, _ = drive(Alright(lam, seed=11), 5000)
    assert_binomial(int(decisions[:, Task.DPO].sum()), 5000, lam)


@pytest.mark.parametrize("step", [0, 1, BLOCK - 1, BLOCK])
@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9])
def test_alright_draws_dpo_with_frequency_lam_over_seeds(lam: float, step: int) -> None:
    scheduler = Alright((lam,) * 2000, seed=tuple(range(2000)))
    weights, _ = scheduler.select(ScheduleState(step), no_probe)
    assert_binomial(int(weights[:, Task.DPO].sum()), 2000, lam)


@pytest.mark.parametrize(("lam", "expected"), [(1.0, DPO), (0.0, SFT)])
def test_alright_at_lam_0_and_1_is_a_single_objective(lam: float, expected: list[float]) -> None:
    assert drive(Alright(lam, seed=3), 2000)[0].tolist() == [expected] * 2000


@settings(deadline=None, max_examples=10)
@given(st.floats(0.05, 0.95))
def test_alright_weights_are_those_of_mix_in_expectation(lam: float) -> None:
    """E w = (lam, 1 - lam): what makes its step an unbiased gradient of f_Mix."""
    seeds = tuple(range(1000))
    mean = drive(Alright((lam,) * len(seeds), seeds), 5)[0].mean(axis=(0, 1))
    expected = drive(Mix(lam), 1)[0][0]
    # 5000 independent decisions: 4.5 standard deviations of their mean.
    deviation = 4.5 * np.sqrt(lam * (1.0 - lam) / 5000)
    np.testing.assert_allclose(mean, expected, rtol=0, atol=deviation)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(LAMS, st.integers(0, 2**40)), min_size=1, max_size=5))
def test_an_alright_batch_equals_its_single_runs(runs: list[tuple[float, int]]) -> None:
    lam, seed = zip(*runs, strict=True)
    decisions, _ = drive(Alright(lam, seed), 40)
    for index, run in enumerate(runs):
        np.testing.assert_array_equal(decisions[:, index], drive(Alright(*run), 40)[0])


def test_one_seed_serves_every_run_of_a_batch() -> None:
    decisions, _ = drive(Alright((0.2, 0.2, 0.7), seed=8), 100)
    np.testing.assert_array_equal(decisions, drive(Alright((0.2, 0.2, 0.7), (8, 8, 8)), 100)[0])


@settings(deadline=None, max_examples=20)
@given(LAMS, LAMS, st.integers(0, 1000))
def test_at_one_seed_a_larger_lam_only_adds_dpo_steps(a: float, b: float, seed: int) -> None:
    low, high = min(a, b), max(a, b)
    decisions, _ = drive(Alright((low, high), (seed, seed)), 60)
    assert np.all(decisions[:, 0, Task.DPO] <= decisions[:, 1, Task.DPO])


def test_alright_decisions_differ_between_seeds() -> None:
    decisions, _ = drive(Alright((0.5, 0.5), seed=(0, 1)), 100)
    assert np.any(decisions[:, 0] != decisions[:, 1])


def test_alright_decides_by_the_step_alone() -> None:
    scheduler = Alright(0.5, seed=2)
    expected, _ = drive(scheduler, 2 * BLOCK + 3)
    for step in (2 * BLOCK + 2, 0, BLOCK, BLOCK - 1):
        weights, _ = scheduler.select(ScheduleState(step), no_probe)
        np.testing.assert_array_equal(weights, expected[step])


# --- MAXRIGHT


@settings(deadline=None)
@given(DYADIC_LAM, st.tuples(DYADIC, DYADIC), st.tuples(DYADIC, DYADIC))
def test_maxright_steps_on_the_larger_weighted_gap(
    lam: float, values: tuple[float, float], optimum: tuple[float, float]
) -> None:
    dpo_height = lam * (values[0] - optimum[0])
    sft_height = (1.0 - lam) * (values[1] - optimum[1])
    expected = DPO if dpo_height >= sft_height else SFT
    assert select_once(Maxright(lam, optimum), values) == expected


@settings(deadline=None)
@given(DYADIC_LAM, DYADIC, st.tuples(DYADIC, DYADIC))
def test_maxright_ties_go_to_dpo(lam: float, height: float, optimum: tuple[float, float]) -> None:
    # lam delta_1 = (1 - lam) delta_2 = lam (1 - lam) height, exactly.
    values = (optimum[0] + (1.0 - lam) * height, optimum[1] + lam * height)
    assert select_once(Maxright(lam, optimum), values) == DPO


@settings(deadline=None)
@given(
    DYADIC_LAM,
    st.tuples(DYADIC, DYADIC),
    st.tuples(DYADIC, DYADIC),
    st.sampled_from([Task.DPO, Task.SFT]),
    DYADIC,
)
def test_maxright_ignores_a_constant_added_to_a_loss_and_its_optimum(
    lam: float,
    values: tuple[float, float],
    optimum: tuple[float, float],
    task: Task,
    constant: float,
) -> None:
    shift = np.zeros(2)
    shift[task] = constant
    moved = tuple((np.array(optimum) + shift).tolist())
    original = select_once(Maxright(lam, optimum), values)
    assert select_once(Maxright(lam, moved), np.array(values) + shift) == original


@settings(deadline=None)
@given(DYADIC_LAM, st.tuples(DYADIC, DYADIC), st.tuples(DYADIC, DYADIC))
def test_scaled_maxright_takes_the_same_decision_times_its_weight(
    lam: float, values: tuple[float, float], optimum: tuple[float, float]
) -> None:
    """w_i grad f_i for the larger h_i is a subgradient of f_Max = max h_i."""
    plain = np.array(select_once(Maxright(lam, optimum), values))
    scaled = np.array(select_once(Maxright(lam, optimum, scale_steps=True), values))
    np.testing.assert_array_equal(scaled, plain * [lam, 1.0 - lam])


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 12))
def test_maxright_probes_at_multiples_of_its_period_only(steps: int, period: int) -> None:
    losses = ToyLosses()
    drive(Maxright(0.4, (0.1, 0.2), refresh_every=period), steps, losses)
    assert losses.probed == list(range(0, steps, period))
    assert len(losses.probed) == -(-steps // period)  # ceil(T / k)


def test_between_refreshes_only_the_stepped_value_is_renewed() -> None:
    scheduler = Maxright(0.5, (0.0, 0.0), refresh_every=10)
    weights, state = scheduler.select(scheduler.init(), lambda: np.array([3.0, 2.0]))
    assert weights.tolist() == DPO
    state = scheduler.observe(state, np.array([1.0, np.nan]))
    assert state.values is not None
    assert state.values.tolist() == [1.0, 2.0]

    weights, state = scheduler.select(state, no_probe)
    assert weights.tolist() == SFT  # the renewed 1 is now below the stale 2
    state = scheduler.observe(state, np.array([np.nan, 0.25]))
    assert state.values is not None
    assert state.values.tolist() == [1.0, 0.25]
    assert scheduler.select(state, no_probe)[0].tolist() == DPO


def test_a_refresh_renews_both_values() -> None:
    scheduler = Maxright(0.5, (0.0, 0.0), refresh_every=4)
    stale = ScheduleState(8, np.array([9.0, 1.0]))
    weights, state = scheduler.select(stale, lambda: np.array([1.0, 5.0]))
    assert weights.tolist() == SFT
    assert state.values is not None
    assert state.values.tolist() == [1.0, 5.0]


def test_values_survive_a_step_without_reported_losses() -> None:
    scheduler = Maxright(0.5, (0.0, 0.0), refresh_every=4)
    state = scheduler.observe(ScheduleState(1, np.array([3.0, 2.0])))
    assert state.step == 2
    assert state.values is not None
    assert state.values.tolist() == [3.0, 2.0]


@pytest.mark.parametrize("period", [1, 3, 10])
@pytest.mark.parametrize("scale_steps", [False, True])
def test_a_maxright_batch_equals_its_single_runs(period: int, scale_steps: bool) -> None:
    lams = (0.1, 0.35, 0.5, 0.9, 1.0)
    options: dict[str, Any] = {
        "optimum": (0.1, 0.2),
        "refresh_every": period,
        "scale_steps": scale_steps,
    }
    decisions, _ = drive(Maxright(lams, **options), 60)
    for run, lam in enumerate(lams):
        np.testing.assert_array_equal(decisions[:, run], drive(Maxright(lam, **options), 60)[0])


def test_exact_maxright_balances_the_weighted_gaps() -> None:
    """With gaps 1/(1 + n_i), lam/(1 + n_1) = (1-lam)/(1 + n_2): DPO's share of steps tends to lam.

    Greedy balancing leaves n_i within one step of the balance.
    """
    for lam in (0.1, 0.3, 0.5, 0.8):
        decisions, _ = drive(Maxright(lam, (0.1, 0.2), refresh_every=1), 400)
        assert abs(decisions[:, Task.DPO].sum() - lam * 402 + 1) <= 1.0 + EXACT


def test_maxright_asks_for_losses_only_between_refreshes() -> None:
    assert not Maxright(0.5, (0.0, 0.0), refresh_every=1).reads_losses
    assert Maxright(0.5, (0.0, 0.0), refresh_every=2).reads_losses


def test_maxright_without_values_between_refreshes_is_an_error() -> None:
    scheduler = Maxright(0.5, (0.0, 0.0), refresh_every=4)
    with pytest.raises(ValueError, match="no loss values"):
        scheduler.select(ScheduleState(step=1), no_probe)


# --- Importance: ALRIGHT with a draw of its own


@settings(deadline=None)
@given(LAMS, st.floats(0.01, 0.99), st.integers(0, 100))
def test_importance_weights_are_those_of_mix_in_expectation_exactly(
    lam: float, p: float, seed: int
) -> None:
    """E w = p (lam / p, 0) + (1 - p) (0, (1 - lam) / (1 - p)) = (lam, 1 - lam), whatever p."""
    decisions, _ = drive(Importance(lam, p, seed), 40)
    drawn = decisions[decisions[:, Task.DPO] > 0.0], decisions[decisions[:, Task.SFT] > 0.0]
    for task, (rows, probability) in enumerate(zip(drawn, (p, 1.0 - p), strict=True)):
        if len(rows):
            expected = np.zeros(2)
            expected[task] = objective_weights(lam)[task]
            np.testing.assert_allclose(
                rows * probability, np.tile(expected, (len(rows), 1)), rtol=EXACT
            )


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_importance_draws_dpo_with_frequency_p_whatever_lam(p: float) -> None:
    for lam in (0.2, 0.8):
        decisions, _ = drive(Importance(lam, p, seed=7), 4000)
        assert_binomial(int((decisions[:, Task.DPO] > 0.0).sum()), 4000, p)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.01, 0.99), st.integers(0, 1000))
def test_importance_at_p_lam_is_alright_decision_by_decision(lam: float, seed: int) -> None:
    np.testing.assert_array_equal(
        drive(Importance(lam, lam, seed), 60)[0], drive(Alright(lam, seed), 60)[0]
    )


def test_an_importance_batch_equals_its_single_runs() -> None:
    lams, ps, seeds = (0.1, 0.5, 0.9), (0.3, 0.5, 0.6), (4, 5, 4)
    decisions, _ = drive(Importance(lams, ps, seeds), 60)
    shared, _ = drive(Importance(lams, 0.3, seeds), 60)
    for run, (lam, p, seed) in enumerate(zip(lams, ps, seeds, strict=True)):
        np.testing.assert_array_equal(decisions[:, run], drive(Importance(lam, p, seed), 60)[0])
        np.testing.assert_array_equal(shared[:, run], drive(Importance(lam, 0.3, seed), 60)[0])


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, float("nan"), (0.5, 1.0)])
def test_a_probability_that_never_draws_one_objective_is_an_error(p: Any) -> None:
    lam = (0.5,) * len(p) if isinstance(p, tuple) else 0.5
    with pytest.raises(ValueError, match="strictly between 0 and 1") as error:
        Importance(lam, p)
    assert_one_line_error(str(error.value))


def test_as_many_probabilities_as_runs_or_one() -> None:
    with pytest.raises(ValueError, match="dpo_probability needs one entry"):
        Importance((0.5, 0.5), (0.5, 0.5, 0.5))


# --- Alternate: blocks in turn


@settings(deadline=None, max_examples=60)
@given(LAMS, st.integers(1, 30), st.integers(1, 12))
def test_every_cycle_is_a_block_of_dpo_and_then_sft_and_no_share_is_lost(
    lam: float, cycle: int, cycles: int
) -> None:
    decisions, _ = drive(Alternate(lam, cycle), cycles * cycle)
    dpo = decisions[:, Task.DPO].reshape(cycles, cycle)
    assert np.all(np.diff(dpo, axis=1) <= 0.0)  # DPO first
    done = np.cumsum(dpo.sum(axis=1))
    assert np.all(np.abs(done - lam * cycle * np.arange(1, cycles + 1)) <= 0.5 + 1e-9)


@pytest.mark.parametrize("lam", [0.01, 0.25, 0.75, 0.9])
@pytest.mark.parametrize("cycle", [1, 2, 3])
def test_no_cycle_is_too_short_for_either_objective(lam: float, cycle: int) -> None:
    decisions, _ = drive(Alternate(lam, cycle), 600)
    assert decisions[:, Task.DPO].mean() == pytest.approx(lam, abs=1 / 600)


def test_a_cycle_of_two_at_one_half_is_strict_alternation() -> None:
    assert drive(Alternate(0.5, 2), 6)[0].tolist() == [DPO, SFT] * 3


@pytest.mark.parametrize("lam", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_a_cycle_as_long_as_the_run_decides_as_sequential(lam: float) -> None:
    steps = 40
    expected, _ = drive(Sequential(round(lam * steps), "dpo_then_sft"), steps)
    np.testing.assert_array_equal(drive(Alternate(lam, steps), steps)[0], expected)


def test_lam_and_cycle_may_each_be_one_number_or_one_per_run() -> None:
    lams, cycles = (0.25, 0.5, 0.75), (4, 8, 12)
    for lam, cycle in ((lams, cycles), (0.5, cycles), (lams, 8)):
        batch = Alternate(lam, cycle)
        decisions, _ = drive(batch, 24)
        assert batch.runs == (3,)
        for run in range(3):
            one_lam = lam[run] if isinstance(lam, tuple) else lam
            one_cycle = cycle[run] if isinstance(cycle, tuple) else cycle
            alone, _ = drive(Alternate(one_lam, one_cycle), 24)
            np.testing.assert_array_equal(decisions[:, run], alone)


@pytest.mark.parametrize("cycle", [0, -2, (4, 0)])
def test_a_cycle_below_one_is_an_error(cycle: Any) -> None:
    with pytest.raises(ValueError, match=r"cycle is .*at least 1") as error:
        Alternate(0.5, cycle)
    assert_one_line_error(str(error.value))


def test_lam_and_cycle_of_different_lengths_are_an_error() -> None:
    with pytest.raises(ValueError, match="lam and cycle need the same number"):
        Alternate((0.5, 0.5), (2, 2, 2))


# --- MAXRIGHT's average of its values


def noisy_values(ema: float, period: int, steps: int, seed: int = 0) -> tuple[Array, Array]:
    """Values remembered after each select, and the probes, of iid losses; (steps, 2) each."""
    rng = np.random.default_rng(seed)
    scheduler = Maxright(0.5, (0.0, 0.0), refresh_every=period, value_ema=ema)
    state, remembered, probes = scheduler.init(), [], []

    def probe() -> Array:
        probes.append(rng.normal([1.0, 2.0]))
        return probes[-1]

    for _ in range(steps):
        _, state = scheduler.select(state, probe)
        assert state.values is not None
        remembered.append(state.values)
        state = scheduler.observe(state)
    return np.array(remembered), np.array(probes)


def test_an_average_of_weight_one_is_the_latest_value() -> None:
    """Up to the rounding of old + (new - old)."""
    remembered, probes = noisy_values(1.0, 1, 50)
    np.testing.assert_allclose(remembered, probes, rtol=0, atol=EXACT)


@pytest.mark.parametrize("ema", [0.1, 0.5])
def test_the_average_weighs_values_geometrically(ema: float) -> None:
    """v_t = (1 - a)^t v_0 + a sum_s (1 - a)^(t - s) new_s; the first value counts in full."""
    remembered, probes = noisy_values(ema, 1, 30)
    expected = probes[0]
    for value, probe in zip(remembered[1:], probes[1:], strict=True):
        expected = (1.0 - ema) * expected + ema * probe
        np.testing.assert_allclose(value, expected, rtol=EXACT)


def test_the_average_tends_to_the_mean_of_its_values() -> None:
    """Stationary variance a / (2 - a) of iid unit noise, correlated over about 2 / a steps."""
    ema, steps, burn_in = 0.05, 20_000, 200
    remembered, _ = noisy_values(ema, 1, steps)
    settled = remembered[burn_in:]
    # The mean of the average is the mean of the noise up to its ends: error 1 / sqrt(steps).
    np.testing.assert_allclose(
        settled.mean(axis=0), [1.0, 2.0], rtol=0, atol=4.5 / np.sqrt(steps - burn_in)
    )
    # Variance of a variance over steps a (2 - a) / 2 independent blocks: 7% at 2 deviations.
    np.testing.assert_allclose(settled.var(axis=0), ema / (2.0 - ema), rtol=0.2)


def test_between_refreshes_the_stepped_value_is_averaged_too() -> None:
    scheduler = Maxright(0.5, (0.0, 0.0), refresh_every=10, value_ema=0.25)
    _, state = scheduler.select(scheduler.init(), lambda: np.array([4.0, 2.0]))
    state = scheduler.observe(state, np.array([0.0, np.nan]))
    assert state.values is not None
    assert state.values.tolist() == [3.0, 2.0]
    state = scheduler.observe(state, np.array([np.nan, 6.0]))
    assert state.values is not None
    assert state.values.tolist() == [3.0, 3.0]


def test_values_are_forgotten_only_by_memoryless_schedules() -> None:
    """Black box: does an old value in the state change a decision?"""
    for period, ema in ((1, 1.0), (1, 0.5), (3, 1.0)):
        scheduler = Maxright(0.5, (0.0, 0.0), refresh_every=period, value_ema=ema)
        decisions = set()
        for old in ([0.0, 9.0], [9.0, 0.0]):
            before = ScheduleState(1, np.array(old))
            weights, _ = scheduler.select(before, lambda: np.array([1.0, 2.0]))
            decisions.add(tuple(weights.tolist()))
        assert scheduler.forgets_values == (len(decisions) == 1)


@pytest.mark.parametrize("ema", [0.0, -0.5, 1.5, float("nan")])
def test_an_average_weight_outside_0_to_1_is_an_error(ema: float) -> None:
    with pytest.raises(ValueError, match=r"value_ema is .*\(0, 1\]") as error:
        Maxright(0.5, (0.0, 0.0), value_ema=ema)
    assert_one_line_error(str(error.value))


# --- registry and validation


def test_every_registered_scheduler_can_be_built() -> None:
    assert set(OPTIONS) == set(REGISTRY)
    for name, options in OPTIONS.items():
        scheduler = make_scheduler(name, **options)
        assert isinstance(scheduler, Scheduler)
        assert scheduler_options(name) == set(options)
        for option, value in options.items():
            assert getattr(scheduler, option) == value


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    for build in (make_scheduler, scheduler_options):
        with pytest.raises(ValueError, match="unknown algorithm") as error:
            build("adam")
        assert_one_line_error(str(error.value), "'adam'", *REGISTRY)


@pytest.mark.parametrize("name", REGISTRY)
def test_an_unused_option_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(ValueError, match="does not use momentum") as error:
        make_scheduler(name, **OPTIONS[name], momentum=0.9)
    assert_one_line_error(str(error.value), repr(name), *OPTIONS[name])


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("sequential", ["first_steps"]),
        ("mix", ["lam"]),
        ("alright", ["lam"]),
        ("maxright", ["lam", "optimum"]),
    ],
)
def test_a_missing_option_is_an_error_that_names_it(name: str, missing: list[str]) -> None:
    with pytest.raises(ValueError, match="needs") as error:
        make_scheduler(name)
    assert_one_line_error(str(error.value), repr(name), *missing)


@pytest.mark.parametrize("lam", [-0.1, 1.1, float("nan"), float("inf"), (0.5, 1.5)])
@pytest.mark.parametrize("name", ["mix", "alright", "maxright"])
def test_lam_outside_the_unit_interval_is_an_error(name: str, lam: Any) -> None:
    options = {**OPTIONS[name], "lam": lam}
    with pytest.raises(ValueError, match=r"lam is .*must lie in \[0, 1\]") as error:
        make_scheduler(name, **options)
    assert_one_line_error(str(error.value))


def test_a_bad_lam_in_a_large_batch_is_still_a_one_line_error() -> None:
    with pytest.raises(ValueError, match="lam is") as error:
        Mix((*[0.123456789] * 100, 2.0))
    assert_one_line_error(str(error.value))


@pytest.mark.parametrize("period", [0, -3])
def test_a_period_below_one_is_an_error(period: int) -> None:
    with pytest.raises(ValueError, match=r"refresh_every is .*at least 1") as error:
        Maxright(0.5, (0.0, 0.0), refresh_every=period)
    assert_one_line_error(str(error.value), str(period))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_optimum_that_is_not_finite_is_an_error(bad: float) -> None:
    with pytest.raises(ValueError, match=r"optimum is .*finite") as error:
        Maxright(0.5, (0.0, bad))
    assert_one_line_error(str(error.value))


def test_an_unknown_order_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="order is") as error:
        Sequential(3, "both")
    assert_one_line_error(str(error.value), "'both'", *ORDERS)


@pytest.mark.parametrize("first_steps", [-1, (3, -1)])
def test_negative_first_steps_are_an_error(first_steps: Any) -> None:
    with pytest.raises(ValueError, match=r"first_steps is .*not be negative") as error:
        Sequential(first_steps)
    assert_one_line_error(str(error.value))


@pytest.mark.parametrize(("lam", "seed"), [(0.5, (1, 2)), ((0.5, 0.5), (1, 2, 3))])
def test_as_many_seeds_as_runs_or_one(lam: Any, seed: Any) -> None:
    with pytest.raises(ValueError, match="seed needs one entry") as error:
        Alright(lam, seed)
    assert_one_line_error(str(error.value))
