"""End points of runs, how two of them are compared over seeds, and the fit of equalisation.

A table of runs has one row per run: algorithm, lam, seed, f_dpo, f_sft, and optionally order, split
and variant (which tell runs of one algorithm apart), f_dpo_error and f_sft_error (half-widths of
numbers that were rounded), cost, p_dpo, refresh_every and cycle. Runs that differ by their seed
only form one `EndPoint`. Algorithms that do not read lam have one end point whatever lam says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import logit

from theory import metrics
from theory.predictions.verdicts import Estimate
from theory.registry import scheduler_options
from theory.schedulers import objective_weights
from theory.tasks import Task

Array = NDArray[np.float64]

MIX_MINIMISERS = ("mix", "alright", "importance")
"""Algorithms whose target is the minimiser of f_Mix."""

LOSSES = ["f_dpo", "f_sft"]
ERRORS = ["f_dpo_error", "f_sft_error"]
MARKS = ("order", "split", "variant")


class Optima(NamedTuple):
    """f_DPO* and f_SFT*, and by how much each may be wrong."""

    dpo: float
    sft: float
    dpo_error: float = 0.0
    sft_error: float = 0.0

    @property
    def values(self) -> Array:
        return np.array([self.dpo, self.sft])

    @property
    def errors(self) -> Array:
        return np.array([self.dpo_error, self.sft_error])


@dataclass(frozen=True, eq=False)
class EndPoint:
    """Where the runs of one setting ended: `runs` is indexed by seed, with the table's columns."""

    algorithm: str
    mark: str
    lam: float | None
    runs: pd.DataFrame

    @property
    def label(self) -> str:
        parts = [self.algorithm, self.mark, "" if self.lam is None else f"lam={self.lam:g}"]
        return " ".join(part for part in parts if part)

    @cached_property
    def losses(self) -> Array:
        """(seeds, 2)."""
        return self.runs[LOSSES].to_numpy(dtype=float)

    @property
    def rounded(self) -> bool:
        """True if the uncertainty of the losses is given, so that one value can stand alone."""
        return set(ERRORS) <= set(self.runs)

    @cached_property
    def errors(self) -> Array:
        return self.runs[ERRORS].to_numpy(dtype=float).max(axis=0) if self.rounded else np.zeros(2)

    def on(self, seeds: pd.Index) -> EndPoint:
        """The same runs, restricted to `seeds` and in their order."""
        if seeds.equals(self.runs.index):
            return self
        return EndPoint(self.algorithm, self.mark, self.lam, self.runs.loc[seeds])

    def first(self, column: str) -> float | None:
        """The mean of an optional column, None where the table lacks it."""
        if column not in self.runs or self.runs[column].isna().any():
            return None
        return float(self.runs[column].mean())


def end_points(table: pd.DataFrame) -> list[EndPoint]:
    """Group the runs of a table, in an order that does not depend on that of its rows.

    Raises:
        ValueError: for a missing column, an unknown algorithm, a loss that is not finite (a run
            that diverged has no end point), a lam out of range or two runs with one name and seed.
    """
    needed = {"algorithm", "lam", "seed", *LOSSES}
    if not needed <= set(table):
        raise ValueError(f"the table of runs lacks {', '.join(sorted(needed - set(table)))}")
    if not np.isfinite(table[LOSSES].to_numpy(dtype=float)).all():
        raise ValueError("the table of runs has a loss that is not finite")
    marks = [mark for mark in MARKS if mark in table]
    words = table[marks].map(_word)
    table = table.assign(_mark=[", ".join(filter(None, row)) for row in words.to_numpy()])
    uses_lam = {a: "lam" in scheduler_options(a) for a in table["algorithm"].unique()}
    read = table["algorithm"].map(uses_lam).astype(bool)
    if not table.loc[read, "lam"].between(0.0, 1.0).all():
        raise ValueError("the table of runs has a lam outside [0, 1]")
    table = table.assign(_lam=table["lam"].where(read).astype(float))
    identity = ["algorithm", "_mark", "_lam", "seed"]
    # Sweeps repeat a run that ignores lam under every lam.
    table = table.drop_duplicates([*identity, *LOSSES]).sort_values(identity)
    if table.duplicated(identity).any():
        raise ValueError("two runs of the table share algorithm, lam, variant and seed")
    groups = table.groupby(identity[:3], dropna=False)
    return [
        EndPoint(str(a), str(m), None if np.isnan(lam) else float(lam), rows.set_index("seed"))
        for (a, m, lam), rows in groups
    ]


