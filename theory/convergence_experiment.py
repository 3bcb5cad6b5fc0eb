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
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from theory.cli import check_output_dir, positive_int, run_command
from theory.command import command_line, common_fields, sweep_parser
from theory.metrics import mean_interval, sequential_limit
from theory.optima import TOLERANCE, ProblemOptima
from theory.plotting import convergence as plotting
from theory.problems import PROBLEMS, make_problem
from theory.rates import fit_slope, slope_interval
from theory.records import save_figure, write_json, write_parquet
from theory.schedulers import ORDERS
from theory.simulate import ITERATES, log_spaced_steps
from theory.sweep import (
    COUNTS,
    FINISHED,
    KEYS,
    METRICS,
    Batch,
    Variant,
    discard_parts,
    run_sweep,
    summarise,
)
from theory.theorems.rate_bounds import bound_curve

EMA_WEIGHT = 0.02

Curves = dict[tuple[str, float, str, str], pd.Series]
"""(problem, lam, method, iterate) -> bound by step."""


@dataclass(frozen=True)
class ConvergenceConfig:
    """Everything that determines the results."""

    problems: tuple[str, ...] = tuple(PROBLEMS)
    lams: tuple[float, ...] = (0.5,)
    num_steps: int = 30_000
    num_seeds: int = 20
    fit_from: int = 1000
    resamples: int = 2000

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(self.num_seeds))


@dataclass(frozen=True)
class Method:
    """One line of the experiment; `metric` is the gap that its theorem is about."""

    name: str
    algorithm: str
    metric: str = "max_gap"
    options: dict[str, Any] = field(default_factory=dict)
    values: str | None = None
    """A name of `theory.values`; None: exact values."""


def methods(num_steps: int) -> list[Method]:
    """All methods. MAXRIGHT's names say: values, their age, and whether steps are unscaled."""
    return [
        *(Method(order, "sequential", "mix_gap", {"order": order}) for order in ORDERS),
        Method("mix", "mix", "mix_gap"),
        Method("alright", "alright", "mix_gap"),
        *_maxright(num_steps, scale_steps=True, suffix=""),
        *_maxright(num_steps, scale_steps=False, suffix=" unscaled"),
    ]


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


def batches(config: ConvergenceConfig) -> list[Batch]:
    """The work of the experiment, the dear part first: later problems are larger."""
    return [
        batch
        for problem in reversed(config.problems)
        for method in reversed(methods(config.num_steps))
        for batch in _batches(config, problem, method)
    ]


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


def run_experiment(
    config: ConvergenceConfig, jobs: int = 2, parts: Path | None = None
) -> pd.DataFrame:
    """All runs, one row per problem, method (`variant`), lam, seed, step and iterate."""
    results = run_sweep(batches(config), jobs=jobs, parts=parts)
    columns = [*KEYS[:4], "seed", *KEYS[4:], *METRICS, *COUNTS]
    return results[columns].sort_values([*KEYS, "seed"], ignore_index=True)


def measured_rates(
    config: ConvergenceConfig, results: pd.DataFrame, bounds: Curves
) -> list[dict[str, Any]]:
    """Slope, bound and verdicts of every problem, lam, method and iterate."""
    keys = ["problem", "lam", "variant", "iterate"]
    tables = dict(iter(results.groupby(keys)))
    grid = product(config.problems, config.lams, methods(config.num_steps), ITERATES)
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
        for lam, method, iterate in product(config.lams, methods(config.num_steps), ITERATES):
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
    arguments = parse(argv)
    config = ConvergenceConfig(
        **common_fields(arguments),
        fit_from=arguments.fit_from,
    )
    out = Path(arguments.out)
    check_output_dir(out)
    parts = out / FINISHED
    results = run_experiment(config, arguments.jobs, parts)
    bounds, references = bound_curves(config), limits(config)
    rates = measured_rates(config, results, bounds)
    write_json(out / "config.json", asdict(config))
    write_parquet(out / "results.parquet", results)
    summary = {"config": asdict(config), "sequential_limits": references, "rates": rates}
    write_json(out / "summary.json", summary)
    lam = plotting.middle(config.lams)
    curves = plotting.convergence_figure(summarise(results), bounds, references, lam)
    for name, (figure, numbers) in {
        "convergence": curves,
        "slopes": plotting.slopes_figure(rates, lam),
    }.items():
        save_figure(figure, out / name)
        sidecar = {"command": command(config), "config": asdict(config), "panels": numbers}
        write_json(out / f"{name}.json", sidecar)
    print(report(config, rates))
    discard_parts(parts)
    print(
        f"\nwrote config.json, results.parquet, summary.json, convergence.* and slopes.* to {out}/"
    )


def command(config: ConvergenceConfig) -> str:
    """The command line that reproduces the results."""
    return command_line("convergence_experiment", config, "fit_from")


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


def parse(argv: list[str] | None) -> argparse.Namespace:
    defaults = ConvergenceConfig()
    description = "Measure convergence rates and hold them against the theorems' bounds."
    parser = sweep_parser("convergence_experiment", description, defaults)
    parser.add_argument(
        "--fit_from", type=positive_int, default=defaults.fit_from, help="first step of the fit"
    )
    arguments = parser.parse_args(argv)
    if arguments.steps < 10 * arguments.fit_from:
        parser.error(
            f"--steps {arguments.steps} is too few: a fit from {arguments.fit_from} on needs a "
            f"decade, so at least {10 * arguments.fit_from} steps"
        )
    return arguments


if __name__ == "__main__":
    run_command(main, "python -m theory.convergence_experiment")
