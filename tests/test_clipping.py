"""Clipping per objective: the effective lam, its prediction, and what leaves lam alone."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from theory.beyond.clipping import Clipping, effective_lam, predicted_lam, steep_problem
from theory.optima import ProblemOptima
from theory.problems import make_problem
from theory.sweep import run_sweep
from theory.tasks import Task

STEEP = ProblemOptima(steep_problem("toy2d", 10.0))
INTERPOLATION = 2e-3
"""Error of linear interpolation on a grid of 0.1 in logit, and then some."""


def test_dpo_of_a_steep_problem_is_the_same_function_ten_times_narrower() -> None:
    problem, theta = make_problem("softmax"), np.linspace(-0.2, 0.3, 20)
    steep = steep_problem("softmax", 10.0)
    before, after = (p.objectives[Task.DPO] for p in (problem, steep))
    assert after.value(theta) == pytest.approx(float(before.value(10.0 * theta)))
    np.testing.assert_allclose(after.gradient(theta), 10.0 * before.gradient(10.0 * theta))
    assert steep.objectives[Task.SFT] is not None
    assert float(steep.objectives[Task.SFT].value(theta)) == float(
        problem.objectives[Task.SFT].value(theta)
    )


def test_a_problem_without_preference_pairs_cannot_be_steep() -> None:
    with pytest.raises(ValueError, match="no preference pairs"):
        steep_problem("quadratic", 10.0)


@pytest.mark.parametrize("lam", [0.02, 0.117, 0.5, 0.93])
def test_the_effective_lam_of_a_minimiser_is_its_own(lam: float) -> None:
    losses = STEEP.problem.losses(STEEP.mix(lam).theta)
    assert float(effective_lam(STEEP, losses)) == pytest.approx(lam, abs=INTERPOLATION)


@pytest.mark.parametrize("seed", range(4))
def test_the_effective_lam_minimises_the_mix_gap_over_lam(seed: int) -> None:
    theta = 0.4 * np.random.default_rng(seed).standard_normal(2)
    losses = STEEP.problem.losses(theta)

    def gap(lam: float) -> float:
        return float(lam * losses[0] + (1.0 - lam) * losses[1]) - STEEP.mix(lam).value

    found = minimize_scalar(gap, bounds=(1e-3, 1 - 1e-3), method="bounded")
    effective = float(np.clip(effective_lam(STEEP, losses), 1e-3, 1 - 1e-3))
    assert effective == pytest.approx(found.x, abs=INTERPOLATION)


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9])
def test_a_clip_that_never_acts_predicts_lam_itself(lam: float) -> None:
    assert predicted_lam(STEEP, lam, 1e6) == pytest.approx(lam, abs=INTERPOLATION)


def test_the_predicted_lam_falls_with_the_clipping_norm() -> None:
    predicted = [predicted_lam(STEEP, 0.5, norm) for norm in (0.3, 1.0, 3.0, 10.0, 100.0)]
    assert np.all(np.diff(predicted) > 0.0)
    assert predicted[0] < 0.05


def test_clipping_moves_lam_as_predicted_and_adam_alone_does_not() -> None:
    """SGD and Adam stay within 0.05 of lam; the clip shifts lam 0.5 by more than 0.3."""
    config = Clipping(
        num_steps=6000,
        num_seeds=8,
        instances=("toy2d",),
        step_scales=(0.1,),
        lams=(0.5,),
        max_norms=(3.0,),
    )
    results = run_sweep(config.batches(), jobs=1, progress=False)
    numbers = config.summary(results)["toy2d"]
    along = {name: value[0] for name, value in numbers["along_lam"].items() if name != "lam"}
    assert along["none"]["mean"] == pytest.approx(0.5, abs=0.05)
    assert along["adam"]["mean"] == pytest.approx(0.5, abs=0.05)
    for clipped in (along["clip 3"], along["clip 3 + adam"]):
        assert clipped["mean"] == pytest.approx(along["predicted"], abs=0.02)
        assert clipped["high"] < 0.2
    norms = numbers["along_norms"]
    assert norms["alright"][0]["high"] < norms["mix"][0]["low"] < 0.5
    assert numbers["gradient_norms"]["ratio"] > 5.0


def test_a_clip_can_shift_lam_the_other_way() -> None:
    """On bernoulli (p = 0.9) the clip trims DPO's rare label more than DPO's weight: lam' > lam."""
    optima = ProblemOptima(steep_problem("bernoulli", 10.0))
    assert predicted_lam(optima, 0.5, 3.0) > 0.99
    # A clip that acts on every sample leaves a mean step of 0 on an interval: no prediction.
    assert np.isnan(predicted_lam(optima, 0.5, 0.3))
