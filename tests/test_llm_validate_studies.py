"""What the studies conclude from end points: effective lam, clipping, lock-out, switches."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from _line import SEEDS, ends, equalised
from scipy.special import logit

from llm.validate import clipping, lockout, switches
from llm.validate.clipping import ClippingRuns
from llm.validate.effective import clipped_lam, effective_lam, slopes
from llm.validate.switches import SwitchRuns, cycles


def curve() -> pd.DataFrame:
    return ends(lambda lam: lam, clipping.CURVE)


@pytest.mark.parametrize("true", [0.1, 0.25, 0.3, 0.6, 0.9])
def test_the_effective_lam_of_a_run_that_ends_where_mix_does_is_its_lam(true: float) -> None:
    # Linear in the logit between nodes 0.15 to 0.25 apart: off by 0.02 at most in lam.
    found = effective_lam(curve(), ends(lambda lam: true))
    assert found == pytest.approx(true, abs=0.02)


def test_clipping_the_longer_gradients_takes_their_weight() -> None:
    assert clipped_lam(0.5, (10.0, 1.0), 1.0) == pytest.approx(0.1 / 1.1)
    assert clipped_lam(0.3, (10.0, 10.0), 1.0) == pytest.approx(0.3)  # both alike
    assert clipped_lam(0.3, (0.5, 0.1), 1.0) == pytest.approx(0.3)  # neither
    assert logit(clipped_lam(0.3, (8.0, 2.0), 2.0)) - logit(0.3) == pytest.approx(-np.log(4.0))


@pytest.mark.parametrize("shifted", ["per_step", "global"])
def test_the_clipping_hypotheses_tell_which_rule_shifts_lam(shifted: str) -> None:
    def towards_sft(lam: float) -> float:
        return lam / (lam + 4.0 * (1.0 - lam))

    arms = {rule: ends(lambda lam: lam) for rule in ("none", "global", "per_step")}
    arms[shifted] = ends(towards_sft)
    found = list(clipping.clipping_hypotheses(ClippingRuns(curve(), arms, 1.0)))
    verdicts = [entry["verdict"] for entry in found]
    if shifted == "per_step":
        assert verdicts == ["holds", "holds", "holds"]
        # log 4, except where the curve ends: lam 0.25 becomes 0.077, below its first point 0.1.
        assert -np.log(4.0) < found[0]["measured"] < -1.0
    else:
        assert verdicts[0] != "holds"
        assert verdicts[1:] == ["fails", "fails"]


def test_slopes_leave_out_seeds_that_undercut_an_optimum() -> None:
    runs = ends(equalised)
    assert list(slopes(runs, (0.0, 0.0)).values()) == pytest.approx([-1.0] * len(SEEDS), abs=0.01)
    runs.loc[runs["seed"] == 2, "f_sft"] = -1e-6
    assert set(slopes(runs, (0.0, 0.0))) == set(SEEDS) - {2}


def test_lock_out_and_what_mends_it_are_told_apart() -> None:
    deaf = ends(lambda lam: 0.5)
    arms = {
        ("train", 1): ends(equalised),
        ("train", 100): deaf,
        ("held_out", 100): ends(equalised),
        ("ema", 100): ends(lambda lam: 0.55 - 0.1 * lam),  # answers the wrong way round
    }
    found = {e["name"]: e for e in lockout.lockout_hypotheses(arms, (0.0, 0.0))}
    for what in ("gap ratio", "DPO's share"):
        assert found[f"stale minibatch values lock out, by the {what}"]["verdict"] == "holds"
        assert found[f"held_out values restore the response, by the {what}"]["verdict"] == "holds"
        assert found[f"ema values restore the response, by the {what}"]["verdict"] == "fails"
    rows = {q.name: q for q in lockout.lockout_quantities(arms, (0.0, 0.0))}
    share = rows["slope of DPO's share on lam: MAXRIGHT, values ema, refresh_every 100"]
    assert share.verdict == "fails"


def test_an_effective_lam_needs_a_curve() -> None:
    with pytest.raises(ValueError, match="two values"):
        effective_lam(ends(lambda lam: lam, (0.5,)), ends(lambda lam: lam))
    bumpy = curve()
    bumpy.loc[bumpy["lam"] == 0.5, "f_sft"] -= 3.0  # one end point far out of line
    # The excess is 4 x - 2. Made monotone it is -1, -1, 1 at lam 0.25, 0.5, 0.75, so that x = 0.4,
    # with an excess of -0.4, lies at 0.3 of the way from 0.5 to 0.75. Seeds move that by 1e-3.
    found = effective_lam(bumpy, ends(lambda lam: 0.4))
    assert logit(found) == pytest.approx(0.3 * logit(0.75), abs=0.005)


@pytest.mark.parametrize("steps", [2, 12, 64, 300])
def test_cycles_divide_the_steps_and_reach_from_alternation_to_sequential(steps: int) -> None:
    found = cycles(steps)
    assert all(steps % n == 0 and n % 2 == 0 for n in found)
    assert (found[0], found[-1]) == (2, steps)
    assert len(found) <= switches.MOST_CYCLES


def test_the_slope_of_the_gap_uses_the_cycles_whose_gaps_are_positive() -> None:
    gaps = {n: 1e-4 * n**1.5 * np.array([0.9, 1.0, 1.1]) for n in (4, 8, 16)}
    gaps[2] = np.array([-0.1, 0.1, 0.1])
    runs = SwitchRuns(gaps, steps=16, distance=2.0, norm=3.0)
    rows = list(switches.switch_quantities(runs))
    assert rows[-1].measured == pytest.approx(1.5)
    assert rows[-1].note == "cycles [4, 8, 16]"
    assert runs.bound(4) == pytest.approx(2.0 * 3.0 * 0.5)
    assert rows[2].verdict == "holds"  # the gap at cycle 8 lies below its bound
    over = SwitchRuns({16: np.array([7.0, 7.1, 7.2])}, steps=16, distance=2.0, norm=3.0)
    assert next(switches.switch_quantities(over)).verdict == "fails"
