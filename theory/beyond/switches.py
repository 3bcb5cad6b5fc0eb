"""From ALRIGHT to sequential training by one knob: the number of switches between objectives.

Block alternation with cycle length n (lam n DPO steps, then (1 - lam) n SFT steps) switches
2T/n - 1 times in T steps: n = 2 alternates, n = T is sequential training. Two laws stand beside:

bound (T7, `theorems.bounds.cycle_average`): at the best constant step, the average of the cycles'
starts has E G_Mix <= D M_X sqrt(n / T). An upper bound, far above the smooth instances here.

drift: while alpha n L is small, the iterates run to and fro along a segment u = alpha lam n g, with
g = grad f_1(theta_lam). Around the cycle the mean step vanishes, w_1 H_1 (m_1 - theta_lam) +
w_2 H_2 (m_2 - theta_lam) = 0, where m_i is the mean of the points at which f_i is stepped on:
half-way along u, but for half a step each. The SFT block therefore ends at theta_lam + d with

    H d = (H + (H_2 - H_1) / n) u / 2,      G_Mix ~ d' H d / 2,      H = w_1 H_1 + w_2 H_2,

about (alpha lam n)^2 g' H g / 8, on top of the noise of SGD. So the gap of the last iterate grows
like n^2, not like sqrt(n), until it meets the limit of sequential training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from theory.beyond.base import Experiment, Numbers, final
from theory.metrics import mean_interval, sequential_limit
from theory.optima import ProblemOptima
from theory.plotting import beyond as plotting
from theory.problems import PROBLEMS, make_problem
from theory.schedulers import ORDERS
from theory.simulate import StepSize
from theory.sweep import Batch, Variant
from theory.tasks import Task
from theory.theorems.bounds import descent

ITERATES = ("last", "weighted")


@dataclass(frozen=True)
class Switches(Experiment):
    """G_Mix against the number of switches at equal steps; SFT takes the last block."""

    name: ClassVar[str] = "switches"
    num_steps: int = 2**14
    num_seeds: int = 20
    problems: tuple[str, ...] = tuple(PROBLEMS)
    lam: float = 0.5

    @property
    def cycles(self) -> tuple[int, ...]:
        """The cycle lengths n that divide T and have a whole number lam n of DPO steps."""
        steps, lam = self.num_steps, self.lam
        cycles = [n for n in range(2, steps + 1) if steps % n == 0 and _whole(lam * n)]
        if not cycles or not 0.0 < lam < 1.0:
            raise ValueError(
                f"no cycle divides {steps} steps with lam={lam:g} of it a whole number of DPO "
                "steps: take another --steps (a power of two for lam 0.5)"
            )
        return tuple(cycles)

    def batches(self) -> list[Batch]:
        return [batch for problem in reversed(self.problems) for batch in self._batches(problem)]

    def _batches(self, problem: str) -> Iterator[Batch]:
        cycles = tuple(Variant(f"cycle={n}", {"cycle": n}, {"cycle": n}) for n in self.cycles)
        first_steps = round(self.lam * self.num_steps)
        orders = (Variant("dpo_then_sft", {"first_steps": first_steps}),)
        for algorithm, variants, options in (
            ("alternate", cycles, {}),
            ("alright", (Variant(),), {}),
            ("sequential", orders, {"order": "dpo_then_sft"}),
        ):
            yield Batch(
                problem,
                algorithm,
                (self.lam,),
                self.seeds,
                self.num_steps,
                variants=variants,
                options=options,
                record_steps=(self.num_steps,),
            )

    def summary(self, results: pd.DataFrame) -> dict[str, Any]:
        return {problem: self._of_problem(results, problem) for problem in self.problems}

    def _of_problem(self, results: pd.DataFrame, problem: str) -> dict[str, Any]:
        optima = ProblemOptima(make_problem(problem))
        curve: dict[str, Any] = {
            "cycle": list(self.cycles),
            "switches": [2 * self.num_steps // n - 1 for n in self.cycles],
            "bound": [t7_bound(optima, self.lam, n, self.num_steps) for n in self.cycles],
            "drift": [self._drift(optima, n) for n in self.cycles],
        }
        lines: dict[str, Any] = {"alright": {}, "sequential": {}}
        for iterate in ITERATES:
            rows = final(results[results["problem"] == problem], iterate)
            blocks = rows[rows["algorithm"] == "alternate"]
            by_cycle = dict(iter(blocks.groupby("cycle")["mix_gap"]))
            curve[iterate] = [mean_interval(by_cycle[n])._asdict() for n in self.cycles]
            for algorithm, line in lines.items():
                gaps = rows.loc[rows["algorithm"] == algorithm, "mix_gap"]
                line[iterate] = mean_interval(gaps)._asdict()
        limit, source = sequential_limit(optima, ORDERS["dpo_then_sft"][1], self.lam)
        switches = 2.0 * self.lam * (1.0 - self.lam) * (self.num_steps - 1)
        lines["alright"]["expected_switches"] = switches
        return curve | lines | {"limit": {"mix_gap": limit, "source": source}}

    def _drift(self, optima: ProblemOptima, cycle: int) -> float:
        alpha = StepSize(optima.problem.step_scale)(np.array(self.num_steps))
        return drift_gap(optima, self.lam, cycle, float(alpha))

    def report(self, summary: dict[str, Any]) -> str:
        lines = [f"G_Mix of the last iterate at T = {self.num_steps:,}, lam = {self.lam:g}"]
        shown = self.cycles[:: max(len(self.cycles) // 7, 1)]
        switches = [f"{2 * self.num_steps // n - 1:>10,}" for n in shown]
        lines.append(f"{'switches':<12}" + "".join(switches) + f"{'ALRIGHT':>11}{'limit':>11}")
        for problem, numbers in summary.items():
            gaps = dict(zip(self.cycles, numbers["last"], strict=True))
            cells = "".join(f"{gaps[n]['mean']:>10.2e}" for n in shown)
            alright = numbers["alright"]["last"]["mean"]
            limit = numbers["limit"]["mix_gap"]
            lines.append(f"{problem:<12}{cells}{alright:>11.2e}{limit:>11.4g}")
        return "\n".join(lines)

    def figure(self, summary: dict[str, Any]) -> tuple[Figure, Numbers]:
        return plotting.switches_figure(summary)


def drift_gap(optima: ProblemOptima, lam: float, cycle: int, alpha: float) -> float:
    """d' H d / 2: G_Mix at the end of a cycle without noise, to leading order in alpha n L."""
    theta, problem = optima.mix(lam).theta, optima.problem
    dpo, sft = (objective.hessian(theta) for objective in problem.objectives)
    hessian = lam * dpo + (1.0 - lam) * sft
    segment = alpha * lam * cycle * problem.objectives[Task.DPO].gradient(theta)
    pull = (hessian + (sft - dpo) / cycle) @ segment / 2.0
    return float(pull @ np.linalg.solve(hessian, pull) / 2.0)


def t7_bound(optima: ProblemOptima, lam: float, cycle: int, num_steps: int) -> float:
    """D M_X sqrt(n / T): T7 at the constant step size that minimises it (0 for a perfect start)."""
    best = descent(optima, "alternate", lam, StepSize(1.0, decay=False), num_steps)
    return float(best.distance * best.norm * np.sqrt(cycle / num_steps))


def _whole(number: float) -> bool:
    return abs(number - round(number)) < 1e-9
