"""Where each algorithm ends in objective space, against the certified Pareto front.

    python -m theory.pareto_experiment
    python -m theory.pareto_experiment --problem softmax --steps 30000 --seeds 50

The front is exact: certified minimisers of f_Mix, dense in lam. An algorithm's end points over its
knob (lam for the joint methods, the split for each order of sequential training) are compared by
hypervolume and by their ideal distance in excess of the least possible one. Writes config.json,
results.parquet, summary.json, front.* (end points), overview_<problem>.* (paths in objective space,
gaps and cost, as in the first figure of arXiv 2410.15483) and, with problem toy2d, paths.* (the
same in parameter space); each figure as .png, .svg and .json.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from theory.cli import check_output_dir, run_command
from theory.command import add_refresh_every, command_line, common_fields, parse_sweep, sweep_parser
from theory.optima import ProblemOptima
from theory.pareto_summary import (
    EVEN_SPLIT,
    JOINT,
    PLANE,
    ParetoConfig,
    Reference,
    objective_paths,
    plane_paths,
    reference,
    summary,
)
from theory.plotting import pareto as plotting
from theory.plotting.style import middle, short_name
from theory.problems import make_problem
from theory.records import save_figure, write_json, write_parquet
from theory.schedulers import ORDERS
from theory.sweep import COUNTS, FINISHED, KEYS, METRICS, Batch, Variant, discard_parts, run_sweep


def batches(config: ParetoConfig) -> list[Batch]:
    """The work of the experiment, the dear part first: later problems are larger."""
    return [batch for problem in reversed(config.problems) for batch in _batches(config, problem)]


def _batches(config: ParetoConfig, problem: str) -> Iterator[Batch]:
    common = (config.lams, config.seeds, config.num_steps)
    for name in reversed(JOINT):
        period = {"refresh_every": config.refresh_every} if name == "maxright" else {}
        variant = (Variant(name),)
        steps = config.record_steps
        yield Batch(problem, name, *common, variant, period, record_steps=steps)
    # Sequential training does not know lam: all lams would repeat the same end points.
    common = ((middle(config.lams),), config.seeds, config.num_steps)
    others = tuple(split for split in config.splits if split != EVEN_SPLIT)
    for order in ORDERS:
        for splits, steps in ((others, (config.num_steps,)), ((EVEN_SPLIT,), config.record_steps)):
            variants = tuple(_split(config, order, split) for split in splits)
            yield Batch(
                problem, "sequential", *common, variants, {"order": order}, record_steps=steps
            )


def _split(config: ParetoConfig, order: str, split: float) -> Variant:
    first_steps = min(max(round(split * config.num_steps), 1), config.num_steps - 1)
    name = f"{order}, split={split:g}"
    return Variant(name, {"first_steps": first_steps}, {"split": split})


def run_experiment(config: ParetoConfig, jobs: int = 2, parts: Path | None = None) -> pd.DataFrame:
    """All runs, one row per problem, `line`, knob, seed, step and iterate.

    `line` is the joint algorithm or the order; `knob` its lam or split.
    """
    results = run_sweep(batches(config), jobs=jobs, parts=parts)
    results["line"] = results["variant"].str.partition(",")[0]
    results["knob"] = results["split"].fillna(results["lam"])
    columns = ["problem", "line", "knob", "seed", *KEYS[3:], *METRICS, *COUNTS]
    return results[columns].sort_values(columns[:7], ignore_index=True)


def figures(
    config: ParetoConfig,
    results: pd.DataFrame,
    numbers: dict[str, Any],
    references: dict[str, Reference],
) -> Iterator[tuple[str, Figure, plotting.Numbers]]:
    lam = middle(config.lams)
    fronts = {name: ref.front for name, ref in references.items()}
    yield "front", *plotting.front_figure(numbers["lines"], fronts)
    for problem, front in fronts.items():
        lines = [line for line in numbers["lines"] if line["problem"] == problem]
        paths = objective_paths(config, results, problem)
        least = references[problem].least_distance
        figure = plotting.overview_figure(lines, paths, front, least, lam, EVEN_SPLIT)
        yield f"overview_{short_name(problem)}", *figure
    if PLANE in config.problems:
        optima = ProblemOptima(make_problem(PLANE))
        yield "paths", *plotting.plane_figure(optima, fronts[PLANE], plane_paths(lam), lam)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    config = ParetoConfig(
        **common_fields(arguments) | {"lams": tuple(sorted(set(arguments.lam)))},
        refresh_every=arguments.refresh_every,
    )
    out = Path(arguments.out)
    check_output_dir(out)
    parts = out / FINISHED
    results = run_experiment(config, arguments.jobs, parts)
    references = {problem: reference(config, problem) for problem in config.problems}
    numbers = summary(config, results, references)
    write_json(out / "config.json", asdict(config))
    write_parquet(out / "results.parquet", results)
    write_json(out / "summary.json", numbers)
    for name, figure, drawn in figures(config, results, numbers, references):
        save_figure(figure, out / name)
        sidecar = {"command": command(config), "config": asdict(config), "panels": drawn}
        write_json(out / f"{name}.json", sidecar)
    print(report(config, numbers))
    discard_parts(parts)
    print(f"\nwrote config.json, results.parquet, summary.json and the figures to {out}/")


def command(config: ParetoConfig) -> str:
    """The command line that reproduces the results."""
    return command_line("pareto_experiment", config, "refresh_every")


def report(config: ParetoConfig, numbers: dict[str, Any]) -> str:
    """The readable table of the weighted averages, one block per problem."""
    lines = ["Weighted averages; share of the front's hypervolume, least excess ideal distance"]
    for problem in config.problems:
        front = numbers["fronts"][problem]
        lines.append(f"\n{problem} (least ideal distance {front['least_ideal_distance']:.4f})")
        share = front["hypervolume_share_at_lams"]
        lines.append(f"  {'exact':<14} {share:.4f} (the minimisers of f_Mix at these lams)")
        for record in numbers["lines"]:
            if (record["problem"], record["iterate"]) == (problem, "weighted"):
                share = record["hypervolume_share"]
                best = min(record["points"], key=lambda p: p["excess_ideal_distance"]["mean"])
                excess = best["excess_ideal_distance"]
                lines.append(
                    f"  {record['line']:<14} {share['mean']:.4f} [{share['low']:.4f}, "
                    f"{share['high']:.4f}]   {excess['mean']:.2e} [{excess['low']:.1e}, "
                    f"{excess['high']:.1e}] at {best['knob']:g}"
                )
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    defaults = ParetoConfig()
    description = "Compare end points with the certified Pareto front."
    parser = sweep_parser("pareto_experiment", description, defaults)
    add_refresh_every(parser, defaults.refresh_every)
    return parse_sweep(parser, argv, least_steps=100)


if __name__ == "__main__":
    run_command(main, "python -m theory.pareto_experiment")
