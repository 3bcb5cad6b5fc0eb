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

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from theory import compared
from theory.cli import run_command
from theory.command import ALGORITHMS, REFRESH_EVERY, Findings, SweepExperiment, sweep_main
from theory.compared import EVEN_SPLIT, Compared
from theory.metrics import middle, sequential_limit
from theory.optima import Optimum, ProblemOptima
from theory.plotting.gap import gap_figure
from theory.plotting.style import label
from theory.problems import PROBLEMS, make_problem
from theory.schedulers import ORDERS
from theory.simulate import log_spaced_steps
from theory.sweep import COUNTS, KEYS, METRICS, Batch, Variant, summarise

GROUPS = (*KEYS[:3], "split", *KEYS[3:])
NEAR_ONE = (0.97, 0.99, 0.997, 0.999, 0.9997, 0.9999, 0.99997, 0.99999)
"""Splits that leave a handful of steps for the last objective: where tuning helps at large T."""


@dataclass(frozen=True)
class GapConfig(Compared, SweepExperiment):
    """Everything that determines the results."""

    name: ClassVar[str] = "gap_experiment"
    about: ClassVar[str] = (
        "Measure the sequential trade-off gap and how the joint schedules close it."
    )
    figure_files: ClassVar[str] = " and gap.png/.svg/.json"
    own_flags = REFRESH_EVERY | ALGORITHMS
    problems: tuple[str, ...] = tuple(PROBLEMS)
    lams: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9)
    num_steps: int = 100_000
    num_seeds: int = 20
    splits: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9, *NEAR_ONE)
    refresh_every: int = 1
    algorithms: tuple[str, ...] = compared.ALGORITHMS
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def horizons(self) -> NDArray[np.int64]:
        """Budgets of the sequential runs: two per decade."""
        return log_spaced_steps(self.num_steps, per_decade=2)

    def batches(self) -> list[Batch]:
        """The dear part first: later problems are larger."""
        return [
            batch
            for problem in reversed(self.problems)
            for batch in (*_joint(self, problem), *_sequential(self, problem))
        ]

    def table(self, results: pd.DataFrame) -> pd.DataFrame:
        """One row per problem, algorithm, variant, lam, seed, step and iterate."""
        results = results.assign(split=results.get("split", np.nan))  # of sequential training alone
        columns = [*KEYS[:3], "split", "lam", "seed", *KEYS[4:], *METRICS, *COUNTS]
        return results[columns].sort_values([*GROUPS, "seed"], ignore_index=True)

    def findings(self, results: pd.DataFrame) -> Findings:
        groups, limits = summarise(results, GROUPS), reference_values(self)
        figure, numbers = gap_figure(groups, limits, middle(self.lams), EVEN_SPLIT)
        return Findings(
            summary(self, groups, limits),
            report(self, groups, limits),
            [("gap", figure, {"panels": numbers})],
        )


def _joint(config: GapConfig, problem: str) -> Iterator[Batch]:
    for algorithm in reversed(compared.joint(config.algorithms)):
        options = config.options_of(algorithm)
        name = ",".join(f"{key}={value}" for key, value in options.items())
        yield Batch(
            problem,
            algorithm,
            config.lams,
            config.seeds,
            config.num_steps,
            options=options,
            variants=(Variant(name),),
        )


def _sequential(config: GapConfig, problem: str) -> Iterator[Batch]:
    for order, horizon in product(compared.orders(config.algorithms), config.horizons.tolist()):
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
        variant = compared.split_variant(order, split, horizon)
        variants.setdefault(variant.options["first_steps"], variant)
    return tuple(variants.values())


def main(argv: list[str] | None = None) -> None:
    sweep_main(GapConfig, argv)


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
        for head, cells in _report_rows(config, table, limits[problem]["lam"]):
            lines.append(f"  {head:<26}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


def _report_rows(
    config: GapConfig, table: pd.DataFrame, references: dict[str, Any]
) -> Iterator[tuple[str, list[str]]]:
    sequential = table[table["algorithm"] == "sequential"]
    for order in compared.orders(config.algorithms):
        rows = sequential[sequential["variant"].str.startswith(order)]
        even = rows[rows["split"] == EVEN_SPLIT]
        yield f"G_Mix {label(order)}", _cells(config, even, "mix_gap")
        by_lam = [references[f"{lam:g}"]["sequential_limit"][order] for lam in config.lams]
        yield f"  its limit ({by_lam[0]['source']})", [f"{v['mix_gap']:.4g}" for v in by_lam]
        yield "  best split @ (hindsight)", [_best_split(rows, lam) for lam in config.lams]
    for metric, name in (("mix_gap", "G_Mix"), ("max_gap", "G_Max")):
        for algorithm in compared.joint(config.algorithms):
            rows = table[table["algorithm"] == algorithm]
            yield f"{name} {label(algorithm)}", _cells(config, rows, metric)


def _cells(config: GapConfig, rows: pd.DataFrame, metric: str) -> list[str]:
    by_lam = rows.set_index("lam")[metric]
    return [_format(*by_lam[lam]) for lam in config.lams]


def _best_split(rows: pd.DataFrame, lam: float) -> str:
    rows = rows[rows["lam"] == lam]
    best = rows.loc[rows["mix_gap"].map(lambda interval: interval.mean).idxmin()]
    return f"{best['mix_gap'].mean:.2e} @{best['split']:g}"


def _format(mean: float, low: float, high: float) -> str:
    return f"{mean:.2e} ±{(high - low) / 2:.0e}" if np.isfinite(high) else f"{mean:.2e}"


if __name__ == "__main__":
    run_command(main, "python -m theory.gap_experiment")
