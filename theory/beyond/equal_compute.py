"""ALRIGHT, its importance-sampled form and Mix at equal compute, against the predicted ratio.

A budget of C buys C / cost steps, and E G_Mix of the uniform average is about merit / (2C), merit =
cost * tr(H^-1 V) (`theorems.importance`, `theory.costs`). So the ratio of two methods' gaps
at equal compute should be the ratio of their merits. The budget is what `num_steps` steps of Mix
cost. The law is exact to leading order for quadratics; elsewhere third derivatives add a term of
the same order where the noise is large (see `leading_order.uniform_average_gap`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from theory.beyond.base import Experiment, Numbers, final
from theory.costs import Costs, cost_per_step
from theory.metrics import Interval, mean_interval
from theory.optima import ProblemOptima
from theory.plotting import beyond as plotting
from theory.problems import make_problem
from theory.registry import typical_scheduler
from theory.sweep import Batch, Variant
from theory.theorems.importance import gradient_moments, optimal_probability

Array = NDArray[np.float64]
METHODS = ("mix", "alright", "importance")
COSTS = {"full": Costs(), "cached": Costs.cached(), "lora": Costs.lora()}
BUDGETS = 6
"""Points on each curve, from a hundredth of the budget on."""


@dataclass(frozen=True)
class Case:
    """A problem and a lam; `parameters` go to `make_problem`."""

    problem: str
    lam: float
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        parameters = "".join(f", {key}={value:g}" for key, value in self.parameters.items())
        return f"{self.problem}{parameters}, lam={self.lam:g}"

    @property
    def optima(self) -> ProblemOptima:
        return ProblemOptima(make_problem(self.problem, **self.parameters))


@dataclass(frozen=True)
class Prediction:
    """p, cost per step and tr(H^-1 V) of each of `METHODS`, shapes (3,)."""

    probability: float
    cost: Array
    trace: Array

    @property
    def merit(self) -> Array:
        return self.cost * self.trace


def predict(optima: ProblemOptima, lam: float, costs: Costs) -> Prediction:
    """The costs and variances at the minimiser of f_Mix; importance sampling at its best p."""
    moments = gradient_moments(optima, lam)
    best = optimal_probability(moments, lam, costs.dpo, costs.sft)
    given = {"lam": lam, "dpo_probability": best}
    cost = [cost_per_step(typical_scheduler(name, given), costs=costs) for name in METHODS]
    trace = [
        moments.mix_trace(lam),
        moments.alright_trace(lam),
        moments.importance_trace(lam, best),
    ]
    return Prediction(best, np.array(cost), np.array(trace))


@dataclass(frozen=True)
class EqualCompute(Experiment):
    """The gaps of Mix, ALRIGHT and importance sampling when all have spent the same."""

    name: ClassVar[str] = "equal_compute"
    num_steps: int = 40_000
    num_seeds: int = 100
    cases: tuple[Case, ...] = (
        Case("quadratic", 0.5),
        Case("quadratic", 0.05),
        Case("softmax", 0.5),
        Case("softmax", 0.05),
        Case("softmax", 0.5, {"beta": 0.1}),
    )

    def batches(self) -> list[Batch]:
        return [batch for case in reversed(self.cases) for batch in self._batches(case)]

    def _batches(self, case: Case) -> Iterator[Batch]:
        prediction = predict(case.optima, case.lam, COSTS["full"])
        for index in reversed(range(len(METHODS))):
            steps = self._steps(prediction, index)
            options = {"dpo_probability": prediction.probability}
            yield Batch(
                case.problem,
                METHODS[index],
                (case.lam,),
                self.seeds,
                steps[-1],
                variants=(Variant(case.label, options if index == 2 else {}),),
                parameters=case.parameters,
                record_steps=steps,
            )

    def _budgets(self, prediction: Prediction) -> Array:
        return np.geomspace(0.01, 1.0, BUDGETS) * self.num_steps * prediction.cost[0]

    def _steps(self, prediction: Prediction, index: int) -> tuple[int, ...]:
        steps = np.unique(np.round(self._budgets(prediction) / prediction.cost[index]))
        return tuple(int(step) for step in steps)

    def summary(self, results: pd.DataFrame) -> dict[str, Any]:
        return {case.label: self._of_case(results, case) for case in self.cases}

    def _of_case(self, results: pd.DataFrame, case: Case) -> dict[str, Any]:
        optima = case.optima
        prediction = predict(optima, case.lam, COSTS["full"])
        rows = results[(results["variant"] == case.label) & (results["iterate"] == "uniform")]
        last = final(rows, "uniform").sort_values("seed")
        gaps = {m: last.loc[last["algorithm"] == m, "mix_gap"].to_numpy() for m in METHODS}
        numbers: dict[str, Any] = {"dpo_probability": prediction.probability}
        for index, method in enumerate(METHODS):
            cost, trace = float(prediction.cost[index]), float(prediction.trace[index])
            own = rows[rows["algorithm"] == method]
            numbers[method] = {
                "cost": cost,
                "trace": trace,
                "compute": [cost * step for step in self._steps(prediction, index)],
                "mix_gap": [mean_interval(g)._asdict() for _, g in own.groupby("step")["mix_gap"]],
                "predicted_ratio": {
                    name: _ratio(predict(optima, case.lam, costs), index)
                    for name, costs in COSTS.items()
                },
                "measured_ratio": ratio_interval(gaps[method], gaps["mix"])._asdict(),
            }
        return numbers

    def report(self, summary: dict[str, Any]) -> str:
        lines = [
            "Gap over Mix's gap at equal compute (costs 8:3; mean and 95% interval over "
            f"{self.num_seeds} seeds), and what cost x tr(H^-1 V) predicts; also for other costs",
            f"{'':<31}{'measured':>24}{'predicted':>11}{'cached':>8}{'LoRA':>8}",
        ]
        for label, numbers in summary.items():
            lines.append(f"{label} (best p = {numbers['dpo_probability']:.3f})")
            for method in METHODS[1:]:
                own = numbers[method]
                ratio, predicted = own["measured_ratio"], own["predicted_ratio"]
                cell = f"{ratio['mean']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
                others = f"{predicted['cached']:>8.3f}{predicted['lora']:>8.3f}"
                lines.append(f"  {method:<29}{cell:>24}{predicted['full']:>11.3f}{others}")
        return "\n".join(lines)

    def figure(self, summary: dict[str, Any]) -> tuple[Figure, Numbers]:
        return plotting.equal_compute_figure(summary)


def ratio_interval(numerator: Array, denominator: Array) -> Interval:
    """mean(a) / mean(b) of paired runs (same seeds) with a 95% interval.

    The delta method: a - r b has mean zero at the true ratio r, so the error of the estimated
    ratio is that of mean(a - r b) / mean(b).
    """
    ratio = numerator.mean() / denominator.mean()
    return mean_interval(ratio + (numerator - ratio * denominator) / denominator.mean())


def _ratio(prediction: Prediction, index: int) -> float:
    return float(prediction.merit[index] / prediction.merit[0])
