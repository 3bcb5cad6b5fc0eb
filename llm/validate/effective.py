"""Which lam a run served, and how runs respond to lam: estimators on end points.

The definition of the effective lam is that of `theory.beyond.clipping`: the minimiser of
f_Mix(.; lam') has an excess s = f_SFT - f_DPO that rises with lam', and a run serves the lam' whose
minimiser has its own excess. Here the end points of Mix, without clipping, stand for the minimisers
(their mean over seeds, made monotone); in between, s is linear in logit(lam').
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit, logit

from theory.beyond.lockout import responses
from theory.metrics import optimality_gaps

Array = NDArray[np.float64]
LOSSES = ["f_dpo", "f_sft"]


def effective_lam(mix: pd.DataFrame, runs: pd.DataFrame) -> Array:
    """lam' of each row of `runs`, from the end points `mix` of several lam: (rows,).

    Outside the range of Mix's end points it is the first or the last lam of the curve.

    Raises:
        ValueError: for fewer than two lam in `mix`, or one outside (0, 1).
    """
    ends = mix.assign(excess=mix["f_sft"] - mix["f_dpo"]).groupby("lam")["excess"].mean()
    lams = ends.index.to_numpy(dtype=float)
    if len(lams) < 2 or lams[0] <= 0.0 or lams[-1] >= 1.0:
        raise ValueError(f"an effective lam needs Mix at two values in (0, 1), not {lams.tolist()}")
    curve = np.maximum.accumulate(ends.to_numpy())
    return expit(np.interp(runs["f_sft"] - runs["f_dpo"], curve, logit(lams)))


def clipped_lam(lam: float, norms: tuple[float, float], max_norm: float) -> float:
    """What clipping each objective by itself makes of lam, for gradients of norms (DPO, SFT).

    Steps of length min(n_i, c) in place of n_i: odds' = odds s_DPO / s_SFT, s_i = min(1, c / n_i).
    """
    dpo, sft = (min(1.0, max_norm / norm) for norm in norms)
    return lam * dpo / (lam * dpo + (1.0 - lam) * sft)


def slopes(runs: pd.DataFrame, optimum: tuple[float, float]) -> dict[int, float]:
    """Slope of log(delta_DPO / delta_SFT) on logit(lam) by seed; equalisation has -1.

    Seeds with an end point at or below an estimated optimum have no logarithm and are left out.
    """
    gaps = optimality_gaps(runs[LOSSES], optimum)
    below = set(runs["seed"][np.any(gaps <= 0.0, axis=1)])
    kept = runs[~runs["seed"].isin(below)]
    return responses(kept, optimum) if len(kept) else {}


def share_slopes(runs: pd.DataFrame) -> dict[int, float]:
    """Slope of the share of DPO steps on lam by seed: positive if runs answer to lam at all."""
    return {
        int(seed): float(np.polyfit(own["lam"], own["p_dpo"], 1)[0])
        for seed, own in runs.groupby("seed")
    }


def paired(first: dict[int, float], second: dict[int, float]) -> Array:
    """first - second on the seeds of both."""
    return np.array([first[seed] - second[seed] for seed in first if seed in second])
