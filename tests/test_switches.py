"""Block alternation: one knob from alternation to sequential training, the drift law, T7."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from theory.beyond.switches import Switches, drift_gap, t7_bound
from theory.optima import ProblemOptima
from theory.problems import make_problem, quadratic
from theory.schedulers import Alternate, Sequential
from theory.simulate import StepSize, simulate
from theory.sweep import run_sweep
from theory.theorems.bounds import cycle_average, descent

PROBLEM = make_problem("toy2d")


def decisions(scheduler: Alternate | Sequential, num_steps: int) -> np.ndarray:
    trace = simulate(
        PROBLEM,
        scheduler,
        num_steps=num_steps,
        step_size=StepSize(1.0),
        seeds=[0],
        record_weights=True,
    )
    assert trace.weights is not None
    return trace.weights[:, 0]


@pytest.mark.parametrize("lam", [0.25, 0.5])
def test_a_cycle_of_all_steps_takes_the_decisions_of_a_sequential_run(lam: float) -> None:
    steps = 64
    sequential = Sequential(round(lam * steps), "dpo_then_sft")
    np.testing.assert_array_equal(
        decisions(Alternate(lam, steps), steps), decisions(sequential, steps)
    )


@pytest.mark.parametrize("lam", [0.25, 0.5, 0.75])
def test_each_cycle_switches_as_often_as_stated_and_serves_lam(lam: float) -> None:
    config = Switches(num_steps=48, num_seeds=1, lam=lam)
    assert config.cycles[-1] == 48
    for cycle in config.cycles:
        weights = decisions(Alternate(lam, cycle), 48)
        assert np.count_nonzero(np.diff(weights[:, 0])) == 2 * 48 // cycle - 1
        assert weights[:, 0].mean() == lam


@pytest.mark.parametrize(("lam", "steps"), [(0.37, 64), (0.5, 63), (0.0, 64), (1.0, 64)])
def test_a_lam_that_no_cycle_can_serve_is_refused(lam: float, steps: int) -> None:
    with pytest.raises(ValueError, match="no cycle"):
        Switches(num_steps=steps, num_seeds=1, lam=lam).batches()


@pytest.mark.parametrize("lam", [0.25, 0.5])
def test_without_noise_a_block_ends_at_the_drift_gap(lam: float) -> None:
    """The ratio tends to 1 as alpha n L -> 0; its error is of that order, L = 2 here."""
    optima = ProblemOptima(quadratic(noise=0.0))
    alpha = 1e-3
    for cycle in (4, 32):
        trace = simulate(
            optima.problem,
            Alternate(lam, cycle),
            num_steps=40_000,
            step_size=StepSize(alpha, decay=False),
            seeds=[0],
            record_steps=[40_000],
        )
        theta = trace.theta["last"][0, 0]
        gap = float(optima.problem.mix(lam).value(theta)) - optima.mix(lam).value
        assert gap == pytest.approx(drift_gap(optima, lam, cycle, alpha), rel=2.0 * alpha * cycle)


def test_the_drift_gap_grows_with_the_square_of_cycle_and_step() -> None:
    optima = ProblemOptima(PROBLEM)
    base = drift_gap(optima, 0.5, 8, 0.01)
    assert base > 0.0
    assert drift_gap(optima, 0.5, 8, 0.03) == pytest.approx(9.0 * base)
    theta, problem = optima.mix(0.5).theta, optima.problem
    slope, hessian = problem.objectives[0].gradient(theta), problem.mix(0.5).hessian(theta)
    long = 10_000  # half steps no longer count
    leading = (0.01 * 0.5 * long) ** 2 * slope @ hessian @ slope / 8.0
    assert drift_gap(optima, 0.5, long, 0.01) == pytest.approx(float(leading), rel=1e-3)


def test_the_bound_is_t7_at_its_best_constant_step() -> None:
    optima, lam, cycle, steps = ProblemOptima(PROBLEM), 0.5, 8, 1024
    bound = t7_bound(optima, lam, cycle, steps)
    base = descent(optima, "alternate", lam, StepSize(1.0, decay=False), steps)
    best = base.distance / (base.norm * np.sqrt(cycle * steps))
    at = [
        cycle_average(replace(base, step_size=StepSize(best * factor, decay=False)), cycle)
        for factor in (1.0, 0.8, 1.25)
    ]
    assert at[0] == pytest.approx(bound, rel=1e-9)
    assert min(at[1:]) > bound


def test_more_switches_lead_from_the_sequential_gap_to_that_of_alright() -> None:
    config = Switches(num_steps=1024, num_seeds=8, problems=("quadratic",))
    numbers = config.summary(run_sweep(config.batches(), jobs=1, progress=False))["quadratic"]
    gaps = dict(zip(numbers["switches"], numbers["last"], strict=True))
    few, many = gaps[1], gaps[max(gaps)]
    alright, sequential = numbers["alright"]["last"], numbers["sequential"]["last"]
    assert many["high"] < 0.1 * few["low"]
    assert few["low"] <= sequential["high"]
    assert sequential["low"] <= few["high"]
    # Alternation has no noise from the draw: at most ALRIGHT's gap, up to the intervals.
    assert many["low"] <= alright["high"]
    assert numbers["alright"]["expected_switches"] == pytest.approx(1023 / 2)