def _word(value: object) -> str:
    missing = value is None or (isinstance(value, float) and np.isnan(value))
    return "" if missing else f"split={value:g}" if isinstance(value, float) else str(value)


def families(points: Iterable[EndPoint], algorithms: Sequence[str]) -> list[list[EndPoint]]:
    """End points of each algorithm and variant among `algorithms`, in rising lam."""
    groups: dict[tuple[str, str], list[EndPoint]] = {}
    for point in points:
        if point.algorithm in algorithms and point.lam is not None:
            groups.setdefault((point.algorithm, point.mark), []).append(point)
    return [sorted(group, key=lambda point: point.lam or 0.0) for group in groups.values()]


def common_seeds(points: Sequence[EndPoint]) -> pd.Index:
    """The seeds that every one of the end points has."""
    seeds = points[0].runs.index
    for point in points[1:]:
        if not seeds.equals(point.runs.index):
            seeds = seeds.intersection(point.runs.index)
    return seeds


class Metric(NamedTuple):
    """A number per run, and how far errors of the losses (2,) or of f* (2,) can move it."""

    value: Callable[[Array], Array]
    reach: Callable[[Array], float]
    optimum_errors: Array = np.zeros(2)


def mix_metric(lam: float) -> Metric:
    """f_Mix at lam; f* plays no part."""
    weights = objective_weights(lam)
    return Metric(lambda losses: metrics.mix_value(losses, lam), lambda e: float(weights @ e))


def max_metric(lam: float, optima: Optima) -> Metric:
    """f_Max at lam."""
    weights = objective_weights(lam)
    return Metric(
        lambda losses: metrics.max_value(losses, optima.values, lam),
        lambda e: float(np.max(weights * e)),
        optima.errors,
    )


def distance_metric(optima: Optima) -> Metric:
    """The ideal distance."""
    return Metric(
        lambda losses: metrics.ideal_distance(losses, optima.values),
        lambda e: float(np.linalg.norm(e)),
        optima.errors,
    )


def loss_metric(task: int) -> Metric:
    """One of the two losses."""
    return Metric(lambda losses: losses[..., task], lambda e: float(e[task]))


def excess(rival: EndPoint, own: EndPoint, metric: Metric) -> Estimate:
    """metric(rival) - metric(own), paired by seed where both have the seeds, else Welch's.

    Runs that share a seed share their data, so that pairing removes the common scatter.
    """
    bound = _bound(own, rival, metric)
    first, second = metric.value(rival.losses), metric.value(own.losses)
    common = common_seeds([own, rival])
    if len(common) >= 2 or (len(common) == 1 == len(first) == len(second)):
        difference = metric.value(rival.on(common).losses) - metric.value(own.on(common).losses)
        return Estimate.from_seeds(difference, bound, fixed=rival.rounded and own.rounded)
    return _welch(first, second, bound)


def _bound(own: EndPoint, rival: EndPoint, metric: Metric) -> float:
    """What rounding and a wrong f* (it shifts both points) can do to the difference at worst."""
    rounding = metric.reach(own.errors) + metric.reach(rival.errors)
    return rounding + 2.0 * metric.reach(metric.optimum_errors)


def _welch(first: Array, second: Array, bound: float) -> Estimate:
    mean = float(first.mean() - second.mean())
    if min(len(first), len(second)) < 2:
        return Estimate(mean, freedom=0, bound=bound)
    parts = [values.var(ddof=1) / len(values) for values in (first, second)]
    total = sum(parts)
    spread = sum(p**2 / (len(v) - 1) for p, v in zip(parts, (first, second), strict=True))
    freedom = max(int(total**2 / spread), 1) if spread > 0.0 else 1
    return Estimate(mean, float(np.sqrt(total)), freedom, bound)


def held_out_excess(own: EndPoint, rivals: Sequence[EndPoint], metric: Metric) -> Estimate | None:
    """metric(best rival) - metric(own), where each seed's best rival is chosen on the other seeds.

    Taking the rival that looks best on the same seeds would make every run look beaten; the choice
    on other seeds makes the margin an honest one, and one test instead of one per rival. Needs two
    seeds that all end points share, else None.
    """
    seeds = common_seeds([own, *rivals])
    if len(seeds) < 2 or not rivals:
        return None
    mine = metric.value(own.on(seeds).losses)
    theirs = np.stack([metric.value(rival.on(seeds).losses) for rival in rivals], axis=1)
    others = theirs.sum(axis=0) - theirs
    chosen = others.argmin(axis=1)
    bound = max(_bound(own, rivals[i], metric) for i in chosen)
    return Estimate.from_seeds(theirs[np.arange(len(seeds)), chosen] - mine, bound)


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
