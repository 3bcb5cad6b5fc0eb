"""Measure the rates of every method and hold them against the theorems' bounds.

    python -m theory.convergence_experiment
    python -m theory.convergence_experiment --problem toy2d --steps 100000 --seeds 50

Sequential training in both orders, Mix and ALRIGHT are measured by G_Mix. MAXRIGHT is measured by
G_Max, with exact values, stale exact values (refreshed every 10, 100 or T steps), values from a
fresh minibatch, their moving average, and values from the minibatch of the step, with steps scaled
by w_i or not. For each iterate: the slope of log(mean gap) against log T over [fit_from, steps],
with bootstrap intervals over seeds, and the bound where a theorem gives one.

A bound limits the gap from above; it is not a prediction of the slope. Averages of Mix and ALRIGHT
fall faster than T^-1/2 on smooth problems. The verdicts are therefore "the gap stays below the
bound" and "the slope is not above the bound's slope". Writes config.json, results.parquet,
summary.json, the curves (convergence.png, .svg, .json) and the slopes (slopes.png, .svg, .json).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from theory import compared
from theory.cli import positive_int, run_command
from theory.command import ALGORITHMS, Findings, SweepExperiment, sweep_main
from theory.compared import Compared
from theory.metrics import fit_slope, mean_interval, middle, sequential_limit, slope_interval
from theory.optima import TOLERANCE, ProblemOptima
from theory.plotting.convergence import convergence_figure, slopes_figure
from theory.problems import PROBLEMS, make_problem
from theory.schedulers import ORDERS
from theory.simulate import ITERATES, log_spaced_steps
from theory.sweep import COUNTS, KEYS, METRICS, Batch, Variant, summarise
from theory.theorems.rate_bounds import bound_curve

EMA_WEIGHT = 0.02

Curves = dict[tuple[str, float, str, str], pd.Series]
"""(problem, lam, method, iterate) -> bound by step."""


@dataclass(frozen=True)
class ConvergenceConfig(Compared, SweepExperiment):
    """Everything that determines the results."""

    name: ClassVar[str] = "convergence_experiment"
    about: ClassVar[str] = "Measure convergence rates and hold them against the theorems' bounds."
    figure_files: ClassVar[str] = ", convergence.* and slopes.*"
    own_flags = {"fit_from": {"type": positive_int, "help": "first step of the fit"}} | ALGORITHMS
    problems: tuple[str, ...] = tuple(PROBLEMS)
    lams: tuple[float, ...] = (0.5,)
    num_steps: int = 30_000
    num_seeds: int = 20
    fit_from: int = 1000
    resamples: int = 2000
    algorithms: tuple[str, ...] = compared.ALGORITHMS
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def refusal(cls, arguments: argparse.Namespace) -> str | None:
        if arguments.steps < 10 * arguments.fit_from:
            return (
                f"--steps {arguments.steps} is too few: a fit from {arguments.fit_from} on needs a "
                f"decade, so at least {10 * arguments.fit_from} steps"
            )
        return None

    @property
    def methods(self) -> list[Method]:
        return [
            replace(method, options=self.options_of(method.algorithm) | method.options)
            for method in methods(self.num_steps, self.algorithms)
        ]

    def batches(self) -> list[Batch]:
        """The dear part first: later problems are larger."""
        return [
            batch
            for problem in reversed(self.problems)
            for method in reversed(self.methods)
            for batch in _batches(self, problem, method)
        ]

    def table(self, results: pd.DataFrame) -> pd.DataFrame:
        """One row per problem, method (`variant`), lam, seed, step and iterate."""
        columns = [*KEYS[:4], "seed", *KEYS[4:], *METRICS, *COUNTS]
        return results[columns].sort_values([*KEYS, "seed"], ignore_index=True)

    def findings(self, results: pd.DataFrame) -> Findings:
        bounds, references = bound_curves(self), limits(self)
        rates, lam = measured_rates(self, results, bounds), middle(self.lams)
        drawn = {
            "convergence": convergence_figure(summarise(results), bounds, references, lam),
            "slopes": slopes_figure(rates, lam),
        }
        return Findings(
            {"config": asdict(self), "sequential_limits": references, "rates": rates},
            report(self, rates),
            [(name, figure, {"panels": numbers}) for name, (figure, numbers) in drawn.items()],
        )


@dataclass(frozen=True)
class Method:
    """One line of the experiment; `metric` is the gap that its theorem is about."""

    name: str
    algorithm: str
    metric: str = "max_gap"
    options: dict[str, Any] = field(default_factory=dict)
    values: str | None = None
    """A name of `theory.values`; None: exact values."""


def methods(num_steps: int, algorithms: Sequence[str] = compared.ALGORITHMS) -> list[Method]:
    """All methods. MAXRIGHT's names say: values, their age, and whether steps are unscaled."""
    chosen: list[Method] = []
    for name in compared.lines(algorithms):
        if name in ORDERS:
            chosen.append(Method(name, "sequential", "mix_gap", {"order": name}))
        elif name == "maxright":
            chosen += _maxright(num_steps, scale_steps=True, suffix="")
            chosen += _maxright(num_steps, scale_steps=False, suffix=" unscaled")
        else:
            chosen.append(Method(name, name, "mix_gap"))
    return chosen


