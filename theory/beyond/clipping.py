"""Clipping per objective changes lam: the first mechanism behind revealed preferences that fail.

A schedule that steps on one objective at a time clips each objective's gradient by itself. Where
DPO's gradients are ten times larger, the clip shortens them and not SFT's, and the run serves
another lam' than the lam it was given. Which one, the end point says:

    effective lam = argmin over lam' of f_Mix(theta; lam') - min f_Mix(.; lam').

The function is convex in lam' (min f_Mix is concave), and its derivative vanishes where the
minimiser of f_Mix(.; lam') has the same f_DPO - f_SFT as theta (envelope theorem): the inversion of
one decreasing curve. The prediction is the zero of the mean clipped step,

    lam E[clip(g_1)] + (1 - lam) E[clip(g_2)] = 0,   clip(g) = g min(1, max_norm / |g|),

over all samples, by enumeration. It knows of no step size and no noise.

A clip also bends each objective by itself: it trims the rare label, whose gradient is the larger.
On bernoulli that outweighs the other effect, and the same clip turns lam 1/2 into 1.

The instances are those of `theory.problems` with DPO's features multiplied by ten, at unchanged
preferences: f_DPO(theta) becomes f_DPO(10 theta), and every gradient ten times larger at the
corresponding point.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.optimize import root
from scipy.special import expit

from theory.beyond.base import Experiment, Numbers
from theory.metrics import mean_interval
from theory.objectives import LogisticDPO
from theory.optima import ProblemOptima
from theory.optimizers import Adam, Clip, Rule
from theory.plotting import beyond as plotting
from theory.problems import Problem, make_problem
from theory.registry import make_scheduler, scheduler_options
from theory.schedulers import objective_weights
from theory.simulate import StepSize, simulate
from theory.sweep import Batch, Variant
from theory.tasks import Task
from theory.theorems.importance import enumerate_gradients, second_moment

Array = NDArray[np.float64]

GRID = expit(np.linspace(-9.0, 9.0, 181))
"""The lam' between which effective values are interpolated; steps of 0.1 in logit."""
ADAM_STEP = 0.1
RULES: dict[str, Rule | None] = {
    "none": None,
    "adam": Adam(),
    "adam, beta2=0.95": Adam(beta2=0.95),
    "clip 3": Clip(3.0),
    "clip 3 + adam": Clip(3.0, Adam()),
}
"""What turns gradients into steps in the comparison along lam."""


def steep_problem(name: str, factor: float) -> Problem:
    """The named problem with the features of DPO `factor` times larger, preferences unchanged."""
    problem = make_problem(name)
    dpo, sft = problem.objectives
    if not isinstance(dpo, LogisticDPO):
        raise ValueError(f"problem {name!r} has no preference pairs whose features could grow")
    steep = replace(dpo, differences=factor * dpo.differences, theta_ref=dpo.theta_ref / factor)
    return replace(problem, objectives=(steep, sft), minimisers=None, mix_gap_limit=None)


def effective_lam(optima: ProblemOptima, losses: Array) -> Array:
    """The lam' whose f_Mix the points with `losses` (..., 2) minimise best, shape (...)."""
    return np.interp(losses[..., Task.SFT] - losses[..., Task.DPO], _excess(optima), GRID)


@lru_cache(maxsize=16)
def _excess(optima: ProblemOptima) -> Array:
    """f_SFT - f_DPO at the minimisers of f_Mix for the lams of `GRID`: increasing."""
    best = np.array([optima.problem.losses(optima.mix(lam).theta) for lam in GRID])
    return best[:, Task.SFT] - best[:, Task.DPO]


def predicted_lam(optima: ProblemOptima, lam: float, max_norm: float) -> float:
    """The effective lam of clipped ALRIGHT for small steps; NaN without a single isolated zero."""
    weights = objective_weights(lam)

    def mean_step(theta: Array) -> Array:
        total = np.zeros(len(theta))
        for weight, objective in zip(weights, optima.problem.objectives, strict=True):
            gradients, probabilities = enumerate_gradients(objective, theta)
            norms = np.linalg.norm(gradients, axis=1)
            scale = np.minimum(1.0, max_norm / np.maximum(norms, 1e-300))
            total += weight * (probabilities * scale) @ gradients
        return total

    found = root(mean_step, optima.mix(lam).theta)
    shifts = 1e-4 * np.eye(optima.problem.dim)
    jacobian = np.array([mean_step(found.x + shift) - mean_step(found.x) for shift in shifts])
    if not found.success or np.linalg.matrix_rank(jacobian, tol=1e-10) < len(jacobian):
        return float("nan")
    return float(effective_lam(optima, optima.problem.losses(found.x)))


@dataclass(frozen=True)
class SteepBatch(Batch):
    """A batch on a steep instance; its table holds the losses of the uniform averages."""

    factor: float = 10.0

    def run(self) -> pd.DataFrame:
        problem = steep_problem(self.problem, self.factor)
        grid = [(lam, seed) for lam in self.lams for seed in self.seeds]
        lams, seeds = zip(*grid, strict=True)
        seeded = {"seed": seeds} if "seed" in scheduler_options(self.algorithm) else {}
        trace = simulate(
            problem,
            make_scheduler(self.algorithm, lam=lams, **seeded),
            num_steps=self.num_steps,
            step_size=StepSize(float(self.step_scale or problem.step_scale), self.decay),
            seeds=seeds,
            record_steps=[self.num_steps],
            rule=self.rule,
        )
        losses = problem.losses(trace.theta["uniform"][0])
        table: dict[str, Any] = {"lam": lams, "seed": seeds}
        table |= {f"f_{task.label}": losses[:, task] for task in Task}
        labels = {"problem": self.problem, "algorithm": self.algorithm}
        return pd.DataFrame(table).assign(**labels, **self.variants[0].columns)


