"""Records as tables: a row per run, a row per point of a path; what `theory.predictions` reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from llm.compare.plan import Experiment, tuning_max_value, tuning_value
from llm.compare.runs import Record, Run
from llm.compare.settings import EVEN, CompareConfig
from llm.flags.schedule import options_for
from theory.metrics import ideal_distance, max_value, mix_value, optimality_gaps
from theory.predictions import Optima
from theory.registry import flags_of
from theory.schedulers import ORDERS
from theory.tasks import Task

METRICS = (
    *("f_dpo", "f_sft", "gap_dpo", "gap_sft", "ideal_distance", "f_mix", "f_max"),
    *("rise", "cost_per_step", "cost", "seconds_per_step", "seconds"),
)
"""What is averaged over seeds."""
PREDICTIONS = {"seconds_per_step": "cost"}


def comparison_table(config: CompareConfig, experiment: Experiment) -> pd.DataFrame:
    """One row per budget and run. Losses in nats on the held-out rows.

    `line` is the order of sequential training or the algorithm; `weight` is lam, or the share of
    the steps that a split gives to DPO, and f_mix and f_max are taken at it. `rise` is what the
    loss of a sequence's first objective gained in the second stage. `cost` is in forward passes of
    one SFT step. A run that failed has its reason in `failed` and no numbers.
    """
    rows = [
        _identity(budget, record, config.run.training.schedule) | _numbers(experiment, record)
        for budget, records in experiment.runs.items()
        for record in records
    ]
    return pd.DataFrame(rows)


def weight_of(run: Run) -> float:
    """lam, or the share of the steps that the split gives to DPO; 1/2 without either."""
    options = run.options
    if "split" in options:
        first_is_dpo = ORDERS[run.line][0] == Task.DPO
        return float(options["split"] if first_is_dpo else 1.0 - options["split"])
    return float(options.get("lam", EVEN))


def _identity(budget: str, record: Record, shared: Mapping[str, Any]) -> dict[str, Any]:
    run = Run.from_json(record["run"])
    options = {name: flag.default for name, flag in flags_of(run.algorithm).items()}
    options |= options_for(run.algorithm, {**shared, **run.options})
    return {
        "budget": budget,
        "line": run.line,
        "knob": run.knob,
        "weight": weight_of(run),
        "algorithm": run.algorithm,
        "order": options.get("order", ""),
        "split": options.get("split", np.nan),
        "lam": options.get("lam", np.nan) if run.knob is not None else np.nan,
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "num_steps": run.steps,
        "refresh_every": options.get("refresh_every", np.nan),
        "failed": record["failed"] or "",
    }


def _numbers(experiment: Experiment, record: Record) -> dict[str, Any]:
    if record["failed"]:
        return {}
    run, losses = Run.from_json(record["run"]), [record["f_dpo"], record["f_sft"]]
    gaps, weight = optimality_gaps(losses, experiment.optimum), weight_of(run)
    cost = experiment.costs.total(record)
    counts = {f"{label}_steps": n for label, n in record["steps"].items()}
    counts |= {f"{label}_tokens": n for label, n in record["tokens"].items()}
    return {
        "f_dpo": losses[Task.DPO],
        "f_sft": losses[Task.SFT],
        "gap_dpo": gaps[Task.DPO],
        "gap_sft": gaps[Task.SFT],
        "ideal_distance": float(ideal_distance(losses, experiment.optimum)),
        "f_mix": float(mix_value(losses, weight)),
        "f_max": float(max_value(losses, experiment.optimum, weight)),
        "rise": rise(record),
        "reward_accuracy": record["held_out"].get("dpo_reward_accuracy", np.nan),
        **counts,
        "p_dpo": record["steps"]["dpo"] / run.steps,
        "probes": record["probes"],
        "cost": cost,
        "cost_per_step": cost / run.steps,
        "seconds": record["seconds"],
        "seconds_per_step": record["seconds"] / run.steps,
    }


def rise(record: Record) -> float:
    """f of the first objective at the end, less its value when its stage ended; else NaN."""
    line, stage_end = record["run"]["line"], record["stage_end"]
    if line not in ORDERS or stage_end is None:
        return np.nan
    name = f"f_{ORDERS[line][0].label}"
    return float(record[name] - stage_end[name])


def paths_table(experiment: Experiment) -> pd.DataFrame:
    """Held-out losses along every run of the comparison, and what had been spent by then."""
    return pd.DataFrame(
        _identity(budget, record, {}) | point
        for budget, records in experiment.runs.items()
        for record in records
        for point in record.get("path", ())
    )


def tuning_table(experiment: Experiment) -> pd.DataFrame:
    """Every run of the first two stages; of a run on one objective also its lowest loss."""
    return pd.DataFrame(_tuning_rows(experiment))


def _tuning_rows(experiment: Experiment) -> Iterator[dict[str, Any]]:
    for stage, records in (("optima", experiment.singles), ("tuning", experiment.tuning)):
        for record in records:
            run = Run.from_json(record["run"])
            row = {"stage": stage, "line": run.line, "learning_rate": run.learning_rate}
            row |= {"seed": run.seed, "failed": record["failed"] or ""}
            if not record["failed"]:
                row |= {name: record[name] for name in ("f_dpo", "f_sft")}
                row |= {"f_mix": tuning_value(record)}
                row |= {"f_max": tuning_max_value(record, experiment.optimum)}
                for task in Task:
                    row[f"lowest_f_{task.label}"] = min(
                        point[f"f_{task.label}"] for point in record["path"]
                    )
            yield row


def predictions_table(results: pd.DataFrame, budget: str = "steps") -> pd.DataFrame:
    """The finished runs of one budget as `theory.predictions` reads them.

    `cost` is the measured time of a step there: P6 holds it against the counted one.
    """
    rows = results[(results["budget"] == budget) & (results["failed"] == "")]
    names = ["algorithm", "order", "split", "lam", "seed", "f_dpo", "f_sft", "p_dpo"]
    names += ["refresh_every", "seconds_per_step"]
    return rows[names].rename(columns=PREDICTIONS).reset_index(drop=True)


def predictions_optima(summary: dict[str, Any]) -> Optima:
    """The optima; each may be too high by as much as a run undercut it."""
    optima = summary["optima"]
    errors = (optima["undercut"][task.label]["most"] for task in Task)
    return Optima(optima["dpo"], optima["sft"], *errors)
