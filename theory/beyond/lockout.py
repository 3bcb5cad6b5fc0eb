"""Lock-out of MAXRIGHT: the second mechanism behind revealed preferences that fail.

Exact MAXRIGHT equalises the weighted gaps, lam delta_1 = (1 - lam) delta_2, so that
log(delta_1 / delta_2) answers to logit(lam) with slope -1. With values from minibatches, and only
the stepped objective's value renewed between refreshes, one lucky draw makes an objective look
solved: nothing steps on it, hence nothing renews its value, until the next refresh. The slope rises
as refreshes get rarer; on softmax its sign reverses, on bernoulli it stays negative. A moving
average of the values (weight 0.02) brings it back towards -1, the less the rarer the refreshes.
Whether an objective is locked out is inferred from the slope here, not counted.

Staleness without noise (source "exact") costs little of the response up to k = 100. Measured at the
last iterate, just before a refresh is due; averages smooth the swings between refreshes and can
show another slope.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.special import logit

from theory.beyond.base import Experiment, Numbers, final
from theory.metrics import mean_interval, optimality_gaps
from theory.optima import ProblemOptima
from theory.plotting import beyond as plotting
from theory.problems import make_problem
from theory.sweep import Batch, Variant

EMA_WEIGHT = 0.02


class Source(NamedTuple):
    """Where MAXRIGHT's values come from, and the weight of a new one against the old."""

    values: str
    value_ema: float = 1.0


SOURCES = {
    "exact": Source("exact"),
    "same": Source("same"),
    "fresh": Source("fresh"),
    "same_ema": Source("same", EMA_WEIGHT),
    "fresh_ema": Source("fresh", EMA_WEIGHT),
}


@dataclass(frozen=True)
class Lockout(Experiment):
    """The response of log(delta_1 / delta_2) to logit(lam), by source and refresh period."""

    name: ClassVar[str] = "lockout"
    num_steps: int = 8000
    num_seeds: int = 10
    problems: tuple[str, ...] = ("bernoulli", "softmax")
    lams: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9)
    periods: tuple[int, ...] = (1, 10, 100, 1000)
    batch_size: int = 4

    def batches(self) -> list[Batch]:
        return [batch for problem in reversed(self.problems) for batch in self._batches(problem)]

    def _batches(self, problem: str) -> Iterator[Batch]:
        for period in self.periods:
            for name, source in SOURCES.items():
                yield Batch(
                    problem,
                    "maxright",
                    self.lams,
                    self.seeds,
                    self.num_steps,
                    options={"refresh_every": period, "value_ema": source.value_ema},
                    variants=(
                        Variant(
                            f"{name}, refresh_every={period}",
                            columns={"source": name, "refresh_every": period},
                        ),
                    ),
                    record_steps=(self.num_steps,),
                    batch_size=self.batch_size,
                    values=source.values,
                )

    def summary(self, results: pd.DataFrame) -> dict[str, Any]:
        return {problem: self._of_problem(results, problem) for problem in self.problems}

    def _of_problem(self, results: pd.DataFrame, problem: str) -> dict[str, Any]:
        optimum = ProblemOptima(make_problem(problem)).values
        rows = final(results[results["problem"] == problem], "last")
        numbers: dict[str, Any] = {"refresh_every": list(self.periods)}
        for name in SOURCES:
            own = rows[rows["source"] == name]
            groups = dict(iter(own.groupby("refresh_every")))
            slopes = [responses(groups[period], optimum) for period in self.periods]
            numbers[name] = [mean_interval(list(slope.values()))._asdict() for slope in slopes]
        return numbers

    def report(self, summary: dict[str, Any]) -> str:
        lines = [
            f"Slope of log(delta_DPO/delta_SFT) along logit(lam) after {self.num_steps:,} steps, "
            f"minibatches of {self.batch_size}; equalisation has -1"
        ]
        for problem, numbers in summary.items():
            periods = "".join(f"{f'k={period}':>16}" for period in self.periods)
            lines.append(f"{problem:<14}{periods}")
            for name in SOURCES:
                cells = "".join(f"{_cell(value):>16}" for value in numbers[name])
                lines.append(f"  {name:<12}{cells}")
        return "\n".join(lines)

    def figure(self, summary: dict[str, Any]) -> tuple[Figure, Numbers]:
        return plotting.lockout_figure(summary)


def responses(rows: pd.DataFrame, optimum: tuple[float, float]) -> dict[int, float]:
    """The least-squares slope of log(delta_1 / delta_2) on logit(lam) for each seed.

    `rows` holds one end point per lam in (0, 1) and seed.
    """
    slopes = {}
    for seed, own in rows.groupby("seed"):
        gaps = optimality_gaps(own[["f_dpo", "f_sft"]], optimum)
        ratio = np.log(gaps[:, 0] / gaps[:, 1])
        slopes[int(seed)] = float(np.polyfit(logit(own["lam"]), ratio, 1)[0])
    return slopes


def _cell(value: dict[str, float]) -> str:
    half = (value["high"] - value["low"]) / 2
    return f"{value['mean']:.2f} ± {half:.2f}" if np.isfinite(half) else f"{value['mean']:.2f}"
