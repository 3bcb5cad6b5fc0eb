"""Verdicts on a prediction from few runs: holds, fails, or not decided.

A prediction is a list of claims "this margin exceeds its threshold", each with a one-sided test:

- It *holds* if every claim is shown at the level asked for. To show all of them, each may be
  tested at the full level without correction (intersection-union test: Berger 1982).
- It *fails* if the opposite of at least one claim is shown after Holm's correction (Holm 1979), so
  that the chance of a false "fails" stays below 1 - level whatever the number of claims.
- Otherwise it is *not decided*: the threshold lies inside an interval.

Intervals over seeds are Student's t, not a bootstrap: from three seeds a bootstrap has ten distinct
resamples and covers far too little. What seeds cannot show (the rounding of a published number, the
error of an estimated optimum) widens the interval by a fixed bound on each side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student_t

OUTCOMES = ("holds", "fails", "not decided")


class Estimate(NamedTuple):
    """A margin: mean, standard error with its degrees of freedom, and a systematic bound.

    `error` 0 says that nothing is random in it; `freedom` 0 that the scatter is unknown (one seed).
    """

    mean: float
    error: float = 0.0
    freedom: int = 1
    bound: float = 0.0

    @classmethod
    def from_seeds(cls, values: ArrayLike, bound: float = 0.0, fixed: bool = False) -> Estimate:
        """From one value per seed. `fixed`: a lone value has no scatter beyond `bound`."""
        values = np.asarray(values, dtype=float)
        count = len(values)
        if count == 0:
            return cls(np.nan, freedom=0)
        mean = float(values.mean())
        if count == 1:
            return cls(mean, freedom=int(fixed), bound=bound)
        return cls(mean, float(values.std(ddof=1) / np.sqrt(count)), count - 1, bound)

    def limits(self, low_tail: float, high_tail: float) -> tuple[float, float]:
        """One-sided limits that err with probability `low_tail` and `high_tail`."""
        if self.freedom == 0:
            return -np.inf, np.inf
        low, high = (student_t.isf(tail, self.freedom) for tail in (low_tail, high_tail))
        spread = (self.bound + self.error * low, self.bound + self.error * high)
        return float(self.mean - spread[0]), float(self.mean + spread[1])

    def p_above(self, threshold: float) -> float:
        """p-value of "margin <= threshold": small if the margin is shown to exceed it."""
        return self._p_value(self.mean - self.bound - threshold)

    def p_below(self, threshold: float) -> float:
        """p-value of "margin >= threshold"."""
        return self._p_value(threshold - self.mean - self.bound)

    def _p_value(self, distance: float) -> float:
        if self.freedom == 0:
            return 1.0
        if self.error == 0.0:
            return 0.0 if distance > 0.0 else 1.0
        return float(student_t.sf(distance / self.error, self.freedom))


class Claim(NamedTuple):
    """The claim that the margin exceeds `threshold` (0, or minus a tolerance)."""

    label: str
    margin: Estimate
    threshold: float = 0.0


def within(label: str, estimate: Estimate, value: float, tolerance: float) -> list[Claim]:
    """|estimate - value| < tolerance, as two one-sided claims (equivalence test)."""
    sides = ((1.0, "not below"), (-1.0, "not above"))
    return [
        Claim(
            f"{label} ({side})",
            estimate._replace(mean=sign * (estimate.mean - value)),
            -tolerance,
        )
        for sign, side in sides
    ]


class Claims(NamedTuple):
    """`support` must all be shown for "holds"; refuting one of `against` gives "fails".

    `missing` says what the table lacks where there is nothing to test.
    """

    support: Sequence[Claim] = ()
    against: Sequence[Claim] = ()
    missing: str = ""


@dataclass(frozen=True)
class Verdict:
    """The outcome, and the claim that decides it with its margin and interval.

    "holds" reads low > threshold and "fails" high < threshold; `low` is the one-sided limit at the
    level of the test, `high` the same after Bonferroni's correction (Holm's first step).
    """

    prediction: str
    outcome: str
    claim: str = ""
    margin: float = np.nan
    low: float = -np.inf
    high: float = np.inf
    threshold: float = 0.0
    claims: int = 0
    violated: tuple[str, ...] = ()
    """Claims shown to be false, by Holm's procedure."""
    note: str = ""


def judge(prediction: str, claims: Claims, level: float = 0.95) -> Verdict:
    """The verdict on one prediction.

    Raises:
        ValueError: if the level is not strictly between 1/2 and 1.
    """
    if not 0.5 < level < 1.0:
        raise ValueError(f"level is {level}; it must lie strictly between 0.5 and 1")
    support, against = list(claims.support), list(claims.against)
    if not support:
        return Verdict(prediction, "not decided", note=claims.missing)
    tail = 1.0 - level
    violated = holm([c.margin.p_below(c.threshold) for c in against], tail)
    shown = max(c.margin.p_above(c.threshold) for c in support) <= tail
    if any(violated):
        outcome, worst = "fails", min(against, key=_by_refutation)
    else:
        outcome = "holds" if shown else "not decided"
        worst = min(support, key=_by_doubt)
    low, high = worst.margin.limits(tail, tail / max(len(against), 1))
    return Verdict(
        prediction,
        outcome,
        worst.label,
        worst.margin.mean,
        low,
        high,
        worst.threshold,
        len(support),
        tuple(c.label for c, refuted in zip(against, violated, strict=True) if refuted),
        claims.missing,
    )


def _by_refutation(claim: Claim) -> tuple[float, float]:
    """Sorts the claim that is refuted most clearly first."""
    return claim.margin.p_below(claim.threshold), claim.margin.mean - claim.threshold


def _by_doubt(claim: Claim) -> tuple[float, float]:
    """Sorts the claim that is shown least clearly first."""
    return -claim.margin.p_above(claim.threshold), claim.margin.mean - claim.threshold


def holm(p_values: Sequence[float], tail: float) -> list[bool]:
    """Holm's step-down procedure: which hypotheses are rejected at family-wise level `tail`."""
    rejected = [False] * len(p_values)
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[index] > tail / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected
