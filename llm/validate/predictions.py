"""P1 to P6 on a comparison: verdicts, and theory's numbers next to the measured ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np

from llm.validate.causes import ruled_out
from llm.validate.quantities import Quantity, above, measured, missing
from llm.validate.source import Comparison
from theory.metrics import ideal_distance, max_value, mix_value
from theory.predictions import PREDICTIONS, Verdict
from theory.predictions.claims import CostPerStep, Prediction
from theory.predictions.end_points import (
    MIX_MINIMISERS,
    EndPoint,
    common_seeds,
    end_points,
    families,
    fit_log_line,
)
from theory.predictions.verdicts import Estimate
from theory.schedulers import objective_weights
from theory.tasks import Task

THEORY = {
    "P1": "no other run has a lower f_Mix(lam)",
    "P2": "slopes between the odds of neighbouring lam",
    "P3": "slope -1, intercept 0",
    "P4": "ID of Mix <= ID of sequential",
    "P5": "each is best on its own metric only",
    "P6": "ratios of the cost model",
}


def predict(comparison: Comparison, found: dict[str, Any]) -> list[dict[str, Any]]:
    """An entry per prediction. `found` holds what the studies say about causes of a failure."""
    tests = _tests(comparison)
    verdicts = [test.test(comparison.table, comparison.optima) for test in tests]
    return [
        _entry(comparison, test, verdict, found)
        for test, verdict in zip(tests, verdicts, strict=True)
    ]


def _tests(comparison: Comparison) -> list[Prediction]:
    return [
        CostPerStep(costs=comparison.costs) if prediction.key == "P6" else prediction
        for prediction in PREDICTIONS
    ]


def _entry(
    comparison: Comparison, test: Prediction, verdict: Verdict, found: dict[str, Any]
) -> dict[str, Any]:
    failed = verdict.outcome == "fails"
    return {
        "name": test.key,
        "statement": test.statement,
        "theorem": test.theorem,
        "theory": f"{THEORY[test.key]}; margin > {verdict.threshold:g}",
        "measured": verdict.margin,
        "interval": [verdict.low, verdict.high],
        "threshold": verdict.threshold,
        "verdict": verdict.outcome,
        "claim": verdict.claim,
        "claims": verdict.claims,
        "violated": list(verdict.violated),
        "note": verdict.note,
        "ruled_out": ruled_out(comparison, verdict, found) if failed else [],
    }


def comparison_quantities(comparison: Comparison) -> Iterator[Quantity]:
    """Wherever theory gives a number for a comparison: slopes, equalisation, distances, costs."""
    points = end_points(comparison.table)
    for family in families(points, MIX_MINIMISERS):
        for i, j in pairwise(family):
            yield _slope(i, j)
    yield from _equalisation(comparison, points)
    yield from _distances(comparison, points)
    yield from _own_metrics(comparison, points)
    yield from _costs(comparison, points)


def _slope(i: EndPoint, j: EndPoint) -> Quantity:
    """P2 between neighbours in lam, as the ratio -d f_SFT / d f_DPO where both move as they should.

    The verdict is on the linear form, which needs no ratio: odds_i A <= B <= odds_j A.
    """
    lams = [point.lam or 0.0 for point in (i, j)]
    low, high = (lam / (1.0 - lam) if lam < 1.0 else np.inf for lam in lams)
    name, theory = f"slope, {i.label} -> {lams[1]:g}", f"in [{low:.3g}, {high:.3g}]"
    seeds = common_seeds([i, j])
    change = j.on(seeds).losses - i.on(seeds).losses
    fall, rise = -change[:, Task.DPO], change[:, Task.SFT]
    claims = [above("above", rise - low * fall), above("below", high * fall - rise)]
    if np.any(fall <= 0.0) or not len(seeds):
        verdict = (
            measured("P2", name, theory, rise - low * fall, claims).verdict if len(seeds) else ""
        )
        gone = missing("P2", name, theory, "f_DPO does not fall for every seed: no ratio")
        return Quantity(**vars(gone) | {"verdict": verdict})
    return measured("P2", name, theory, rise / fall, claims)


def _equalisation(comparison: Comparison, points: Sequence[EndPoint]) -> Iterator[Quantity]:
    for family in families(points, ("maxright",)):
        line = fit_log_line(family, comparison.optima) if len(family) > 1 else None
        for name, theory in (("slope", -1.0), ("intercept", 0.0)):
            label = f"{name} of log(delta_DPO/delta_SFT) on logit(lam)"
            if line is None:
                why = "an end point lies within the error of an estimated optimum"
                yield missing("P3", label, theory, why)
            else:
                yield _from_estimate("P3", label, theory, getattr(line, name))


def _from_estimate(source: str, name: str, theory: float, estimate: Estimate) -> Quantity:
    low, high = estimate.limits(0.025, 0.025)
    return Quantity(source, name, theory, estimate.mean, low, high)


def _distances(comparison: Comparison, points: Sequence[EndPoint]) -> Iterator[Quantity]:
    """P4's pairs at lam and split nearest 1/2."""
    mixes = [p for p in points if p.algorithm == "mix" and p.lam is not None]
    rivals = [p for p in points if p.algorithm == "sequential"]
    if not mixes or not rivals:
        return
    own = min(mixes, key=lambda p: abs((p.lam or 0.0) - 0.5))
    split = min((p.first("split") or 0.5 for p in rivals), key=lambda s: abs(s - 0.5))
    for rival in (p for p in rivals if p.first("split") == split):
        seeds = common_seeds([own, rival])
        if len(seeds):
            ours, theirs = (
                ideal_distance(p.on(seeds).losses, comparison.optima.values) for p in (own, rival)
            )
            name = f"ideal distance of {rival.label} less that of {own.label}"
            yield measured("P4", name, ">= 0", theirs - ours, [above("farther", theirs - ours)])