@dataclass(frozen=True)
class Clipping(Experiment):
    """The effective lam against the clipping norm, and against lam for several optimisers."""

    name: ClassVar[str] = "clipping"
    num_steps: int = 16_000
    num_seeds: int = 20
    instances: tuple[str, ...] = ("toy2d", "softmax", "bernoulli")
    step_scales: tuple[float, ...] = (0.1, 0.3, 0.1)
    factor: float = 10.0
    lam: float = 0.5
    lams: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9)
    max_norms: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0, 30.0)

    def batches(self) -> list[Batch]:
        return [
            batch
            for problem, scale in zip(self.instances, self.step_scales, strict=True)
            for batch in (*self._along_norms(problem, scale), *self._along_lam(problem, scale))
        ]

    def _along_norms(self, problem: str, scale: float) -> Iterator[Batch]:
        for algorithm in ("alright", "mix"):
            for max_norm in self.max_norms:
                yield self._batch(problem, algorithm, scale, (self.lam,), Clip(max_norm), "clip")

    def _along_lam(self, problem: str, scale: float) -> Iterator[Batch]:
        for name, rule in RULES.items():
            yield self._batch(problem, "alright", scale, self.lams, rule, name)

    def _batch(
        self,
        problem: str,
        algorithm: str,
        scale: float,
        lams: tuple[float, ...],
        rule: Rule | None,
        name: str,
    ) -> Batch:
        """A clipped step is short: it gets a step size that makes up for it, Adam its own."""
        max_norm = rule.max_norm if isinstance(rule, Clip) else np.inf
        adaptive = "adam" in name
        size = ADAM_STEP if adaptive else scale * max(1.0, self.factor / max_norm)
        columns = {"rule": name, "max_norm": max_norm}
        return SteepBatch(
            problem,
            algorithm,
            lams,
            self.seeds,
            self.num_steps,
            variants=(Variant(name, columns=columns),),
            step_scale=size,
            rule=rule,
            factor=self.factor,
        )

    def summary(self, results: pd.DataFrame) -> dict[str, Any]:
        return {problem: self._of_problem(results, problem) for problem in self.instances}

    def _of_problem(self, results: pd.DataFrame, problem: str) -> dict[str, Any]:
        optima = ProblemOptima(steep_problem(problem, self.factor))
        theta = optima.mix(self.lam).theta
        dpo, sft = (
            float(np.sqrt(np.trace(second_moment(f, theta)))) for f in optima.problem.objectives
        )
        rows = results[results["problem"] == problem]
        losses = rows[["f_dpo", "f_sft"]].to_numpy()
        rows = rows.assign(effective_lam=effective_lam(optima, losses))
        along_norms: dict[str, Any] = {"max_norm": list(self.max_norms)}
        for algorithm in ("alright", "mix"):
            clipped = rows[(rows["rule"] == "clip") & (rows["algorithm"] == algorithm)]
            along_norms[algorithm] = _intervals(clipped, "max_norm", self.max_norms)
        along_norms["predicted"] = [predicted_lam(optima, self.lam, c) for c in self.max_norms]
        along_lam: dict[str, Any] = {"lam": list(self.lams)}
        for rule in RULES:
            along_lam[rule] = _intervals(rows[rows["rule"] == rule], "lam", self.lams)
        along_lam["predicted"] = [predicted_lam(optima, lam, 3.0) for lam in self.lams]
        return {
            "gradient_norms": {"dpo": dpo, "sft": sft, "ratio": dpo / sft},
            "along_norms": along_norms,
            "along_lam": along_lam,
        }

    def report(self, summary: dict[str, Any]) -> str:
        lines = [f"Effective lam under ALRIGHT, DPO features {self.factor:g} times larger"]
        for problem, numbers in summary.items():
            norms, by_lam = numbers["along_norms"], numbers["along_lam"]
            ratio = numbers["gradient_norms"]["ratio"]
            lines.append(f"{problem} (root mean square gradients {ratio:.1f}:1)")
            header = "".join(f"{norm:>10g}" for norm in norms["max_norm"])
            lines.append(f"  {f'clipping norm, lam={self.lam:g}':<24}{header}")
            for key in ("alright", "predicted", "mix"):
                lines.append(f"    {key:<22}" + _cells(norms[key]))
            lines.append(f"  {'lam':<24}" + "".join(f"{lam:>10g}" for lam in by_lam["lam"]))
            for rule in RULES:
                lines.append(f"    {rule:<22}" + _cells(by_lam[rule]))
        return "\n".join(lines)

    def figure(self, summary: dict[str, Any]) -> tuple[Figure, Numbers]:
        return plotting.clipping_figure(summary, self.lam)


def _intervals(rows: pd.DataFrame, key: str, wanted: tuple[float, ...]) -> list[dict[str, float]]:
    groups = dict(iter(rows.groupby(key)["effective_lam"]))
    return [mean_interval(groups[value])._asdict() for value in wanted]


def _cells(values: list[Any]) -> str:
    means = [value["mean"] if isinstance(value, dict) else value for value in values]
    return "".join(f"{mean:>10.3f}" for mean in means)
