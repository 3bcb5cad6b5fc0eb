"""The theorems hold where they are measured, reduce to each other, and are sharp where claimed.

"measured <= bound" compares the upper end of the 95% interval over seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from _theorems import CONSTANT, LAM, SEEDS, STEPS, Array, optima_of, run, spread_at
from scipy.stats import norm

from theory.metrics import convex_metrics, mean_interval
from theory.objectives import Quadratic
from theory.optima import ProblemOptima
from theory.problems import PROBLEMS, Problem, quadratic
from theory.schedulers import Alright, Alternate, Maxright, Mix, objective_weights
from theory.simulate import StepSize
from theory.tasks import Task
from theory.theorems import bounds, leading_order
from theory.theorems.bounds import Descent, descent

DECAY = StepSize(0.5)
ON = pytest.mark.parametrize("name", ["bernoulli", "quadratic", "toy2d"])
ON_TWO = pytest.mark.parametrize("name", ["bernoulli", "quadratic"])
EITHER_STEP = pytest.mark.parametrize("step_size", [CONSTANT, DECAY], ids=["constant", "decay"])


def maxright(optima: ProblemOptima, k: int = 1, scaled: bool = True) -> Maxright:
    return Maxright(LAM, optima.values, refresh_every=k, scale_steps=scaled)


def upper(optima: ProblemOptima, theta: Array, metric: str, lam: float = LAM) -> float:
    """Upper end of the 95% interval of the mean gap at theta (runs, d)."""
    return mean_interval(convex_metrics(optima, theta, lam)[metric]).high


# --- T1 and T2


@ON
@EITHER_STEP
@pytest.mark.parametrize("method", ["mix", "alright"])
def test_mix_and_alright_stay_below_the_three_rates(
    name: str, step_size: StepSize, method: str
) -> None:
    optima = optima_of(name)
    own = {"mix": Mix(LAM), "alright": Alright((LAM,) * len(SEEDS), SEEDS)}[method]
    trace = run(optima, own, step_size, record_steps=[40, STEPS])
    for k, steps in enumerate(trace.steps.tolist()):
        d = descent(optima, method, LAM, step_size, steps)
        rates = {
            "weighted": bounds.weighted_average(d),
            "uniform": bounds.uniform_average(d),
            "last": bounds.last_iterate(d),
        }
        for iterate, rate in rates.items():
            assert upper(optima, trace.theta[iterate][k], "mix_gap") <= rate


@ON
@EITHER_STEP
@pytest.mark.parametrize("scaled", [True, False])
def test_maxright_with_exact_values_stays_below_its_rate(
    name: str, step_size: StepSize, scaled: bool
) -> None:
    optima = optima_of(name)
    theta = run(optima, maxright(optima, scaled=scaled), step_size).theta
    d = descent(optima, f"maxright_{'' if scaled else 'un'}scaled", LAM, step_size, STEPS)
    average = bounds.weighted_average(d) if scaled else bounds.unscaled_average(d, LAM)
    assert upper(optima, theta["weighted"][-1], "max_gap") <= average
    if scaled:
        assert upper(optima, theta["uniform"][-1], "max_gap") <= bounds.uniform_average(d)
        assert upper(optima, theta["last"][-1], "max_gap") <= bounds.last_iterate(d)


@pytest.mark.parametrize("steps", [1, 2, 10, 1000, 100_000])
@pytest.mark.parametrize(("distance", "norm", "c"), [(1.0, 2.0, 0.5), (0.0, 1.0, 1.0), (3, 1, 2)])
def test_exact_sums_never_exceed_the_closed_forms(
    steps: int, distance: float, norm: float, c: float
) -> None:
    """B = 2R for the ball of radius R = 4: the diameter in the place of `reach`."""
    d = Descent(distance, norm, StepSize(c), steps, reach=4.0 + distance)
    log, root, noise = np.log(steps), np.sqrt(steps), (c * norm) ** 2
    weighted = (distance**2 + noise * (1 + log)) / (4 * c * (np.sqrt(steps + 1) - 1))
    assert bounds.weighted_average(d) <= weighted * (1 + 1e-12)
    assert bounds.uniform_average(d) <= (8.0**2 / (2 * c) + c * norm**2) / root
    last = np.log(steps + 1)
    assert bounds.last_iterate(d) <= (8.0**2 / c + c * norm**2) * (2 + last) / np.sqrt(steps + 1)


def test_the_logarithm_of_the_last_iterate_multiplies_the_noise_alone() -> None:
    """sqrt(n) times the bound grows like c M^2 ln n, whatever D."""
    for distance in (0.0, 1.0, 5.0):
        d = Descent(distance, 2.0, StepSize(0.5), 1)
        rates = [
            bounds.last_iterate(replace(d, num_steps=n - 1)) * np.sqrt(n)
            for n in (10**4, 10**5, 10**6)
        ]
        np.testing.assert_allclose(np.diff(rates), 0.5 * 2.0**2 * np.log(10), rtol=2e-3)


def test_the_uniform_average_needs_no_logarithm() -> None:
    """sqrt(T) times the bound converges to B^2 / (2c) + c M^2, up to O(1 / sqrt T)."""
    d = Descent(1.0, 2.0, StepSize(0.5), 10**6, reach=3.0)
    assert bounds.uniform_average(d) * 1e3 == pytest.approx(3.0**2 / 1.0 + 0.5 * 2.0**2, rel=2e-3)
    constant = replace(d, step_size=CONSTANT)
    assert bounds.uniform_average(constant) == pytest.approx(bounds.weighted_average(constant))


def test_the_constant_step_rate_is_minimal_at_its_best_step() -> None:
    best = 1.5 / (2.0 * np.sqrt(100))
    rate = bounds.weighted_average(Descent(1.5, 2.0, StepSize(best, False), 100))
    assert rate == pytest.approx(1.5 * 2.0 / np.sqrt(100), rel=1e-12)
    for factor in (0.9, 1.1):
        other = Descent(1.5, 2.0, StepSize(best * factor, False), 100)
        assert bounds.weighted_average(other) > rate


@pytest.mark.parametrize("lam", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_mix_has_the_smaller_second_moment(lam: float) -> None:
    weights, norms = objective_weights(lam), np.array([3.0, 1.0])
    of = {name: method.norm(weights, norms) for name, method in bounds.METHODS.items()}
    assert of["mix"] <= of["alright"] + 1e-12
    assert of["maxright_scaled"] <= of["maxright_same"] <= of["mix"] + 1e-12
    assert (of["mix"] == pytest.approx(of["alright"])) == (lam in (0.0, 1.0))


# --- T3 to T6


def ball_spread(optima: ProblemOptima) -> float:
    """The largest standard deviation of h_1^ - h_2^ on the ball, from one sample each.

    bernoulli: a loss takes two values that differ by |theta|, so its variance is p(1-p) theta^2
    = q(1-q) theta^2. quadratic: the loss noise is sigma z . (theta - c_i).
    """
    problem, weights = optima.problem, objective_weights(LAM)
    if problem.name == "bernoulli":
        return float(np.linalg.norm(weights) * 0.3 * problem.radius)
    far = [f.noise * (problem.radius + np.linalg.norm(f.center)) for f in problem.objectives]  # type: ignore[attr-defined]
    return float(np.linalg.norm(weights * far))


@ON_TWO
@EITHER_STEP
@pytest.mark.parametrize("values", ["fresh", "same"])
def test_noisy_values_cost_at_most_their_bias(name: str, step_size: StepSize, values: str) -> None:
    """T3: half a standard deviation, the largest on the ball; T4: the one at the minimiser."""
    optima, gaussian = optima_of(name), name == "quadratic"
    if values == "fresh":
        method, bias = "maxright_scaled", bounds.fresh_bias(ball_spread(optima), gaussian)
    else:
        best, weights = optima.max(LAM).theta, objective_weights(LAM)
        at_best = float(np.linalg.norm(weights) * 0.3 * abs(best[0]))
        sigma = spread_at(optima.problem, LAM, best) if gaussian else at_best
        method, bias = "maxright_same", bounds.same_batch_bias(sigma, gaussian)
    theta = run(optima, maxright(optima), step_size, values=values).theta["weighted"][-1]
    rate = bounds.weighted_average(descent(optima, method, LAM, step_size, STEPS))
    assert upper(optima, theta, "max_gap") <= rate + bias


def test_the_bias_constants_are_the_worst_cases_over_the_difference() -> None:
    """T3: Cantelli's two-point noise and Gaussian noise; T4: E(Delta + e)_+ - Delta_+ likewise."""
    x = np.linspace(0.0, 5.0, 100_001)
    assert np.max(x / (1 + x**2)) == pytest.approx(bounds.fresh_bias(1.0), abs=1e-9)
    worst = np.max(x * norm.cdf(-x))
    assert worst <= bounds.fresh_bias(1.0, gaussian=True) <= worst + 2e-5
    assert np.max((np.sqrt(x**2 + 1) - x) / 2) == pytest.approx(bounds.same_batch_bias(1.0))
    smoothed = norm.pdf(x) - x * norm.cdf(-x)
    assert np.max(smoothed) == pytest.approx(bounds.same_batch_bias(1.0, gaussian=True))


