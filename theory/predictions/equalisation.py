"""The fit behind the equalisation test: log(delta_DPO / delta_SFT) against logit(lam)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import logit

from theory.predictions.end_points import EndPoint, Optima, common_seeds
from theory.predictions.verdicts import Estimate
from theory.tasks import Task


class LogLine(NamedTuple):
    """log(delta_DPO/delta_SFT) = intercept + slope logit(lam), least squares seed by seed."""

    slope: Estimate
    intercept: Estimate


def fit_log_line(family: Sequence[EndPoint], optima: Optima) -> LogLine | None:
    """The fit of P3 with its interval; None where a logarithm may be undefined.

    Errors of f* and of rounding enter by what they can do to each logarithm at worst.
    """
    seeds = common_seeds(family)
    gaps = np.stack([point.on(seeds).losses - optima.values for point in family], axis=1)
    errors = np.stack([point.errors for point in family]) + optima.errors
    if not len(seeds) or np.any(gaps <= errors):
        return None
    design = np.stack([np.ones(len(family)), logit([point.lam for point in family])], axis=1)
    solve = np.linalg.pinv(design)
    intercepts, slopes = solve @ np.log(gaps[..., Task.DPO] / gaps[..., Task.SFT]).T
    # -log(1 - e/delta) is the larger of the two ways that an error e can move log(delta).
    reach = np.abs(solve) @ -np.log1p(-errors / gaps.min(axis=0)).sum(axis=1)
    fixed = all(point.rounded for point in family)
    return LogLine(
        Estimate.from_seeds(slopes, float(reach[1]), fixed),
        Estimate.from_seeds(intercepts, float(reach[0]), fixed),
    )