def _own_metrics(comparison: Comparison, points: Sequence[EndPoint]) -> Iterator[Quantity]:
    mixes, maxes = (
        [p for p in points if p.algorithm == name and p.lam is not None]
        for name in ("mix", "maxright")
    )
    for own, other in product(mixes, maxes):
        seeds = common_seeds([own, other])
        if own.lam != other.lam or own.lam is None or not len(seeds):
            continue
        a, b = own.on(seeds).losses, other.on(seeds).losses
        f_max = [max_value(x, comparison.optima.values, own.lam) for x in (a, b)]
        margins = {
            "f_Mix of MAXRIGHT less Mix": mix_value(b - a, own.lam),
            "f_Max of Mix less MAXRIGHT": f_max[0] - f_max[1],
        }
        for what, margin in margins.items():
            name = f"{what}, lam {own.lam:g}"
            yield measured("P5", name, ">= 0", margin, [above(name, margin)])


def _costs(comparison: Comparison, points: Sequence[EndPoint]) -> Iterator[Quantity]:
    """Seconds per step over those of Mix (else of the first end point), next to the counts."""
    costed = [p for p in points if p.first("cost") is not None]
    unit = next((p for p in costed if p.algorithm == "mix"), costed[0] if costed else None)
    model = CostPerStep(costs=comparison.costs)
    for point in costed:
        if unit is None or point is unit:
            continue
        seeds = common_seeds([unit, point])
        ratio = (point.runs.loc[seeds, "cost"] / unit.runs.loc[seeds, "cost"]).to_numpy(dtype=float)
        if len(ratio):
            predicted = model.model(point) / model.model(unit)
            yield measured("P6", f"cost of {point.label} over {unit.label}", predicted, ratio)


def lower_bounds(comparison: Comparison) -> Iterator[Quantity]:
    """P1 as a bound: G_Mix of a run is at least what the best other end point has less."""
    points = end_points(comparison.table)
    for own in points:
        if own.algorithm not in MIX_MINIMISERS or own.lam is None:
            continue
        weights = objective_weights(own.lam)
        rivals = [(float((p.losses @ weights).mean()), p) for p in points if p is not own]
        if not rivals:
            continue
        _, best = min(rivals, key=lambda pair: pair[0])
        seeds = common_seeds([own, best])
        if len(seeds):
            margin = (own.on(seeds).losses - best.on(seeds).losses) @ weights
            name = f"f_Mix({own.lam:g}) of {own.label} less {best.label}"
            note = "the other run is the best in hindsight: biased towards a violation"
            yield measured("P1", name, "<= 0", margin, (), note)
