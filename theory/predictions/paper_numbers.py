"""The numbers that arXiv 2410.15483 publishes for Pythia-1b, and what the predictions make of them.

READ OFF THE FIGURES OF THE PAPER AND ROUNDED: each carries the rounding as a hard bound, and no
seeds are known. Only the runs at lam = 0.5 (sequential: as many steps on each objective) are
available as losses; of other lam two facts about the published figures are known, recorded as such.
Nothing here is interpolated, and nothing was measured by this project.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from theory.predictions.claims import PREDICTIONS, Prediction
from theory.predictions.end_points import ERRORS, LOSSES, Optima, end_points
from theory.predictions.verdicts import Claim, Claims, Estimate, Verdict, judge, within

SOURCE = "arXiv 2410.15483, Pythia-1b, read off the figures, rounded"
ROUNDING = 0.005
"""Half-width of a number that was read off a figure."""

OPTIMA = Optima(dpo=0.065, sft=1.498)
"""Without errors: the figures show the gaps themselves, so that f* cancels."""


class Gaps(NamedTuple):
    dpo: float
    sft: float
    ideal_distance: float


LAM = 0.5
GAPS: dict[str, Gaps] = {
    "sequential": Gaps(0.83, 0.045, 0.83),
    "mix": Gaps(0.05, 0.155, 0.165),
    "alright": Gaps(0.245, 0.09, 0.26),
    "maxright": Gaps(0.095, 0.13, 0.16),
}
"""Gaps to the optima at lam = 0.5; sequential is DPO, then SFT, for the same number of steps."""

EXTRA_RUN_TIME: dict[str, float] = {"mix": 0.37, "alright": -0.01, "maxright": 0.025}
"""Against sequential. A time to reach a target: the published code stops early."""

ALRIGHT_EXCESS = Estimate(mean=-0.05, bound=0.01)
"""f_Mix(0.5) of ALRIGHT trained for lam = 0.75, less that of ALRIGHT trained for 0.5: -.04 to -.06.

0.5 and 0.75 are neighbours among the paper's values of lam (.01 .25 .5 .75 .99), so this one fact
bears on P1 and, in the linear form of its lower slope bound, on P2.
"""

MAXRIGHT_SLOPE = Estimate(mean=-0.24, bound=ROUNDING)
"""Fitted slope of log(delta_DPO / delta_SFT) against logit(lam) of the published MAXRIGHT runs."""

RUN_TIME_NOTE = (
    "not tested: the published run times (Mix +37%, ALRIGHT -1%, MAXRIGHT +2.5% against "
    "sequential) are times to a target, not costs per step"
)


def table() -> pd.DataFrame:
    """The published end points at lam = 0.5 as a table of runs, one nominal seed each."""
    rows = []
    for algorithm, gaps in GAPS.items():
        sequential = algorithm == "sequential"
        losses = OPTIMA.values + np.array([gaps.dpo, gaps.sft])
        rows.append(
            {"algorithm": algorithm, "lam": LAM, "seed": 0}
            | dict(zip(LOSSES, losses.tolist(), strict=True))
            | dict.fromkeys(ERRORS, ROUNDING)
            | {
                "order": "dpo_then_sft" if sequential else "",
                "split": 0.5 if sequential else np.nan,
            }
        )
    return pd.DataFrame(rows)


def facts(prediction: Prediction) -> list[Claim]:
    """The published facts that bear on a prediction, beyond the end points at lam = 0.5."""
    about = "published fact: ALRIGHT lam=0.5 < ALRIGHT lam=0.75 on f_Mix(0.5)"
    if prediction.key in ("P1", "P2"):
        return [Claim(about, ALRIGHT_EXCESS, -prediction.tolerance)]
    if prediction.key == "P3":
        label = "published fact: slope is -1"
        return within(label, MAXRIGHT_SLOPE, -1.0, prediction.tolerance)
    return []


def paper_verdicts(predictions: tuple[Prediction, ...] = PREDICTIONS) -> list[Verdict]:
    """Each prediction on the published numbers; rounding is the only uncertainty known."""
    points = end_points(table())
    results = []
    for prediction in predictions:
        claims, more = prediction.claims(points, OPTIMA), facts(prediction)
        note = RUN_TIME_NOTE if prediction.key == "P6" else "" if more else claims.missing
        joined = Claims([*claims.support, *more], [*claims.against, *more], note)
        results.append(judge(prediction.key, joined))
    return results
