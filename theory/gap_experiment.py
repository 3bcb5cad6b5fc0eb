"""Measure the sequential trade-off gap and how the joint schedules close it.

    python -m theory.gap_experiment
    python -m theory.gap_experiment --problem bernoulli --lam 0.5 --steps 10000 --out gap_bernoulli

For each problem and each lam: sequential training in both orders over a sweep of the split, Mix,
ALRIGHT and MAXRIGHT, all at the same step sizes alpha_t = c/sqrt(t) and on the same sample streams.
A sequential run has a budget T and spends the share `split` of it on its first objective, so each T
is a run of its own. Writes config.json, results.parquet, summary.json and the figure of G_Mix and
G_Max against T (gap.png, gap.svg, gap.json).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from numpy.typing import NDArray
from tqdm import tqdm

from theory import plotting
from theory.cli import OneLineParser, check_output_dir, positive_int, run_command, unit_float
from theory.metrics import convex_metrics, mean_interval, sequential_limit
from theory.optima import Optimum, ProblemOptima
from theory.problems import PROBLEMS, make_problem
from theory.records import save_figure, write_json, write_parquet
from theory.schedulers import ORDERS, Scheduler, Sequential, make_scheduler
from theory.simulate import ITERATES, StepSize, Trace, log_spaced_steps, simulate
from theory.tasks import Task

JOINT = ("mix", "alright", "maxright")
METRICS = ("f_dpo", "f_sft", "mix_gap", "max_gap", "ideal_distance")
KEYS = ["problem", "algorithm", "variant", "split", "lam", "step", "iterate"]
EVEN_SPLIT = 0.5
"""The split of the untuned sequential runs: half of the budget for each objective."""


@dataclass(frozen=True)
class GapConfig:
    """Everything that determines the results."""

    problems: tuple[str, ...] = tuple(PROBLEMS)
    lams: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9)
    num_steps: int = 100_000
    num_seeds: int = 20
    splits: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 0.9999)
    refresh_every: int = 1

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(self.num_seeds))

    @property
    def horizons(self) -> NDArray[np.int64]:
        """Budgets of the sequential runs: two per decade."""
        return log_spaced_steps(self.num_steps, per_decade=2)


@dataclass(frozen=True)
class Job:
    """One problem under one algorithm (one order, if sequential): a unit of parallel work."""

    config: GapConfig
    problem: str
    algorithm: str
    order: str = ""

    @property
    def steps(self) -> int:
        """Loop iterations: what the progress bar counts."""
        return int(self.config.horizons.sum()) if self.order else self.config.num_steps

    def run(self) -> pd.DataFrame:
        optima = ProblemOptima(make_problem(self.problem))
        frames = self._sequential(optima) if self.order else self._joint(optima)
        return pd.concat(frames, ignore_index=True).assign(
            problem=self.problem, algorithm=self.algorithm
        )

    def _joint(self, optima: ProblemOptima) -> Iterator[pd.DataFrame]:
        seeds = self.config.seeds
        lams = np.repeat(self.config.lams, len(seeds))
        scheduler = self._scheduler(optima, tuple(lams.tolist()), seeds * len(self.config.lams))
        trace = _simulate(optima, scheduler, seeds * len(self.config.lams), self.config.num_steps)
        variant = f"refresh_every={self.config.refresh_every}" * (self.algorithm == "maxright")
        for lam in self.config.lams:
            yield _rows(optima, trace, np.flatnonzero(lams == lam), lam, seeds).assign(
                variant=variant, split=np.nan
            )

    def _scheduler(
        self, optima: ProblemOptima, lams: tuple[float, ...], seeds: tuple[int, ...]
    ) -> Scheduler:
        options: dict[str, Any] = {"lam": lams}
        if self.algorithm == "alright":
            options["seed"] = seeds
        if self.algorithm == "maxright":
            options |= {"optimum": optima.values, "refresh_every": self.config.refresh_every}
        return make_scheduler(self.algorithm, **options)

    def _sequential(self, optima: ProblemOptima) -> Iterator[pd.DataFrame]:
        seeds = self.config.seeds
        splits = np.repeat(self.config.splits, len(seeds))
        for horizon in self.config.horizons.tolist():
            first_steps = np.clip(np.round(splits * horizon), 1, horizon - 1).astype(int)
            scheduler = Sequential(tuple(first_steps.tolist()), self.order)
            runs = seeds * len(self.config.splits)
            trace = _simulate(optima, scheduler, runs, horizon, [horizon])
            for split in self.config.splits:
                chosen = np.flatnonzero(splits == split)
                for lam in self.config.lams:
                    yield _rows(optima, trace, chosen, lam, seeds).assign(
                        variant=f"{self.order}, split={split:g}", split=split
                    )


def _simulate(
    optima: ProblemOptima,
    scheduler: Scheduler,
    seeds: tuple[int, ...],
    num_steps: int,
    record_steps: list[int] | None = None,
) -> Trace:
    return simulate(
        optima.problem,
        scheduler,
        num_steps=num_steps,
        step_size=StepSize(optima.problem.step_scale),
        seeds=seeds,
        record_steps=record_steps,
    )


def _rows(
    optima: ProblemOptima,
    trace: Trace,
    chosen: NDArray[np.intp],
    lam: float,
    seeds: tuple[int, ...],
) -> pd.DataFrame:
    """One row per recorded step, run of `chosen` and iterate."""
    shape = (len(ITERATES), len(trace.steps), len(seeds))
    theta = np.stack([trace.theta[iterate][:, chosen] for iterate in ITERATES])
    counts = {
        "dpo_gradients": trace.gradients[:, chosen, Task.DPO],
        "sft_gradients": trace.gradients[:, chosen, Task.SFT],
        "probes": trace.probes[:, chosen].sum(axis=-1),
    }
    keys = {
        "iterate": np.array(ITERATES)[:, None, None],
        "step": trace.steps[:, None],
        "seed": np.array(seeds),
    }
    columns = keys | convex_metrics(optima, theta, lam) | counts
    flat = {name: np.broadcast_to(values, shape).ravel() for name, values in columns.items()}
    return pd.DataFrame(flat).assign(lam=lam)


def run_experiment(config: GapConfig, jobs: int = 2) -> pd.DataFrame:
    """All runs, one row per problem, algorithm, variant, lam, seed, step and iterate."""
    work = [
        Job(config, problem, algorithm, order)
        for problem in config.problems
        for algorithm, order in [(a, "") for a in JOINT] + [("sequential", o) for o in ORDERS]
    ]
    # The dear jobs first (later problems are larger, MAXRIGHT evaluates them in full).
    work.sort(key=lambda job: (-config.problems.index(job.problem), job.algorithm != "maxright"))
    with tqdm(total=sum(job.steps for job in work), unit="step", unit_scale=True) as bar:
        parallel = Parallel(n_jobs=jobs, return_as="generator_unordered")
        frames = []
        for steps, frame in parallel(delayed(_timed)(job) for job in work):
            frames.append(frame)
            bar.update(steps)
    columns = [*KEYS[:-2], "seed", *KEYS[-2:], *METRICS, "dpo_gradients", "sft_gradients", "probes"]
    results = pd.concat(frames, ignore_index=True)[columns]
    return results.sort_values([*KEYS, "seed"], ignore_index=True)


def _timed(job: Job) -> tuple[int, pd.DataFrame]:
    return job.steps, job.run()


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95% interval over seeds of every metric, one row per group of `KEYS`."""

    def group(frame: pd.DataFrame) -> pd.Series[Any]:
        intervals = {metric: mean_interval(frame[metric]) for metric in METRICS}
        counts = frame[["dpo_gradients", "sft_gradients", "probes"]].mean()
        return pd.Series(intervals | counts.to_dict() | {"seeds": len(frame)})

    grouped = results.groupby(KEYS, dropna=False, sort=False)
    return grouped.apply(group, include_groups=False).reset_index()


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    config = GapConfig(
        problems=tuple(dict.fromkeys(arguments.problem)),
        lams=tuple(dict.fromkeys(arguments.lam)),
        num_steps=arguments.steps,
        num_seeds=arguments.seeds,
        refresh_every=arguments.refresh_every,
    )
    out = Path(arguments.out)
    check_output_dir(out)
    results = run_experiment(config, arguments.jobs)
    groups = summarise(results)
    limits = reference_values(config)
    print(report(config, groups, limits))
    write_json(out / "config.json", asdict(config))
    write_parquet(out / "results.parquet", results)
    write_json(out / "summary.json", summary(config, groups, limits))
    figure, numbers = plotting.gap_figure(groups, limits, plotting.middle(config.lams), EVEN_SPLIT)
    save_figure(figure, out / "gap")
    command = f"python -m theory.gap_experiment --steps {config.num_steps}"
    write_json(out / "gap.json", {"command": command, "config": asdict(config), "panels": numbers})
    print(f"\nwrote config.json, results.parquet, summary.json and gap.png/.svg/.json to {out}/")