@ON_TWO
@pytest.mark.parametrize("k", [1, 2, 5, 40])
def test_stale_values_stay_below_their_rate(name: str, k: int) -> None:
    optima = optima_of(name)
    theta = run(optima, maxright(optima, k)).theta["uniform"][-1]
    d = descent(optima, "maxright_scaled", LAM, CONSTANT, STEPS)
    bound = bounds.stale_average(d, k)
    assert upper(optima, theta, "max_gap") <= bound
    coarse = bounds.weighted_average(d) + (0 if k == 1 else k) * CONSTANT.scale * d.norm**2
    assert bound <= coarse
    assert (bound == bounds.weighted_average(d)) == (k == 1)


@ON_TWO
@pytest.mark.parametrize("errors", [(0.3, 0.0), (-0.2, 0.2), (0.7, 0.3)])
def test_a_wrong_optimum_costs_at_most_its_weighted_error(
    name: str, errors: tuple[float, float]
) -> None:
    optima = optima_of(name)
    wrong = (optima.values[0] + errors[0], optima.values[1] + errors[1])
    theta = run(optima, replace(maxright(optima), optimum=wrong)).theta["weighted"][-1]
    d = descent(optima, "maxright_scaled", LAM, CONSTANT, STEPS)
    error = LAM * errors[0] - (1 - LAM) * errors[1]
    bias = bounds.wrong_optimum_bias(LAM, errors)
    assert bias == pytest.approx(abs(error), abs=1e-15)
    assert upper(optima, theta, "max_gap") <= bounds.weighted_average(d) + bias

    limit = leading_order.selection_limit(optima, LAM, lambda rho, point: error)
    sharper = bounds.wrong_optimum_bias(LAM, errors, limit.rho)
    assert limit.gap <= sharper + 1e-7  # the optima are certified to 1e-8
    assert sharper <= bias + 1e-12
    d = replace(d, distance=float(np.linalg.norm(limit.theta)))
    assert upper(optima, theta, "max_gap") <= bounds.weighted_average(d) + sharper


