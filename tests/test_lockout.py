"""Lock-out: the response to lam is -1 for equalised gaps, and noisy stale values lose it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.special import logit

from theory.beyond.lockout import Lockout, responses
from theory.optima import ProblemOptima
from theory.problems import PROBLEMS, make_problem
from theory.sweep import run_sweep

LAMS = (0.1, 0.25, 0.5, 0.75, 0.9)


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_minimisers_of_f_max_respond_with_slope_minus_one(name: str) -> None:
    optima = ProblemOptima(make_problem(name))
    losses = optima.problem.losses(np.stack([optima.max(lam).theta for lam in LAMS]))
    rows = pd.DataFrame({"lam": LAMS, "seed": 0, "f_dpo": losses[:, 0], "f_sft": losses[:, 1]})
    assert responses(rows, optima.values)[0] == pytest.approx(-1.0, abs=1e-6)


def test_responses_are_fitted_for_each_seed() -> None:
    slopes = {3: -0.4, 7: 1.5}
    rows = pd.concat(
        pd.DataFrame(
            {"lam": LAMS, "seed": seed, "f_dpo": 2.0 + np.exp(slope * logit(LAMS)), "f_sft": 2.0}
        )
        for seed, slope in slopes.items()
    )
    assert responses(rows, (2.0, 1.0)) == pytest.approx(slopes)


def test_noise_and_rare_refreshes_lose_the_response_and_an_average_mends_it() -> None:
    config = Lockout(num_steps=3000, num_seeds=5, problems=("softmax",), periods=(1, 100))
    numbers = config.summary(run_sweep(config.batches(), jobs=1, progress=False))["softmax"]
    exact, same, averaged = (numbers[name] for name in ("exact", "same", "same_ema"))
    # Exact values equalise even when stale; both objectives hover around equality.
    assert exact[0]["mean"] == pytest.approx(-1.0, abs=0.1)
    assert exact[1]["mean"] == pytest.approx(-1.0, abs=0.2)
    # Noise alone flattens the response; with staleness it is reversed.
    assert -0.8 < same[0]["mean"] < 0.0
    assert same[1]["low"] > 0.5
    assert averaged[1]["high"] < same[1]["low"]
    assert averaged[0]["high"] < same[0]["low"]
