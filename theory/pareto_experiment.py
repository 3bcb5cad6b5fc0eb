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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
from matplotlib.figure import Figure

from theory import compared
from theory.cli import run_command
from theory.command import ALGORITHMS, REFRESH_EVERY, Findings, SweepExperiment, sweep_main
from theory.compared import EVEN_SPLIT
from theory.metrics import middle
from theory.optima import ProblemOptima
from theory.pareto_summary import (
    PLANE,
    ParetoConfig,
    Reference,
    objective_paths,
    plane_paths,
    reference,
    summary,
)
from theory.plotting import pareto as plotting
from theory.problems import make_problem, short_name
from theory.sweep import COUNTS, KEYS, METRICS, Batch, Variant


@dataclass(frozen=True)
class ParetoExperiment(ParetoConfig, SweepExperiment):
    """The command."""

    name: ClassVar[str] = "pareto_experiment"
    about: ClassVar[str] = "Compare end points with the certified Pareto front."
    figure_files: ClassVar[str] = " and the figures"
    own_flags = REFRESH_EVERY | ALGORITHMS
    rising_lams: ClassVar[bool] = True
    least_steps: ClassVar[int] = 100

    def batches(self) -> list[Batch]:
        """The dear part first: later problems are larger."""
        return [batch for problem in reversed(self.problems) for batch in _batches(self, problem)]

    def table(self, results: pd.DataFrame) -> pd.DataFrame:
        """One row per problem, `line`, knob, seed, step and iterate.

        `line` is the joint algorithm or the order; `knob` its lam or split.
        """
        split = results.get("split", results["lam"])  # without sequential training there is none
        line, knob = compared.line_of(results), split.fillna(results["lam"])
        results = results.assign(line=line, knob=knob)
        columns = ["problem", "line", "knob", "seed", *KEYS[3:], *METRICS, *COUNTS]
        return results[columns].sort_values(columns[:7], ignore_index=True)

    def findings(self, results: pd.DataFrame) -> Findings:
        references = {problem: reference(self, problem) for problem in self.problems}
        numbers = summary(self, results, references)
        drawn = figures(self, results, numbers, references)
        return Findings(
            numbers,
            report(self, numbers),
            ((name, figure, {"panels": panels}) for name, figure, panels in drawn),
        )


def _batches(config: ParetoExperiment, problem: str) -> Iterator[Batch]:
    common = (config.lams, config.seeds, config.num_steps)
    steps = config.record_steps
    for name in reversed(compared.joint(config.algorithms)):
        own = config.options_of(name)
        yield Batch(problem, name, *common, (Variant(name),), own, record_steps=steps)
    # Sequential training does not know lam: all lams would repeat the same end points.
    common = ((middle(config.lams),), config.seeds, config.num_steps)
    others = tuple(split for split in config.splits if split != EVEN_SPLIT)
    for order in compared.orders(config.algorithms):
        for splits, steps in ((others, (config.num_steps,)), ((EVEN_SPLIT,), config.record_steps)):
            variants = tuple(
                compared.split_variant(order, split, config.num_steps) for split in splits
            )
            yield Batch(
                problem, "sequential", *common, variants, {"order": order}, record_steps=steps
            )


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
        yield (
            "paths",
            *plotting.plane_figure(optima, fronts[PLANE], plane_paths(config.lines, lam), lam),
        )


def main(argv: list[str] | None = None) -> None:
    sweep_main(ParetoExperiment, argv)


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


if __name__ == "__main__":
    run_command(main, "python -m theory.pareto_experiment")