# --- T7


@ON_TWO
@pytest.mark.parametrize(
    ("lam", "block", "cycle"),
    [(0.5, 2, 2), (0.3, 10, 10), (0.3, 100, 100), (0.3, STEPS, STEPS), (0.3, 2, 10)],
)
def test_blocks_in_turn_stay_below_their_rate(
    name: str, lam: float, block: int, cycle: int
) -> None:
    """In the last case three of ten steps are DPO's, spread over five blocks."""
    optima = optima_of(name)
    record = sorted({*range(cycle, STEPS + 1, cycle), STEPS})
    trace = run(optima, Alternate(lam, block), record_steps=record)
    ends = trace.theta["last"][:-1]  # of all cycles but the last: the starts of the next ones
    starts = np.concatenate([np.zeros((1, *trace.theta["last"].shape[1:])), ends]).mean(axis=0)
    d = descent(optima, "alternate", lam, CONSTANT, STEPS)
    assert upper(optima, starts, "mix_gap", lam) <= bounds.cycle_average(d, cycle, lam=lam)
    everything = trace.theta["uniform"][-1]
    bound = bounds.cycle_average(d, cycle, starts_only=False)
    assert upper(optima, everything, "mix_gap", lam) <= bound


def test_cycles_of_one_are_sgd_and_a_single_cycle_has_no_guarantee() -> None:
    d = Descent(1.0, 2.0, StepSize(0.1, False), 100)
    assert bounds.cycle_average(d, 1) == pytest.approx(bounds.weighted_average(d), rel=1e-12)
    best = [
        min(
            bounds.cycle_average(Descent(1.0, 2.0, StepSize(alpha, False), steps), steps)
            for alpha in np.geomspace(1e-4, 10, 200)
        )
        for steps in (10, 1000)
    ]
    np.testing.assert_allclose(best, 1.0 * 2.0, rtol=1e-2)  # D M, whatever T


