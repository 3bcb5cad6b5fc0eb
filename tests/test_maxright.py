"""MAXRIGHT as a decision rule: the argmax, when it probes, and the average of its values."""

from __future__ import annotations

import numpy as np
import pytest
from _asserts import EXACT
from _drive import DPO, NO_PROBE, SFT, Losses, ToyLosses, drive, select_once
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from theory.schedulers import Maxright
from theory.scheduling import ScheduleState
from theory.tasks import Task

Array = NDArray[np.float64]

# Multiples of 1/64 below 2^10 times lam in quarters: MAXRIGHT's arithmetic on them is exact.
DYADIC = st.integers(-1000, 1000).map(lambda n: n / 64)
DYADIC_LAM = st.sampled_from([0.25, 0.5, 0.75])


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
    weights, state = scheduler.select(scheduler.init(), Losses([3.0, 2.0]))
    assert weights.tolist() == DPO
    state = scheduler.observe(state, np.array([1.0, np.nan]))
    assert state.values is not None
    assert state.values.tolist() == [1.0, 2.0]

    weights, state = scheduler.select(state, NO_PROBE)
    assert weights.tolist() == SFT  # the renewed 1 is now below the stale 2
    state = scheduler.observe(state, np.array([np.nan, 0.25]))
    assert state.values is not None
    assert state.values.tolist() == [1.0, 0.25]
    assert scheduler.select(state, NO_PROBE)[0].tolist() == DPO


def test_a_refresh_renews_both_values() -> None:
    scheduler = Maxright(0.5, (0.0, 0.0), refresh_every=4)
    stale = ScheduleState(8, np.array([9.0, 1.0]))
    weights, state = scheduler.select(stale, Losses([1.0, 5.0]))
    assert weights.tolist() == SFT
    assert state.values is not None
    assert state.values.tolist() == [1.0, 5.0]


def test_values_survive_a_step_without_reported_losses() -> None:
    scheduler = Maxright(0.5, (0.0, 0.0), refresh_every=4)
    state = scheduler.observe(ScheduleState(1, np.array([3.0, 2.0])))
    assert state.step == 2
    assert state.values is not None
    assert state.values.tolist() == [3.0, 2.0]


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
        scheduler.select(ScheduleState(step=1), NO_PROBE)


# --- MAXRIGHT's average of its values


def noisy_values(ema: float, period: int, steps: int, seed: int = 0) -> tuple[Array, Array]:
    """Values remembered after each select, and the probes, of iid losses; (steps, 2) each."""
    rng = np.random.default_rng(seed)
    scheduler = Maxright(0.5, (0.0, 0.0), refresh_every=period, value_ema=ema)
    state, remembered, probes = scheduler.init(), [], []

    for _ in range(steps):
        if state.step % period == 0:
            probes.append(rng.normal([1.0, 2.0]))
        _, state = scheduler.select(state, Losses(probes[-1]))
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
    _, state = scheduler.select(scheduler.init(), Losses([4.0, 2.0]))
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
            weights, _ = scheduler.select(before, Losses([1.0, 2.0]))
            decisions.add(tuple(weights.tolist()))
        assert scheduler.forgets_values == (len(decisions) == 1)
