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
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from theory.cli import check_output_dir, run_command
from theory.command import add_refresh_every, command_line, common_fields, parse_sweep, sweep_parser
from theory.metrics import sequential_limit
from theory.optima import Optimum, ProblemOptima
from theory.plotting import gap as plotting
from theory.plotting import style
from theory.problems import PROBLEMS, make_problem
from theory.records import save_figure, write_json, write_parquet
from theory.schedulers import ORDERS
from theory.simulate import log_spaced_steps
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

JOINT = ("mix", "alright", "maxright")
GROUPS = (*KEYS[:3], "split", *KEYS[3:])
NEAR_ONE = (0.97, 0.99, 0.997, 0.999, 0.9997, 0.9999, 0.99997, 0.99999)
"""Splits that leave a handful of steps for the last objective: where tuning helps at large T."""
EVEN_SPLIT = 0.5
"""The split of the untuned sequential runs: half of the budget for each objective."""


@dataclass(frozen=True)
class GapConfig:
    """Everything that determines the results."""

    problems: tuple[str, ...] = tuple(PROBLEMS)
    lams: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9)
    num_steps: int = 100_000
    num_seeds: int = 20
    splits: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9, *NEAR_ONE)
    refresh_every: int = 1

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(self.num_seeds))

    @property
    def horizons(self) -> NDArray[np.int64]:
        """Budgets of the sequential runs: two per decade."""
        return log_spaced_steps(self.num_steps, per_decade=2)


def batches(config: GapConfig) -> list[Batch]:
    """The work of the experiment, the dear part first: later problems are larger."""
    return [
        batch
        for problem in reversed(config.problems)
        for batch in (*_joint(config, problem), *_sequential(config, problem))
    ]


def _joint(config: GapConfig, problem: str) -> Iterator[Batch]:
    period = {"refresh_every": config.refresh_every}
    for algorithm in reversed(JOINT):
        maxright = algorithm == "maxright"
        yield Batch(
            problem,
            algorithm,
            config.lams,
            config.seeds,
            config.num_steps,
            options=period if maxright else {},
            variants=(Variant(f"refresh_every={config.refresh_every}" if maxright else ""),),
        )


def _sequential(config: GapConfig, problem: str) -> Iterator[Batch]:
    for order, horizon in product(ORDERS, config.horizons.tolist()):
        yield Batch(
            problem,
            "sequential",
            config.lams,
            config.seeds,
            horizon,
            options={"order": order},
            variants=_splits(config, order, horizon),
            record_steps=(horizon,),
        )


def _splits(config: GapConfig, order: str, horizon: int) -> tuple[Variant, ...]:
    """One variant per split; of splits that round to the same stage lengths only the first."""
    variants: dict[int, Variant] = {}
    for split in config.splits:
        first_steps = min(max(round(split * horizon), 1), horizon - 1)
        name = f"{order}, split={split:g}"
        variants.setdefault(
            first_steps, Variant(name, {"first_steps": first_steps}, {"split": split})
        )
    return tuple(variants.values())


def run_experiment(config: GapConfig, jobs: int = 2, parts: Path | None = None) -> pd.DataFrame:
    """All runs, one row per problem, algorithm, variant, lam, seed, step and iterate."""
    results = run_sweep(batches(config), jobs=jobs, parts=parts)
    columns = [*KEYS[:3], "split", "lam", "seed", *KEYS[4:], *METRICS, *COUNTS]
    return results[columns].sort_values([*GROUPS, "seed"], ignore_index=True)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    config = GapConfig(
        **common_fields(arguments),
        refresh_every=arguments.refresh_every,
    )
    out = Path(arguments.out)
    check_output_dir(out)
    parts = out / FINISHED
    results = run_experiment(config, arguments.jobs, parts)
    groups = summarise(results, GROUPS)
    limits = reference_values(config)
    write_json(out / "config.json", asdict(config))
    write_parquet(out / "results.parquet", results)
    write_json(out / "summary.json", summary(config, groups, limits))
    figure, numbers = plotting.gap_figure(groups, limits, style.middle(config.lams), EVEN_SPLIT)
    save_figure(figure, out / "gap")
    sidecar = {"command": command(config), "config": asdict(config), "panels": numbers}
    write_json(out / "gap.json", sidecar)
    print(report(config, groups, limits))
    discard_parts(parts)
    print(f"\nwrote config.json, results.parquet, summary.json and gap.png/.svg/.json to {out}/")


def command(config: GapConfig) -> str:
    """The command line that reproduces the results."""
    return command_line("gap_experiment", config, "refresh_every")


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
        label = style.LABELS[order]
        even = rows[rows["split"] == EVEN_SPLIT]
        yield f"G_Mix {label}", _cells(config, even, "mix_gap")
        by_lam = [references[f"{lam:g}"]["sequential_limit"][order] for lam in config.lams]
        yield f"  its limit ({by_lam[0]['source']})", [f"{v['mix_gap']:.4g}" for v in by_lam]
        yield "  best split @ (hindsight)", [_best_split(rows, lam) for lam in config.lams]
    for metric, name in (("mix_gap", "G_Mix"), ("max_gap", "G_Max")):
        for algorithm in JOINT:
            rows = table[table["algorithm"] == algorithm]
            yield f"{name} {style.LABELS[algorithm]}", _cells(config, rows, metric)


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
    description = "Measure the sequential trade-off gap and how the joint schedules close it."
    parser = sweep_parser("gap_experiment", description, defaults)
    add_refresh_every(parser, defaults.refresh_every)
    return parse_sweep(parser, argv, least_steps=10)


if __name__ == "__main__":
    run_command(main, "python -m theory.gap_experiment")