def test_bounds_refuse_what_they_are_not_proved_for() -> None:
    decaying = Descent(1.0, 1.0, DECAY, 100)
    constant = replace(decaying, step_size=CONSTANT)
    far = ProblemOptima(replace(quadratic(distance=2.0), radius=0.5))  # minimisers not in the ball
    refused: list[tuple[str, Callable[[], object]]] = [
        ("constant step", lambda: bounds.stale_average(decaying, 2)),
        ("refresh_every is 0", lambda: bounds.stale_average(constant, 0)),
        ("constant step", lambda: bounds.cycle_average(decaying, 2)),
        ("must divide", lambda: bounds.cycle_average(constant, 3)),
        ("needs whole DPO steps", lambda: bounds.cycle_average(constant, 2, lam=0.3)),
        ("num_steps is 0", lambda: replace(constant, num_steps=0)),
        ("'adam'", lambda: descent(optima_of("bernoulli"), "adam", 0.5, CONSTANT, 10)),
        ("unstable", lambda: leading_order.stationary_gap(5.0, [np.eye(2)], [1.0], np.eye(2))),
        ("inside the ball", lambda: bounds.sequential_gap(far, Task.SFT, 0.5)),
    ]
    for message, call in refused:
        with pytest.raises(ValueError, match=message):
            call()


# --- T8


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("last", Task)
@pytest.mark.parametrize("lam", [0.05, 0.3, 0.8])
def test_one_gradient_norm_brackets_the_sequential_gap(name: str, last: Task, lam: float) -> None:
    optima = optima_of(name)
    gap = float(convex_metrics(optima, optima.single[last].theta, lam)["mix_gap"])
    low, high = bounds.sequential_gap(optima, last, lam)
    assert 0.0 < low <= gap <= high


def test_both_estimates_are_equal_on_an_isotropic_quadratic() -> None:
    low, high = bounds.gap_from_gradient(3.0, 2.0, 2.0)
    assert low == high == pytest.approx(3.0**2 / 4)


def test_the_lower_estimate_fails_if_the_joint_minimiser_leaves_the_ball() -> None:
    """Both single minimisers lie inside; an assumption that T8 cannot do without."""
    dpo = Quadratic(np.array([[0.97, -0.15], [-0.15, 0.10]]), np.array([0.94, 0.0]), 0.0)
    sft = Quadratic(np.array([[0.10, -0.16], [-0.16, 0.97]]), np.array([0.65, 0.73]), 0.0)
    optima = ProblemOptima(Problem("outward", (dpo, sft), radius=1.0, step_scale=1.0))
    assert all(best.interior for best in optima.single)
    assert not optima.mix(0.5).interior
    theta, mix = optima.single[Task.SFT].theta, optima.problem.mix(0.5)
    slope = float(np.linalg.norm(mix.gradient(theta)))
    low, _ = bounds.gap_from_gradient(slope, np.linalg.eigvalsh(mix.hessian(theta))[-1], 0.0)
    assert low > 1.1 * float(convex_metrics(optima, theta, 0.5)["mix_gap"])


def test_the_sequential_gap_is_quadratic_in_a_small_lam() -> None:
    optima = optima_of("softmax")
    theta = optima.single[Task.SFT].theta
    gaps = [float(convex_metrics(optima, theta, lam)["mix_gap"]) for lam in (0.02, 0.01)]
    lows = [bounds.sequential_gap(optima, Task.SFT, lam)[0] for lam in (0.02, 0.01)]
    assert gaps[0] / gaps[1] == pytest.approx(4.0, rel=0.1)
    assert lows[0] / lows[1] == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_orders_cross_at_lam_c(name: str) -> None:
    optima = optima_of(name)
    crossing = bounds.crossing_lam(optima)
    ends = np.stack([optima.single[last].theta for last in (Task.SFT, Task.DPO)])
    at = convex_metrics(optima, ends, crossing)["mix_gap"]
    assert at[0] == pytest.approx(at[1], abs=1e-7)
    below, above = (convex_metrics(optima, ends, crossing + s)["mix_gap"] for s in (-0.1, 0.1))
    assert below[0] < below[1]  # SFT last, so DPO first, is the better below lam_c
    assert above[0] > above[1]
