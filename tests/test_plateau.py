"""The plateau under other optimisers: shares of the certified limit, and the verdict."""

from __future__ import annotations

import pandas as pd
import pytest

from theory.beyond.plateau import OPTIMISERS, Plateau
from theory.optima import ProblemOptima
from theory.optimizers import Adam
from theory.problems import make_problem
from theory.schedulers import ORDERS
from theory.sweep import run_sweep


@pytest.fixture(scope="module")
def config() -> Plateau:
    return Plateau(num_steps=6400, num_seeds=6, problems=("quadratic",))


@pytest.fixture(scope="module")
def results(config: Plateau) -> pd.DataFrame:
    return run_sweep(config.batches(), jobs=1, progress=False)


def test_the_plateau_stays_under_every_optimiser(config: Plateau, results: pd.DataFrame) -> None:
    orders = config.summary(results)["problems"]["quadratic"]
    assert set(orders) == set(ORDERS)
    for numbers in orders.values():
        for cell in numbers["optimisers"].values():
            assert cell["stays"]
            # Last iterates scatter around the limit by the noise of the last stage.
            assert cell["sequential"][-1]["mean"] == pytest.approx(1.0, abs=0.2)
            assert cell["alright"][-1]["mean"] < 0.1


def test_a_gap_below_the_limit_is_a_last_stage_stopped_early(
    config: Plateau, results: pd.DataFrame
) -> None:
    """Adam with small constant steps has no time to converge at the least budget."""
    cell = config.summary(results)["problems"]["quadratic"]["dpo_then_sft"]["optimisers"]
    shares = [value["mean"] for value in cell["Adam, constant"]["sequential"]]
    assert shares[0] < 0.5 < 0.8 < shares[-1]


def test_shares_are_of_the_closed_form_limit(config: Plateau, results: pd.DataFrame) -> None:
    numbers = config.summary(results)["problems"]["quadratic"]["sft_then_dpo"]
    optima = ProblemOptima(make_problem("quadratic"))
    theta = optima.single[0].theta
    limit = float(optima.problem.mix(0.5).value(theta)) - optima.mix(0.5).value
    assert numbers["source"] == "closed form"
    assert numbers["limit"] == pytest.approx(limit, abs=1e-8)
    rows = results.query(
        "iterate == 'last' and optimiser == 'Adam' and line == 'sft_then_dpo' and step == 6400"
    )
    share = numbers["optimisers"]["Adam"]["sequential"][-1]["mean"]
    assert share == pytest.approx(rows["mix_gap"].mean() / limit)


def test_each_optimiser_runs_with_its_rule_and_steps(config: Plateau) -> None:
    batches = {batch.variants[0].columns["optimiser"]: batch for batch in config.batches()}
    assert set(batches) == set(OPTIMISERS)
    assert isinstance(batches["Adam"].rule, Adam)
    assert batches["SGD"].rule is None
    for name, batch in batches.items():
        assert batch.decay == ("constant" not in name)
        own = batches[name.removesuffix(", constant")].step_scale
        assert batch.step_scale == (own if batch.decay else pytest.approx(own / 50.0))


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_without_a_trade_off_there_is_no_plateau_to_measure(lam: float) -> None:
    with pytest.raises(ValueError, match="lam"):
        Plateau(num_steps=64, num_seeds=1, lam=lam).batches()