def reference_values(config: GapConfig) -> dict[str, Any]:
    """Certified optima and the limits of sequential training, by problem and lam."""
    values: dict[str, Any] = {}
    for name in config.problems:
        optima = ProblemOptima(make_problem(name))
        by_lam = {}
        for lam in config.lams:
            limits = {}
            for order, (_, last) in ORDERS.items():
                limit, source = sequential_limit(optima, last, lam)
                limits[order] = {"mix_gap": limit, "source": source}
            by_lam[f"{lam:g}"] = {
                "min_f_mix": _certified(optima.mix(lam)),
                "min_f_max": _certified(optima.max(lam)),
                "sequential_limit": limits,
            }
        dpo, sft = optima.single
        values[name] = {"f_dpo": _certified(dpo), "f_sft": _certified(sft), "lam": by_lam}
    return values


def _certified(optimum: Optimum) -> dict[str, float]:
    return {"value": optimum.value, "certified_gap": optimum.certificate}


def final_rows(config: GapConfig, groups: pd.DataFrame) -> pd.DataFrame:
    return groups[groups["step"] == config.num_steps]


def summary(config: GapConfig, groups: pd.DataFrame, limits: dict[str, Any]) -> dict[str, Any]:
    """What summary.json holds: the state at the last step, and the certified references."""
    rows = final_rows(config, groups).drop(columns="step")
    records = []
    for row in rows.to_dict(orient="records"):
        metrics = {metric: row[metric]._asdict() for metric in METRICS}
        records.append({str(k): v for k, v in row.items()} | metrics)
    return {"config": asdict(config), "references": limits, "final": records}


