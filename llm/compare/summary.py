"""The numbers of the table and the figures: means with 95% t-intervals over seeds, and warnings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from llm.compare.plan import Experiment, tuned_values, tuning_max_value
from llm.compare.results import METRICS
from llm.compare.runs import Record, Run
from llm.compare.settings import EVEN, CompareConfig
from theory.metrics import mean_interval
from theory.schedulers import ORDERS
from theory.tasks import Task

Summary = dict[str, Any]
SETTING = ["budget", "line", "knob", "weight", "learning_rate", "num_steps"]


def summarise(config: CompareConfig, experiment: Experiment, results: pd.DataFrame) -> Summary:
    summary = {
        "problem": config.run.model.model_name_or_path or "embedded",
        "steps": experiment.steps,
        "measured_on": experiment.measured_on,
        "seeds": len(config.seeds),
        "optima": _optima(config, experiment, results),
        "tuning": _tuning(config, experiment),
        "costs": experiment.costs.to_json(),
        "settings": list(_settings(results)),
        "forgetting": list(_forgetting(results, experiment)),
        "failures": _failures(experiment),
    }
    return summary | {"warnings": list(_warnings(config, summary))}


def _optima(config: CompareConfig, experiment: Experiment, results: pd.DataFrame) -> Summary:
    """f*, and by how much runs of the comparison came out below it."""
    dpo, sft = experiment.optimum
    file = config.run.training.optima
    rows = experiment.measured_on
    source = f"the lowest {rows} loss along runs on one objective, every learning rate"
    return {
        "dpo": dpo,
        "sft": sft,
        "source": source if experiment.singles else file,
        "undercut": {task.label: _undercut(results, f"gap_{task.label}") for task in Task},
    }


def _undercut(results: pd.DataFrame, gap: str) -> Summary:
    below = -results[gap].dropna()
    return {"runs": int((below > 0.0).sum()), "most": max(float(below.max()), 0.0)}


def _tuning(config: CompareConfig, experiment: Experiment) -> Summary:
    """What every rate reached, and what would have won without `least_progress`."""
    lines = {}
    for line in config.lines if experiment.tuning else ():
        values = tuned_values(experiment.tuning, line)
        best = min(values, key=lambda rate: values[rate])
        lines[line] = {
            "f_mix": {f"{rate:g}": value for rate, value in values.items()},
            "any_rate": best,
            "f_max": {
                f"{rate:g}": fmean(
                    tuning_max_value(record, experiment.optimum)
                    for record in experiment.tuning
                    if Run.from_json(record["run"]).line == line
                    and record["run"]["learning_rate"] == rate
                )
                for rate in values
            },
        }
    return {
        "criterion": f"lowest mean {experiment.measured_on} f_Mix({EVEN}) at the end, at lam or "
        f"split {EVEN}",
        "least_progress": config.least_progress if experiment.progress else None,
        "progress": {f"{rate:g}": share for rate, share in experiment.progress.items()},
        "chosen": experiment.rates,
        "lines": lines,
    }


def _settings(results: pd.DataFrame) -> Iterator[Summary]:
    """One entry per budget, line and knob, in the order of the table."""
    for keys, rows in results.groupby(SETTING, sort=False, dropna=False):
        finished = rows[rows["failed"] == ""]
        entry: Summary = dict(zip(SETTING, keys, strict=True))
        entry["knob"] = None if np.isnan(entry["knob"]) else entry["knob"]
        entry |= {"seeds": len(finished), "failed": len(rows) - len(finished)}
        for name in METRICS:
            values = finished[name].dropna() if name in finished else pd.Series(dtype=float)
            entry[name] = mean_interval(values)._asdict() if len(values) else None
        yield entry


def _forgetting(results: pd.DataFrame, experiment: Experiment) -> Iterator[Summary]:
    """What the second stage of a sequence costs the first objective."""
    sequences = results[results["line"].isin(ORDERS) & (results["failed"] == "")]
    for (budget, order, split), rows in sequences.groupby(["budget", "line", "split"], sort=False):
        if rows["rise"].isna().any():
            continue
        first = ORDERS[order][0].label
        final = rows[f"f_{first}"].to_numpy()
        interval = mean_interval(rows["rise"])
        yield {
            "budget": budget,
            "order": order,
            "split": split,
            "objective": first,
            "after_first_stage": mean_interval(final - rows["rise"])._asdict(),
            "after_second_stage": mean_interval(final)._asdict(),
            "rise": interval._asdict(),
            "in_half_widths": _ratio(interval.mean, interval.mean - interval.low),
        }


def _ratio(mean: float, half_width: float) -> float | None:
    return mean / half_width if np.isfinite(half_width) and half_width > 0.0 else None


def _failures(experiment: Experiment) -> list[Summary]:
    groups: dict[str, Sequence[Record]] = {
        "optima": experiment.singles,
        "tuning": experiment.tuning,
        **experiment.runs,
    }
    return [
        {"stage": stage, "run": Run.from_json(record["run"]).label, "reason": record["failed"]}
        for stage, records in groups.items()
        for record in records
        if record["failed"]
    ]


def _warnings(config: CompareConfig, summary: Summary) -> Iterator[str]:
    yield from _rate_warnings(config, summary["tuning"])
    for label, undercut in summary["optima"]["undercut"].items():
        if undercut["runs"]:
            yield (
                f"{undercut['runs']} runs ended below f_{label.upper()}*, by up to "
                f"{undercut['most']:.2g}: the estimate is too high"
            )
    if summary["failures"]:
        yield f"{len(summary['failures'])} runs failed; see failures in summary.json"
    if len(config.seeds) < 2:
        yield "one seed: no intervals"


def _rate_warnings(config: CompareConfig, tuning: Summary) -> Iterator[str]:
    """Rates that could still be better outside of the grid, or outside of what is allowed."""
    ends = (config.learning_rates[0], config.learning_rates[-1])
    for line, tuned in tuning["lines"].items():
        rate, best = tuning["chosen"][line], tuned["any_rate"]
        if rate in ends:
            yield f"{line}: the best learning rate {rate:g} is at the border of the grid"
        if best != rate:
            yield (
                f"{line}: f_Mix({EVEN}) is {tuned['f_mix'][f'{rate:g}']:.4f} at the chosen rate "
                f"{rate:g} and {tuned['f_mix'][f'{best:g}']:.4f} at {best:g}, which alone takes an "
                f"objective only {tuning['progress'][f'{best:g}']:.0%} of the way to f*"
            )
    progress = tuning["progress"].values()
    if progress and max(progress) < config.least_progress:
        yield "no learning rate takes both objectives far enough: --least_progress was not applied"
