"""Whether the plateau of sequential training depends on plain SGD with decaying steps.

The claim is about where the last stage converges, theta*_last, not about how: any optimiser that
converges on one objective ends at the certified limit G_Mix(theta*_last). Sequential training in
both orders with SGD, momentum and Adam, each with alpha_t = c/sqrt(t) and constant, at growing
budgets; ALRIGHT with the same optimiser beside. A gap far below the limit is a last stage stopped
early, and ends with the budget: read a row from left to right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from theory.beyond.base import Experiment, Numbers
from theory.metrics import mean_interval, sequential_limit
from theory.optima import ProblemOptima
from theory.optimizers import Adam, Momentum, Rule
from theory.plotting import beyond as plotting
from theory.problems import PROBLEMS, make_problem
from theory.schedulers import ORDERS
from theory.sweep import Batch, Variant

REMAINS = 0.75
"""The plateau stays if at least this share of the limit remains, at the interval's lower end."""
SMALL = 50.0
"""Constant steps are c divided by this: about alpha_t at t = 2500."""


class Optimiser(NamedTuple):
    rule: Rule | None
    step_scale: float | None
    """c of alpha_t = c / sqrt(t); None is the problem's own."""
    decay: bool = True


OPTIMISERS = {
    "SGD": Optimiser(None, None),
    "SGD, constant": Optimiser(None, None, decay=False),
    "momentum": Optimiser(Momentum(), None),
    "momentum, constant": Optimiser(Momentum(), None, decay=False),
    "Adam": Optimiser(Adam(), 0.3),
    "Adam, constant": Optimiser(Adam(), 0.3, decay=False),
}


@dataclass(frozen=True)
class Plateau(Experiment):
    """G_Mix of the last iterate over the certified limit, by optimiser, order and budget."""

    name: ClassVar[str] = "optimizers"
    num_steps: int = 16_000
    num_seeds: int = 20
    problems: tuple[str, ...] = tuple(PROBLEMS)
    lam: float = 0.5

    @property
    def horizons(self) -> list[int]:
        """Three budgets, each about four times the one before."""
        return [max(self.num_steps // 16, 2), max(self.num_steps // 4, 2), self.num_steps]

    def batches(self) -> list[Batch]:
        if not 0.0 < self.lam < 1.0:
            raise ValueError(f"lam is {self.lam:g}; the plateau needs it strictly between 0 and 1")
        return [batch for problem in reversed(self.problems) for batch in self._batches(problem)]

    def _batches(self, problem: str) -> Iterator[Batch]:
        for name, optimiser in OPTIMISERS.items():
            for horizon in reversed(self.horizons):
                for order in ORDERS:
                    options = {"order": order, "first_steps": horizon // 2}
                    yield self._batch(problem, "sequential", name, optimiser, horizon, options)
                yield self._batch(problem, "alright", name, optimiser, horizon, {})

    def _batch(
        self,
        problem: str,
        algorithm: str,
        name: str,
        optimiser: Optimiser,
        horizon: int,
        options: dict[str, Any],
    ) -> Batch:
        scale = optimiser.step_scale or make_problem(problem).step_scale
        line = str(options.get("order", algorithm))
        columns = {"optimiser": name, "line": line}
        return Batch(
            problem,
            algorithm,
            (self.lam,),
            self.seeds,
            horizon,
            options=options,
            variants=(Variant(f"{name}, {line}", columns=columns),),
            record_steps=(horizon,),
            step_scale=scale if optimiser.decay else scale / SMALL,
            decay=optimiser.decay,
            rule=optimiser.rule,
        )

    def summary(self, results: pd.DataFrame) -> dict[str, Any]:
        rows = results[results["iterate"] == "last"]
        groups = dict(iter(rows.groupby(["problem", "optimiser", "line", "step"])["mix_gap"]))
        table: dict[str, Any] = {"steps": self.horizons, "problems": {}}
        for problem in self.problems:
            optima = ProblemOptima(make_problem(problem))
            orders = {}
            for order, (_, last) in ORDERS.items():
                limit, source = sequential_limit(optima, last, self.lam)
                cells = {
                    name: self._compare(groups, (problem, name), order, limit)
                    for name in OPTIMISERS
                }
                orders[order] = {"limit": limit, "source": source, "optimisers": cells}
            table["problems"][problem] = orders
        return table

    def _compare(
        self, groups: dict[Any, pd.Series], key: tuple[str, str], order: str, limit: float
    ) -> dict[str, Any]:
        """Both methods' gaps as shares of the limit, by budget, and the verdict."""
        sequential, alright = (
            [mean_interval(groups[*key, line, step] / limit) for step in self.horizons]
            for line in (order, "alright")
        )
        stays = sequential[-1].low >= REMAINS and sequential[-1].low > alright[-1].high
        return {
            "sequential": [interval._asdict() for interval in sequential],
            "alright": [interval._asdict() for interval in alright],
            "stays": bool(stays),
        }

    def report(self, summary: dict[str, Any]) -> str:
        steps = "".join(f"{f'T={step:,}':>14}" for step in summary["steps"])
        lines = [
            f"G_Mix of the last iterate over the certified limit (lam = {self.lam:g}; mean ± half "
            f"of the 95% interval over {self.num_seeds} seeds). Stays: at least {REMAINS:.0%} of "
            "the limit remains, and more than ALRIGHT leaves with the same optimiser",
        ]
        for problem, orders in summary["problems"].items():
            for order, numbers in orders.items():
                title = f"{problem}, {order}"
                lines.append(f"{title:<26}{steps}{'ALRIGHT':>14}  stays")
                for name, cell in numbers["optimisers"].items():
                    values = [*cell["sequential"], cell["alright"][-1]]
                    text = "".join(f"{_share(value):>14}" for value in values)
                    lines.append(f"  {name:<24}{text}  {'yes' if cell['stays'] else 'no'}")
        return "\n".join(lines)

    def figure(self, summary: dict[str, Any]) -> tuple[Figure, Numbers]:
        return plotting.plateau_figure(summary)


def _share(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} ±{(value['high'] - value['low']) / 2:.2f}"