def report(config: GapConfig, groups: pd.DataFrame, limits: dict[str, Any]) -> str:
    """The readable table: one block per problem, a column per lam."""
    final = final_rows(config, groups)
    final = final[final["iterate"] == "weighted"]
    lines = [
        f"Gaps at T = {config.num_steps:,} (alpha-weighted averages; mean ± half of the 95% "
        f"interval over {config.num_seeds} seeds)"
    ]
    for problem in config.problems:
        table = final[final["problem"] == problem]
        lines += ["", f"{problem:<28}" + "".join(f"{f'lam={lam:g}':>17}" for lam in config.lams)]
        for label, cells in _report_rows(config, table, limits[problem]["lam"]):
            lines.append(f"  {label:<26}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


def _report_rows(
    config: GapConfig, table: pd.DataFrame, references: dict[str, Any]
) -> Iterator[tuple[str, list[str]]]:
    sequential = table[table["algorithm"] == "sequential"]
    for order in ORDERS:
        rows = sequential[sequential["variant"].str.startswith(order)]
        label = plotting.LABELS[order]
        even = rows[rows["split"] == EVEN_SPLIT]
        yield f"G_Mix {label}", _cells(config, even, "mix_gap")
        by_lam = [references[f"{lam:g}"]["sequential_limit"][order] for lam in config.lams]
        yield f"  its limit ({by_lam[0]['source']})", [f"{v['mix_gap']:.4g}" for v in by_lam]
        yield "  best split @ (hindsight)", [_best_split(rows, lam) for lam in config.lams]
    for metric, name in (("mix_gap", "G_Mix"), ("max_gap", "G_Max")):
        for algorithm in JOINT:
            rows = table[table["algorithm"] == algorithm]
            yield f"{name} {plotting.LABELS[algorithm]}", _cells(config, rows, metric)


def _cells(config: GapConfig, rows: pd.DataFrame, metric: str) -> list[str]:
    by_lam = rows.set_index("lam")[metric]
    return [_format(*by_lam[lam]) for lam in config.lams]


def _best_split(rows: pd.DataFrame, lam: float) -> str:
    rows = rows[rows["lam"] == lam]
    best = rows.loc[rows["mix_gap"].map(lambda interval: interval.mean).idxmin()]
    return f"{best['mix_gap'].mean:.2e} @{best['split']:g}"


def _format(mean: float, low: float, high: float) -> str:
    return f"{mean:.2e} ±{(high - low) / 2:.0e}" if np.isfinite(high) else f"{mean:.2e}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    defaults = GapConfig()
    parser = OneLineParser(
        prog="python -m theory.gap_experiment",
        description="Measure the sequential trade-off gap and how the joint schedules close it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--problem", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), help="problems")
    add("--lam", nargs="+", type=unit_float, default=list(defaults.lams), help="weights on DPO")
    add("--steps", type=positive_int, default=defaults.num_steps, help="budget T of each run")
    add("--seeds", type=positive_int, default=defaults.num_seeds, help="number of seeds")
    add(
        "--refresh_every",
        type=positive_int,
        default=defaults.refresh_every,
        help="MAXRIGHT: steps between evaluations of both objectives",
    )
    add("--out", default="figures/gap_experiment", help="directory for the results")
    add("--jobs", type=positive_int, default=2, help="parallel processes")
    arguments = parser.parse_args(argv)
    if arguments.steps < 10:
        parser.error(f"--steps {arguments.steps} is too few: a run needs at least 10")
    return arguments


if __name__ == "__main__":
    run_command(main, "python -m theory.gap_experiment")
