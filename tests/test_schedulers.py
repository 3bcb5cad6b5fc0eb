"""The schedulers as decision rules: shapes, frequencies, resumption, and what they refuse."""

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
from _drive import DPO, NO_PROBE, SFT, ToyLosses, drive
from hypothesis import given, settings
from hypothesis import strategies as st

from theory.randomness import BLOCK
from theory.registry import make_scheduler
from theory.schedulers import (
    ORDERS,
    REGISTRY,
    Alright,
    Alternate,
    Importance,
    Maxright,
    Mix,
    Sequential,
    Single,
    objective_weights,
)
from theory.scheduling import Scheduler, ScheduleState
from theory.tasks import Task

LAMS = st.floats(0.0, 1.0)
OPTIMUM = (0.1, 0.2)
RUNS: dict[str, list[dict[str, Any]]] = {
    "sequential": [{"first_steps": n, "order": "sft_then_dpo"} for n in (7, 0, 99)],
    "mix": [{"lam": lam} for lam in (0.3, 0.0, 1.0)],
    "alright": [{"lam": lam, "seed": seed} for lam, seed in ((0.3, 5), (0.3, 2**40), (0.9, 5))],
    "maxright": [
        {"lam": lam, "optimum": OPTIMUM, "refresh_every": 3, "scale_steps": True, "value_ema": 0.5}
        for lam in (0.3, 0.5, 1.0)
    ],
    "importance": [
        {"lam": lam, "dpo_probability": p, "seed": seed}
        for lam, p, seed in ((0.3, 0.6, 5), (0.5, 0.5, 5), (0.9, 0.6, 4))
    ],
    "alternate": [{"lam": lam, "cycle": n} for lam, n in ((0.3, 10), (0.1, 2), (0.9, 7))],
    "dpo": [{}],
    "sft": [{}],
}
"""Options of several runs of every algorithm."""
SHARED = ("order", "optimum", "refresh_every", "scale_steps", "value_ema")
"""Options that the runs of a batch share."""
OPTIONS = {name: runs[0] for name, runs in RUNS.items()}


def batch_of(name: str) -> Scheduler:
    """All `RUNS` of an algorithm as one batch."""
    first = RUNS[name][0]
    own = {key: tuple(run[key] for run in RUNS[name]) for key in first if key not in SHARED}
    return make_scheduler(name, **{key: first[key] for key in first if key in SHARED} | own)


BATCHES = {name: batch_of(name) for name, runs in RUNS.items() if len(runs) > 1}


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
def test_a_batch_equals_its_single_runs(name: str) -> None:
    batch, runs = BATCHES[name], RUNS[name]
    decisions, _ = drive(batch, 60)
    assert batch.runs == (len(runs),)
    assert decisions.shape == (60, len(runs), 2)
    for run, options in enumerate(runs):
        single = make_scheduler(name, **options)
        np.testing.assert_array_equal(decisions[:, run], drive(single, 60)[0])
        for step in (0, 6, 7, 8, 60):
            assert np.broadcast_to(batch.stage_start(step), len(runs))[run] == single.stage_start(
                step
            )


@pytest.mark.parametrize("name", ["sequential", "alright", "dpo", "sft"])
def test_one_objective_at_a_time_means_one_hot_weights(name: str) -> None:
    assert_one_hot(drive(make_scheduler(name, **OPTIONS[name]), 50)[0])


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
    scheduler.select(state, NO_PROBE)
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
    weights, _ = Mix(0.25).select(ScheduleState(), NO_PROBE)
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
    weights, _ = scheduler.select(ScheduleState(step), NO_PROBE)
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


@settings(deadline=None, max_examples=20)
@given(LAMS, LAMS, st.integers(0, 1000))
def test_at_one_seed_a_larger_lam_only_adds_dpo_steps(a: float, b: float, seed: int) -> None:
    low, high = min(a, b), max(a, b)
    decisions, _ = drive(Alright((low, high), (seed, seed)), 60)
    assert np.all(decisions[:, 0, Task.DPO] <= decisions[:, 1, Task.DPO])


def test_alright_decides_by_the_step_alone() -> None:
    scheduler = Alright(0.5, seed=2)
    expected, _ = drive(scheduler, 2 * BLOCK + 3)
    for step in (2 * BLOCK + 2, 0, BLOCK, BLOCK - 1):
        weights, _ = scheduler.select(ScheduleState(step), NO_PROBE)
        np.testing.assert_array_equal(weights, expected[step])


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


# --- what is refused


@pytest.mark.parametrize(
    ("build", "message"),
    [
        *(
            (
                lambda name=name, lam=lam: make_scheduler(name, **OPTIONS[name] | {"lam": lam}),
                "lam is",
            )
            for name in ("mix", "alright", "maxright", "importance", "alternate")
            for lam in (-0.1, 1.1, float("nan"), float("inf"), (*[0.123456789] * 100, 2.0))
        ),
        *((lambda n=n: Maxright(0.5, OPTIMUM, refresh_every=n), "at least 1") for n in (0, -3)),
        *(
            (lambda ema=ema: Maxright(0.5, OPTIMUM, value_ema=ema), r"value_ema is .*\(0, 1\]")
            for ema in (0.0, -0.5, 1.5, float("nan"))
        ),
        *((lambda f=f: Maxright(0.5, (0.0, f)), "finite") for f in (float("nan"), float("inf"))),
        *(
            (lambda p=p: Importance((0.5, 0.5), p), "strictly between 0 and 1")
            for p in (0.0, 1.0, -0.1, float("nan"), (0.5, 1.0))
        ),
        (lambda: Importance((0.5, 0.5), (0.5, 0.5, 0.5)), "dpo_probability needs one entry"),
        *((lambda n=n: Alternate((0.5, 0.5), n), "at least 1") for n in (0, -2, (4, 0))),
        (lambda: Alternate((0.5, 0.5), (2, 2, 2)), "lam and cycle need the same number"),
        (lambda: Sequential(3, "both"), f"'both'.*{', '.join(ORDERS)}"),
        *((lambda n=n: Sequential(n), "not be negative") for n in (-1, (3, -1))),
        (lambda: Alright(0.5, (1, 2)), "seed needs"),
        (lambda: Alright((0.5, 0.5), (1, 2, 3)), "seed needs"),
    ],
)
def test_a_wrong_option_is_an_error_of_one_line(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert_one_line_error(str(error.value))
