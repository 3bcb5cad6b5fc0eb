"""A number of theory next to the one that was measured: what the table and the JSON hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory.metrics import Interval, mean_interval
from theory.predictions import Verdict
from theory.predictions.verdicts import Claim, Claims, Estimate, judge

Array = NDArray[np.float64]
LEVEL = 0.95


@dataclass(frozen=True)
class Quantity:
    """`theory` is a number or words; the interval is Student's t over seeds at 95%.

    `verdict` is empty where nothing is claimed: the number is reported.
    """

    source: str
    name: str
    theory: float | str
    measured: float
    low: float
    high: float
    verdict: str = ""
    note: str = ""


def measured(
    source: str,
    name: str,
    theory: float | str,
    values: ArrayLike,
    claims: Sequence[Claim] = (),
    note: str = "",
) -> Quantity:
    """From one value per seed; the claims, all of which it takes, decide the verdict."""
    interval = mean_interval(values, LEVEL)
    verdict = decide(source, claims).outcome if claims else ""
    return Quantity(source, name, theory, *interval, verdict, note)


def decide(name: str, claims: Sequence[Claim]) -> Verdict:
    """Holds if all claims are shown, fails if one is refuted (Holm), else not decided.

    One-sided at 97.5%: "holds" says that the two-sided 95% interval lies beyond the threshold.
    """
    return judge(name, Claims(claims, claims), (1.0 + LEVEL) / 2.0)


def above(label: str, values: ArrayLike, threshold: float = 0.0) -> Claim:
    """The claim that the mean over seeds exceeds the threshold."""
    return Claim(label, Estimate.from_seeds(values), threshold)


def missing(source: str, name: str, theory: float | str, why: str) -> Quantity:
    """A quantity that could not be measured, and why."""
    return Quantity(source, name, theory, float("nan"), -float("inf"), float("inf"), "", why)


def hypothesis(
    name: str, statement: str, theory: str, values: Array, claims: Sequence[Claim]
) -> dict[str, Any]:
    """An entry of "hypotheses" in validation.json: one value per seed behind it, or none."""
    known = len(values) > 0
    interval = mean_interval(values, LEVEL) if known else Interval(np.nan, -np.inf, np.inf)
    return {
        "name": name,
        "statement": statement,
        "theory": theory,
        "measured": interval.mean,
        "interval": [interval.low, interval.high],
        "verdict": decide(name, claims).outcome if known else "not decided",
        "seeds": len(values),
    }
