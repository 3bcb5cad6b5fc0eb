"""The six predictions on convex simulations and on the published numbers: the package's command.

An end point is the last iterate, as for a language model. P1 to P5 read Mix, ALRIGHT and MAXRIGHT
with exact values at each lam, and sequential runs with half the budget for each objective; P6 reads
counted (not timed) costs, for which MAXRIGHT probes minibatches every `refresh_every` steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import pandas as pd

from theory.cli import run_command, unit_float
from theory.command import REFRESH_EVERY, Findings, SweepExperiment, sweep_main
from theory.costs import Costs
from theory.optima import TOLERANCE, ProblemOptima
from theory.predictions.claims import PREDICTIONS, CostPerStep, Equalisation, Prediction, verdicts
from theory.predictions.end_points import Optima, end_points
from theory.predictions.figures import PAPER, verdict_figure
from theory.predictions.paper_numbers import SOURCE, paper_verdicts
from theory.predictions.verdicts import Verdict
from theory.problems import PROBLEMS, make_problem
from theory.schedulers import ORDERS
from theory.sweep import Batch, Variant

COUNTED = "counted"
"""Variant of the MAXRIGHT runs that probe minibatches: for costs only, their values are noisy."""


@dataclass(frozen=True)
class PredictionsConfig(SweepExperiment):
    """Everything that determines the results."""

    name: ClassVar[str] = "predictions"
    about: ClassVar[str] = "Test the six predictions on convex runs and on the published numbers."
    figure_files: ClassVar[str] = " and predictions.png/.svg/.json"
    own_flags = {
        "tolerance": {
            "type": unit_float,
            "help": "violation of a prediction on losses that still counts as none, in nats",
        }
    } | REFRESH_EVERY
    rising_lams: ClassVar[bool] = True
    problems: tuple[str, ...] = tuple(PROBLEMS)
    lams: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9)
    num_steps: int = 20_000
    num_seeds: int = 10
    tolerance: float = 0.01
    refresh_every: int = 10

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        """With `tolerance` for the predictions on losses; P3 and P6 have units of their own."""
        own = (Equalisation, CostPerStep)
        return tuple(
            p if isinstance(p, own) else replace(p, tolerance=self.tolerance) for p in PREDICTIONS
        )

    def batches(self) -> list[Batch]:
        """The runs of all problems, the dear ones first."""
        return [batch for problem in reversed(self.problems) for batch in _batches(self, problem)]

    def table(self, results: pd.DataFrame) -> pd.DataFrame:
        """One row per problem, algorithm, variant, lam and seed."""
        runs = results[results["iterate"] == "last"].drop(columns="iterate").reset_index(drop=True)
        runs["order"] = runs["order"].astype(object).where(runs["order"].notna(), "")
        runs["p_dpo"] = runs["dpo_gradients"] / (runs["dpo_gradients"] + runs["sft_gradients"])
        return runs

    def findings(self, results: pd.DataFrame) -> Findings:
        found = convex_verdicts(self, results) | {PAPER: paper_verdicts(self.predictions)}
        figure, numbers = verdict_figure(found, equalisation_points(self, results))
        sidecar = {"seeds": self.seeds, "published": SOURCE, **numbers}
        return Findings(summary(self, found), report(found), [("predictions", figure, sidecar)])


def _batches(config: PredictionsConfig, problem: str) -> Iterator[Batch]:
    def batch(algorithm: str, variant: Variant, **settings: Any) -> Batch:
        return Batch(
            problem,
            algorithm,
            config.lams,
            config.seeds,
            config.num_steps,
            variants=(variant,),
            record_steps=(config.num_steps,),
            **settings,
        )

    period = config.refresh_every
    yield batch("maxright", Variant(), options={"refresh_every": 1})
    counted = Variant(COUNTED, columns={"refresh_every": float(period)})
    yield batch("maxright", counted, options={"refresh_every": period}, values="fresh")
    yield batch("alright", Variant())
    yield batch("mix", Variant())
    for order in ORDERS:
        options = {"first_steps": config.num_steps // 2}
        variant = Variant("", options, {"order": order, "split": 0.5})
        yield batch("sequential", variant, options={"order": order})


def counted_costs(runs: pd.DataFrame, costs: Costs) -> pd.DataFrame:
    """The runs whose evaluations are those of the algorithm, with their counted `cost` per step.

    Runs with exact values are left out: the full losses that they evaluate are the simulator's.
    """
    runs = runs[(runs["algorithm"] != "maxright") | (runs["variant"] == COUNTED)]
    total = runs["dpo_gradients"] * costs.dpo + runs["sft_gradients"] * costs.sft
    probes = runs["probes"] / 2.0  # one probe evaluates both objectives
    return runs.assign(cost=(total + probes * costs.probe) / runs["step"])


def convex_verdicts(config: PredictionsConfig, runs: pd.DataFrame) -> dict[str, list[Verdict]]:
    """The six verdicts by problem."""
    table = {}
    for name in config.problems:
        rows = runs[runs["problem"] == name]
        exact = rows[rows["variant"] != COUNTED]
        *on_losses, cost = config.predictions
        assert isinstance(cost, CostPerStep)
        table[name] = [
            *verdicts(exact, convex_optima(name), on_losses),
            cost.test(counted_costs(rows, cost.costs), convex_optima(name)),
        ]
    return table


def convex_optima(problem: str) -> Optima:
    """Certified optima; the certificate is the error they carry."""
    dpo, sft = ProblemOptima(make_problem(problem)).values
    return Optima(dpo, sft, TOLERANCE, TOLERANCE)


def equalisation_points(config: PredictionsConfig, runs: pd.DataFrame) -> dict[str, Any]:
    """End points of exact MAXRIGHT by problem, for the figure."""
    exact = runs[(runs["algorithm"] == "maxright") & (runs["variant"] != COUNTED)]
    return {
        name: (end_points(exact[exact["problem"] == name]), convex_optima(name))
        for name in config.problems
    }


def summary(config: PredictionsConfig, results: dict[str, list[Verdict]]) -> dict[str, Any]:
    """What summary.json holds: statements, optima and every verdict."""
    stated = {p.key: {"statement": p.statement, "theorem": p.theorem} for p in config.predictions}
    return {
        "config": asdict(config),
        "predictions": stated,
        "published": SOURCE,
        "optima": {name: convex_optima(name)._asdict() for name in config.problems},
        "verdicts": {source: [asdict(v) for v in row] for source, row in results.items()},
    }


def report(results: dict[str, list[Verdict]]) -> str:
    """The readable table: one block per prediction, a line per source."""
    lines = ["Verdicts (95% one-sided limits of the margin of the claim that decides)"]
    for index, prediction in enumerate(PREDICTIONS):
        lines += ["", f"{prediction.key}  {prediction.statement}"]
        lines += [_line(source, row[index]) for source, row in results.items()]
    return "\n".join([*lines, "", f"{PAPER}: {SOURCE}; no seeds, rounding is the uncertainty"])


def _line(source: str, verdict: Verdict) -> str:
    start = f"  {source:<10} {verdict.outcome:<12}"
    if not verdict.claim:
        return f"{start} {verdict.note}"
    return (
        f"{start} {verdict.margin:+.4f} [{verdict.low:+.4f}, {verdict.high:+.4f}] against "
        f"{verdict.threshold:+.3f}  {verdict.claim}"
    )


def main(argv: list[str] | None = None) -> None:
    sweep_main(PredictionsConfig, argv)


if __name__ == "__main__":
    run_command(main, "python -m theory.predictions")