def _maxright(num_steps: int, scale_steps: bool, suffix: str) -> Iterator[Method]:
    variants: list[tuple[str, str | None, dict[str, Any]]] = [
        ("exact", None, {"refresh_every": 1}),
        ("stale k=10", None, {"refresh_every": 10}),
        ("stale k=100", None, {"refresh_every": 100}),
        ("stale k=inf", None, {"refresh_every": num_steps}),
        ("same", "same", {"refresh_every": 1}),
        ("fresh", "fresh", {"refresh_every": 1}),
        ("fresh EMA", "fresh", {"refresh_every": 1, "value_ema": EMA_WEIGHT}),
    ]
    for name, values, options in variants:
        options = options | {"scale_steps": scale_steps}
        yield Method(name + suffix, "maxright", "max_gap", options, values)


def _batches(config: ConvergenceConfig, problem: str, method: Method) -> Iterator[Batch]:
    common = (problem, method.algorithm, config.lams, config.seeds)
    if method.algorithm != "sequential":
        variant = (Variant(method.name),)
        options, values = method.options, method.values
        yield Batch(*common, config.num_steps, variant, options, values=values)
        return
    for horizon in log_spaced_steps(config.num_steps, per_decade=2).tolist():
        halves = (Variant(method.name, {"first_steps": horizon // 2}),)
        yield Batch(*common, horizon, halves, method.options, record_steps=(horizon,))


def measured_rates(
    config: ConvergenceConfig, results: pd.DataFrame, bounds: Curves
) -> list[dict[str, Any]]:
    """Slope, bound and verdicts of every problem, lam, method and iterate."""
    keys = ["problem", "lam", "variant", "iterate"]
    tables = dict(iter(results.groupby(keys)))
    grid = product(config.problems, config.lams, config.methods, ITERATES)
    rates = []
    for problem, lam, method, iterate in grid:
        key = (problem, lam, method.name, iterate)
        record = {"problem": problem, "lam": lam, "method": method.name, "iterate": iterate}
        record |= {"metric": method.metric}
        rates.append(record | _rate(config, tables[key], method.metric, bounds.get(key)))
    return rates


def _rate(
    config: ConvergenceConfig, rows: pd.DataFrame, metric: str, bound: pd.Series | None
) -> dict[str, Any]:
    table = rows.pivot(index="seed", columns="step", values=metric)
    table = table.loc[:, table.columns >= config.fit_from]
    steps = table.columns.to_numpy()
    # Optima are certified to TOLERANCE: a smaller gap is not known to be one.
    gaps = np.maximum(table.to_numpy(), TOLERANCE)
    slope = slope_interval(steps, gaps, resamples=config.resamples)._asdict()
    record = {"slope": slope, "final_gap": mean_interval(gaps[:, -1])._asdict()}
    fitted = None if bound is None else bound[steps].to_numpy()
    return record | _verdicts(slope, steps, gaps.mean(axis=0), fitted)


def _verdicts(
    slope: dict[str, float],
    steps: NDArray[np.int64],
    mean: NDArray[np.float64],
    bound: NDArray[np.float64] | None,
) -> dict[str, Any]:
    """Whether the bound holds over the fitted range; the slope's verdict may stay open."""
    if bound is None:
        names = ("final_bound", "bound_slope", "gap_below_bound", "slope_below_bound")
        return dict.fromkeys(names)
    bound_slope = float(fit_slope(steps, bound))
    steeper, flatter = slope["high"] <= bound_slope, slope["low"] > bound_slope
    return {
        "final_bound": float(bound[-1]),
        "bound_slope": bound_slope,
        "gap_below_bound": bool(np.all(mean <= bound)),
        "slope_below_bound": "yes" if steeper else "no" if flatter else "open",
    }


def bound_curves(config: ConvergenceConfig) -> Curves:
    """The bounds at the recorded steps, where there are any."""
    steps, curves = log_spaced_steps(config.num_steps), {}
    for problem in config.problems:
        optima = ProblemOptima(make_problem(problem))
        for lam, method, iterate in product(config.lams, config.methods, ITERATES):
            bound = bound_curve(optima, lam, method.name, iterate, steps)
            if bound is not None:
                curves[problem, lam, method.name, iterate] = pd.Series(bound, index=steps)
    return curves


def limits(config: ConvergenceConfig) -> dict[str, Any]:
    """G_Mix of the sequential limits, by problem, lam and order."""
    return {
        problem: {
            f"{lam:g}": {
                order: dict(zip(("mix_gap", "source"), _limit(problem, order, lam), strict=True))
                for order in ORDERS
            }
            for lam in config.lams
        }
        for problem in config.problems
    }


def _limit(problem: str, order: str, lam: float) -> tuple[float, str]:
    return sequential_limit(ProblemOptima(make_problem(problem)), ORDERS[order][1], lam)


def main(argv: list[str] | None = None) -> None:
    sweep_main(ConvergenceConfig, argv)


def report(config: ConvergenceConfig, rates: list[dict[str, Any]]) -> str:
    """The readable table: slopes of the weighted average, one block per problem and lam."""
    lines = [f"Slopes over T in [{config.fit_from:,}, {config.num_steps:,}], weighted average"]
    for problem in config.problems:
        for lam in config.lams:
            lines += [
                f"\n{problem}, lam={lam:g}",
                f"  {'method':<22}{'slope':>8}{'95% interval':>18}{'bound':>8}"
                f"{'final gap':>11}{'bound':>11}",
            ]
            lines += [
                _report_row(rate)
                for rate in rates
                if (rate["problem"], rate["lam"], rate["iterate"]) == (problem, lam, "weighted")
            ]
    verdicts = [rate["gap_below_bound"] for rate in rates if rate["final_bound"] is not None]
    lines.append(f"\nmean gap below its bound: {sum(verdicts)} of {len(verdicts)} curves")
    slopes = [rate["slope_below_bound"] for rate in rates if rate["final_bound"] is not None]
    counts = ", ".join(f"{name} {slopes.count(name)}" for name in ("yes", "open", "no"))
    return "\n".join([*lines, f"slope not above its bound's slope: {counts}"])


def _report_row(rate: dict[str, Any]) -> str:
    slope, bound = rate["slope"], rate["final_bound"]
    interval = f"[{slope['low']:.2f}, {slope['high']:.2f}]"
    bounds = ("-", "-") if bound is None else (f"{rate['bound_slope']:.2f}", f"{bound:.2e}")
    return (
        f"  {rate['method']:<22}{slope['mean']:>8.2f}{interval:>18}{bounds[0]:>8}"
        f"{rate['final_gap']['mean']:>11.2e}{bounds[1]:>11}"
    )


if __name__ == "__main__":
    run_command(main, "python -m theory.convergence_experiment")
