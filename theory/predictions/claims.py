"""P1 to P6, each with its statement, its proof and its statistical test.

A prediction reads a table of runs (see `theory.predictions.end_points`), here from the simulator,
in `llm` from language models. P1 to P5 follow from what the end points minimise, without convexity:
where one fails, its runs have not reached what they were to minimise. Notation: end point
theta_lam of a run for lam, w = (lam, 1 - lam), delta_i = f_i - f_i*, f_Mix = w . f,
f_Max = max_i w_i delta_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import ClassVar

import numpy as np
import pandas as pd

from theory.costs import Costs, cost_per_step
from theory.predictions.end_points import (
    MIX_MINIMISERS,
    EndPoint,
    Metric,
    Optima,
    common_seeds,
    distance_metric,
    end_points,
    excess,
    families,
    fit_log_line,
    held_out_excess,
    loss_metric,
    max_metric,
    mix_metric,
)
from theory.predictions.verdicts import Claim, Claims, Estimate, Verdict, judge, within
from theory.registry import flags_of, typical_scheduler
from theory.schedulers import ORDERS
from theory.tasks import Task


@dataclass(frozen=True)
class Prediction:
    """A falsifiable statement and its test. `tolerance` is the violation that still counts as none.

    Margins are losses in nats unless a prediction says otherwise; 0.01 is 1% of perplexity.
    """

    key: ClassVar[str]
    statement: ClassVar[str]
    theorem: ClassVar[str]
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        if not (np.isfinite(self.tolerance) and self.tolerance >= 0.0):
            raise ValueError(f"tolerance is {self.tolerance}; it must be finite and not negative")

    def claims(self, points: Sequence[EndPoint], optima: Optima) -> Claims:
        """The claims that the end points allow to test."""
        raise NotImplementedError

    def test(self, table: pd.DataFrame, optima: Optima, level: float = 0.95) -> Verdict:
        """The verdict on a table of runs. Few seeds widen the intervals; one seed decides nothing.

        Raises:
            ValueError: for a table that `theory.end_points.end_points` refuses.
        """
        return judge(self.key, self.claims(end_points(table), optima), level)

    def _excess(self, label: str, rival: EndPoint, own: EndPoint, metric: Metric) -> Claim:
        return Claim(label, excess(rival, own, metric), -self.tolerance)


def _decide(claims: list[Claim], missing: str) -> Claims:
    """Claims that serve both ways, or what is missing where there are none."""
    return Claims(claims, claims, "" if claims else missing)


@dataclass(frozen=True)
class RevealedPreference(Prediction):
    """P1. theta_lam minimises f_Mix(lam), so no other end point has a lower f_Mix(lam).

    A violation v bounds the gap without knowing any optimum: G_Mix(theta_lam) >= v. Rivals are all
    other end points, whatever their algorithm. Refuted by `held_out_excess`: one test per run.
    """

    key = "P1"
    statement = "the run trained for lam has the least f_Mix(lam) of all end points"
    theorem = "revealed preference (definition of the minimiser)"

    def claims(self, points: Sequence[EndPoint], optima: Optima) -> Claims:
        support, against = [], []
        for own in points:
            if own.algorithm not in MIX_MINIMISERS or own.lam is None:
                continue
            rivals, metric = [point for point in points if point is not own], mix_metric(own.lam)
            pairs = [self._excess(f"{own.label} < {r.label}", r, own, metric) for r in rivals]
            support += pairs
            held_out = held_out_excess(own, rivals, metric)
            if held_out is None:
                against += pairs
            else:
                label = f"{own.label} < the best other run"
                against.append(Claim(label, held_out, -self.tolerance))
        return Claims(support, against, "" if support else "no two runs to compare")


@dataclass(frozen=True)
class MonotoneInLam(Prediction):
    """P2. For neighbours i < j in lam, with A = f_DPO(i) - f_DPO(j), B = f_SFT(j) - f_SFT(i):

        A >= 0,  B >= 0  and  lam_i/(1 - lam_i) <= B/A <= lam_j/(1 - lam_j).

    P1 at lam_i reads (1 - lam_i) B - lam_i A >= 0, at lam_j it is lam_j A - (1 - lam_j) B >= 0.
    Hence odds_i A <= B <= odds_j A and, as odds_i < odds_j, A >= 0 and B >= 0. So P2 is P1 between
    neighbours; conversely, summing the first line over neighbours gives P1 between any two values
    of lam of one algorithm. The bounds on the slope are tested in this linear form, which needs no
    ratio of two small numbers. Rise and fall are tested strictly, without the tolerance.
    """

    key = "P2"
    statement = "f_DPO falls and f_SFT rises with lam, slopes within the odds of neighbouring lam"
    theorem = "P1 between neighbouring lam"

    def claims(self, points: Sequence[EndPoint], optima: Optima) -> Claims:
        claims: list[Claim] = []
        for family in families(points, MIX_MINIMISERS):
            for i, j in pairwise(family):
                pair = f"{i.label} -> {j.lam:g}"
                claims.append(Claim(f"f_DPO falls, {pair}", excess(i, j, loss_metric(Task.DPO))))
                claims.append(Claim(f"f_SFT rises, {pair}", excess(j, i, loss_metric(Task.SFT))))
                for own, rival, side in ((i, j, "above lower"), (j, i, "below upper")):
                    metric = mix_metric(_lam(own))
                    claims.append(self._excess(f"slope {side} odds, {pair}", rival, own, metric))
        return _decide(claims, "no algorithm for f_Mix has two values of lam")


@dataclass(frozen=True)
class Equalisation(Prediction):
    """P3. A minimiser of f_Max, 0 < lam < 1, has lam delta_DPO = (1 - lam) delta_SFT.

    Were h_1 > h_2 there, f_Max would equal h_1 nearby, so the point would minimise f_DPO locally,
    hence (convexity, or no local minima other than global ones) have h_1 = 0 > h_2 >= 0. So
    log(delta_DPO/delta_SFT) = -logit(lam): slope -1, intercept 0. Without conflict both delta are
    0 and there is nothing to fit. It concerns the last iterate of MAXRIGHT with exact values: give
    the table those runs only. `tolerance` is on slope and intercept.
    """

    key = "P3"
    statement = "log(delta_DPO/delta_SFT) = -logit(lam) for exact MAXRIGHT"
    theorem = "equalisation at the minimiser of f_Max"
    tolerance: float = 0.1

    def claims(self, points: Sequence[EndPoint], optima: Optima) -> Claims:
        claims, missing = [], "MAXRIGHT needs two values of lam strictly between 0 and 1"
        for family in families(points, ("maxright",)):
            family = [point for point in family if 0.0 < _lam(point) < 1.0]
            if len(family) < 2:
                continue
            line = fit_log_line(family, optima)
            if line is None:
                missing = "an end point lies within the error of an optimum, or below it"
                continue
            name = family[0].mark
            claims += within(f"slope is -1 {name}".strip(), line.slope, -1.0, self.tolerance)
            claims += within(f"intercept is 0 {name}".strip(), line.intercept, 0.0, self.tolerance)
        return _decide(claims, missing)


@dataclass(frozen=True)
class IdealDistance(Prediction):
    """P4. ID(theta_lam) <= ID(theta_last*): lam <= 1/2 if SFT comes last, lam >= 1/2 if DPO does.

    SFT last: the limit has delta = (d, 0), so ID = d. Optimality gives lam a + (1 - lam) b <= lam d
    for the delta (a, b) >= 0 of theta_lam. Over that triangle a^2 + b^2 is convex, so largest at a
    vertex: (d, 0) or (0, lam d/(1 - lam)), which is no farther out iff lam <= 1/2. A finite second
    stage has not reached the limit: `split` picks the runs whose first stage is nearest that share
    of the budget, since a split tuned in hindsight may well beat Mix.
    """

    key = "P4"
    statement = "ideal distance of Mix <= that of sequential (SFT last: lam <= 1/2; DPO last: >=)"
    theorem = "a convex function on a triangle is largest at a vertex"
    split: float = 0.5

    def claims(self, points: Sequence[EndPoint], optima: Optima) -> Claims:
        metric, claims = distance_metric(optima), []
        for order, own in product(ORDERS, points):
            if own.algorithm not in MIX_MINIMISERS or own.lam is None:
                continue
            if own.lam > 0.5 if order == "dpo_then_sft" else own.lam < 0.5:
                continue
            for rival in self._sequential(points, order):
                label = f"{own.label} <= {rival.label}"
                claims.append(self._excess(label, rival, own, metric))
        return _decide(claims, "no sequential run whose order the theorem covers")

    def _sequential(self, points: Sequence[EndPoint], order: str) -> list[EndPoint]:
        runs = [p for p in points if p.algorithm == "sequential" and order in p.mark]
        away = [abs((p.first("split") or self.split) - self.split) for p in runs]
        return [p for p, distance in zip(runs, away, strict=True) if distance == min(away)]


@dataclass(frozen=True)
class OwnMetric(Prediction):
    """P5. At each lam, no run beats theta_lam on f_Mix or MAXRIGHT on f_Max; not the reverse.

    The weak inequalities are the definitions of the two minimisers. They are strict unless
    theta_lam equalises (by symmetry at lam = 1/2 on BernPair, say), so strictness is asked of the
    mean over lam only: MAXRIGHT is worse than Mix on f_Mix, Mix worse than MAXRIGHT on f_Max.
    Mix stands for every algorithm whose target is the minimiser of f_Mix, each by itself.
    """

    key = "P5"
    statement = "Mix is best on f_Mix, MAXRIGHT on f_Max, and neither on the other's"
    theorem = "definitions of the minimisers"

    def claims(self, points: Sequence[EndPoint], optima: Optima) -> Claims:
        claims: list[Claim] = []
        for family in families(points, MIX_MINIMISERS):
            pairs = [
                (mix, other)
                for mix, other in product(family, points)
                if other.algorithm == "maxright" and other.lam == mix.lam
            ]
            on_mix = [
                self._pair("f_Mix", mix, other, mix_metric(_lam(mix))) for mix, other in pairs
            ]
            on_max = [
                self._pair("f_Max", other, mix, max_metric(_lam(mix), optima))
                for mix, other in pairs
            ]
            for weak in filter(None, (on_mix, on_max)):
                claims += [*weak, _strict_mean(weak, family[0].algorithm)]
        return _decide(claims, "no lam with runs for f_Mix and for f_Max")

    def _pair(self, name: str, own: EndPoint, rival: EndPoint, metric: Metric) -> Claim:
        return self._excess(f"{name}: {own.label} < {rival.label}", rival, own, metric)


def _strict_mean(weak: Sequence[Claim], algorithm: str) -> Claim:
    """The mean margin over lam is positive; errors add up as if they were aligned."""
    mean, error, freedom, bound = np.array([claim.margin for claim in weak]).T
    joined = Estimate(mean.mean(), error.mean(), int(freedom.min()), bound.mean())
    name = weak[0].label.partition(":")[0]
    return Claim(f"{name}: {algorithm} and maxright differ, mean over lam", joined)


def _lam(point: EndPoint) -> float:
    assert point.lam is not None  # every algorithm of a family reads lam
    return point.lam


@dataclass(frozen=True)
class CostPerStep(Prediction):
    """P6. The cost per step of the algorithms is in the ratios of `theory.costs.cost_per_step`.

    Follows from counting forward and backward passes. The table's `cost` is a mean per step in any
    unit; the log of measured over predicted must be the same for all end points, within
    log(1 + tolerance). Sequential and MAXRIGHT runs need `p_dpo`, their share of DPO steps; `costs`
    is to be measured on the same machine or counted in tokens.
    """

    key = "P6"
    statement = "costs per step are in the ratios of the cost model"
    theorem = "counting forward and backward passes"
    tolerance: float = 0.1
    costs: Costs = field(default_factory=Costs)

    def claims(self, points: Sequence[EndPoint], optima: Optima) -> Claims:
        costed = [point for point in points if point.first("cost") is not None]
        if len(costed) < 2:
            return Claims(missing="no costs of two end points")
        seeds = common_seeds(costed)
        measured = np.array([np.log(point.runs.loc[seeds, "cost"]) for point in costed])
        ratios = measured - np.log([self.model(point) for point in costed])[:, None]
        ratios -= ratios.mean(axis=0)
        tolerance = float(np.log1p(self.tolerance))
        claims: list[Claim] = []
        for point, ratio in zip(costed, ratios, strict=True):
            claims += within(f"cost of {point.label}", Estimate.from_seeds(ratio), 0.0, tolerance)
        return _decide(claims, "")

    def model(self, point: EndPoint) -> float:
        """Cost per step that the model predicts for the setting of an end point."""
        flags = flags_of(point.algorithm).values()
        numbers = (flag.name for flag in flags if flag.kind is not str)
        given = {name: point.first(name) for name in numbers} | {"lam": point.lam}
        scheduler = typical_scheduler(point.algorithm, given)
        return cost_per_step(scheduler, costs=self.costs, p_dpo=point.first("p_dpo"))


PREDICTIONS: tuple[Prediction, ...] = (
    RevealedPreference(),
    MonotoneInLam(),
    Equalisation(),
    IdealDistance(),
    OwnMetric(),
    CostPerStep(),
)


def verdicts(
    table: pd.DataFrame,
    optima: Optima,
    predictions: Sequence[Prediction] = PREDICTIONS,
    level: float = 0.95,
) -> list[Verdict]:
    """Each prediction's verdict. Each stands at `level` by itself: they are six hypotheses."""
    return [prediction.test(table, optima, level) for prediction in predictions]
