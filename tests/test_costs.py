"""The cost model: its counted numbers, its limits and its errors."""

from __future__ import annotations

import pytest

from theory.costs import Costs, cost_per_step
from theory.problems import make_problem
from theory.schedulers import (
    Alright,
    Alternate,
    DPOAlone,
    Importance,
    Maxright,
    Mix,
    Sequential,
    SFTAlone,
)
from theory.scheduling import Scheduler
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
    mean = pytest.approx(0.3 * costs.dpo + 0.7 * costs.sft)
    assert cost_per_step(Alright(0.3), costs=costs) == mean
    assert cost_per_step(Importance(0.9, 0.3), costs=costs) == mean
    assert cost_per_step(Sequential(5), costs=costs, p_dpo=0.3) == mean
    assert cost_per_step(DPOAlone(), costs=costs) == costs.dpo
    assert cost_per_step(SFTAlone(), costs=costs) == costs.sft


def test_mix_pays_for_both_objectives_except_at_the_ends() -> None:
    for lam, cost in ((0.0, 3.0), (0.01, 11.0), (0.5, 11.0), (1.0, 8.0)):
        assert cost_per_step(Mix(lam), costs=Costs()) == cost


def test_a_scheduler_that_reads_the_gram_pays_for_both_gradients() -> None:
    class Reads(Scheduler):
        reads_gram = True

    assert cost_per_step(Reads(), costs=Costs()) == 11.0


def test_maxright_costs_its_steps_and_a_share_of_a_probe() -> None:
    def cost(k: int, **options: bool) -> float:
        scheduler = Maxright(0.5, (0.0, 0.0), refresh_every=k)
        return cost_per_step(scheduler, costs=Costs(), p_dpo=0.25, **options)

    step = 0.25 * 8.0 + 0.75 * 3.0
    assert cost(10) == pytest.approx(step + 0.5)
    assert cost(10**9) == pytest.approx(step)
    # Probing at every step and training on the probe: both forwards and one backward.
    assert cost(1, reuse_probe=True) == pytest.approx(5.0 + 0.25 * 4.0 + 0.75 * 2.0)


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [(Alternate(0.3, 4), 40), (Maxright(0.4, (0.0, 0.0), refresh_every=7), 70), (Mix(0.5), 10)],
)
def test_the_cost_is_that_of_a_simulated_run(scheduler: Scheduler, steps: int) -> None:
    trace = simulate(
        make_problem("quadratic"), scheduler, num_steps=steps, step_size=StepSize(0.5), seeds=[3],
        values="fresh",
    )  # fmt: skip
    dpo, sft = trace.gradients[-1, 0]
    counted = (dpo * 8.0 + sft * 3.0 + trace.probes[-1, 0, 0] * 5.0) / steps
    assert cost_per_step(scheduler, costs=Costs(), p_dpo=dpo / steps) == pytest.approx(counted)


@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        (Sequential(5), {}, "give p_dpo"),
        (Maxright(0.5, (0.0, 0.0)), {}, "give p_dpo"),
        (Sequential(5), {"p_dpo": 1.5}, "must lie in"),
        (Mix((0.1, 0.2)), {}, "several"),
    ],
)
def test_what_the_schedule_does_not_determine_must_be_given(
    scheduler: Scheduler, options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cost_per_step(scheduler, costs=Costs(), **options)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_costs_must_be_positive(wrong: float) -> None:
    for name in ("sft", "dpo", "probe"):
        with pytest.raises(ValueError, match=f"cost {name}"):
            Costs(**{name: wrong})


def test_a_probe_costs_more_than_its_part() -> None:
    with pytest.raises(ValueError, match="exceed"):
        Costs(probe=1.0)
