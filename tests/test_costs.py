"""The cost model: its counted numbers, its limits and its errors."""

from __future__ import annotations

import numpy as np
import pytest

from theory.costs import Costs, cost_per_step
from theory.problems import make_problem
from theory.schedulers import Alternate, Maxright
from theory.simulate import StepSize, simulate


def _tuple(costs: Costs) -> tuple[float, float, float]:
    return costs.sft, costs.dpo, costs.probe


def test_counts_of_forward_and_backward_passes() -> None:
    assert _tuple(Costs()) == _tuple(Costs.counted()) == (3.0, 8.0, 5.0)
    assert _tuple(Costs.cached()) == (3.0, 6.0, 3.0)
    assert _tuple(Costs.lora()) == (2.0, 6.0, 5.0)
    assert _tuple(Costs.lora(cached=True)) == (2.0, 4.0, 3.0)


@pytest.mark.parametrize("costs", [Costs(), Costs.cached(), Costs.lora(cached=True)])
def test_algorithms_that_take_one_objective_a_step_cost_a_mean_of_the_two(costs: Costs) -> None:
    mean = 0.3 * costs.dpo + 0.7 * costs.sft
    assert cost_per_step("alright", lam=0.3, costs=costs) == pytest.approx(mean)
    for algorithm in ("sequential", "importance"):
        cost = cost_per_step(algorithm, lam=0.9, costs=costs, p_dpo=0.3)
        assert cost == pytest.approx(mean)
    assert cost_per_step("dpo", lam=0.3, costs=costs) == costs.dpo
    assert cost_per_step("sft", lam=0.3, costs=costs) == costs.sft


def test_mix_pays_for_both_objectives_except_at_the_ends() -> None:
    for lam, cost in ((0.0, 3.0), (0.01, 11.0), (0.5, 11.0), (1.0, 8.0)):
        assert cost_per_step("mix", lam=lam, costs=Costs()) == cost


def test_maxright_costs_its_steps_and_a_share_of_a_probe() -> None:
    def cost(k: int, **options: bool) -> float:
        return cost_per_step(
            "maxright", lam=0.5, costs=Costs(), refresh_every=k, p_dpo=0.25, **options
        )

    step = 0.25 * 8.0 + 0.75 * 3.0
    assert cost(10) == pytest.approx(step + 0.5)
    assert cost(10**9) == pytest.approx(step)
    # Probing at every step and training on the probe: both forwards and one backward.
    assert cost(1, reuse_probe=True) == pytest.approx(5.0 + 0.25 * 4.0 + 0.75 * 2.0)


def test_alternation_costs_the_steps_that_its_scheduler_takes() -> None:
    scheduler, problem = Alternate(lam=0.3, cycle=4), make_problem("bernoulli")
    trace = simulate(problem, scheduler, num_steps=40, step_size=StepSize(1.0), seeds=[0])
    dpo, sft = trace.gradients[-1, 0]
    counted = (dpo * 8.0 + sft * 3.0) / 40
    assert cost_per_step("alternate", lam=0.3, costs=Costs(), cycle=4) == pytest.approx(counted)


def test_maxright_cost_is_that_of_a_simulated_run_with_its_measured_share() -> None:
    problem = make_problem("quadratic")
    scheduler = Maxright(lam=0.4, optimum=(0.0, 0.0), refresh_every=7)
    trace = simulate(
        problem, scheduler, num_steps=70, step_size=StepSize(0.5), seeds=[3], values="fresh"
    )
    dpo, sft = trace.gradients[-1, 0]
    probes = trace.probes[-1, 0]
    np.testing.assert_array_equal(probes, 10)  # 70 steps, one probe of both in 7
    counted = (dpo * 8.0 + sft * 3.0 + probes[0] * 5.0) / 70
    model = cost_per_step("maxright", lam=0.4, costs=Costs(), refresh_every=7, p_dpo=dpo / 70)
    assert model == pytest.approx(counted)


@pytest.mark.parametrize(
    ("algorithm", "options", "message"),
    [
        ("sequential", {}, "give p_dpo"),
        ("maxright", {}, "give p_dpo"),
        ("importance", {}, "give p_dpo"),
        ("importance", {"p_dpo": 1.5}, "must lie in"),
        ("maxright", {"p_dpo": 0.5, "refresh_every": 0}, "at least 1"),
        ("alternate", {}, "give cycle"),
        ("alright", {"lam": 1.5}, "lam is 1.5"),
        ("mix", {"lam": -0.1}, "lam is -0.1"),
        ("newton", {}, "no cost model"),
    ],
)
def test_what_lam_does_not_determine_must_be_given(
    algorithm: str, options: dict[str, float], message: str
) -> None:
    arguments = {"lam": 0.5, "costs": Costs()} | options
    with pytest.raises(ValueError, match=message):
        cost_per_step(algorithm, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_costs_must_be_positive(wrong: float) -> None:
    for name in ("sft", "dpo", "probe"):
        with pytest.raises(ValueError, match=f"cost {name}"):
            Costs(**{name: wrong})


def test_a_probe_costs_more_than_its_part() -> None:
    with pytest.raises(ValueError, match="exceed"):
        Costs(probe=1.0)
