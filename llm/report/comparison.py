"""The page of a comparison: its own table and figures, the tuning, the failures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from llm.compare.figures import compute_figure, gaps_figure, paths_figure
from llm.compare.plan import HELD_OUT
from llm.compare.pool import RESULT
from llm.compare.settings import RUNS
from llm.compare.table import TITLES, knob, preamble, tables
from llm.report.page import drawn
from llm.report.record import Data, read_object
from theory.cli import UserError
from theory.plotting.style import label
from theory.records import read_json

TEMPLATE = "comparison.html.jinja"
SUMMARY, PATHS, CONFIG = "summary.json", "paths.parquet", "config.json"
PARTS = {"settings", "forgetting", "failures", "costs", "optima"}
"""What tells the summary of a comparison from that of other experiments."""
INTERVAL = {"mean", "low", "high"}


def is_comparison(folder: Path) -> bool:
    path = folder / SUMMARY
    if path.is_file():
        return read_object(path).keys() >= PARTS
    return any((folder / RUNS).glob(f"*/{RESULT}"))


def content(folder: Path) -> Data:
    """What the template shows; without a summary, the runs that are kept."""
    found: Data = {"title": f"{folder.resolve().name}: comparison of schedules", "summary": None}
    if not (folder / SUMMARY).is_file():
        return found | _unfinished(folder)
    summary = read_summary(folder)
    config, paths = folder / CONFIG, folder / PATHS
    runs = pd.read_parquet(paths) if paths.is_file() else None
    return found | {
        "summary": summary,
        "lead": lead(summary),
        "unfinished": None,
        "paths": None if runs is None else drawn(paths_figure(runs, summary)[0]),
        "gaps": drawn(gaps_figure(summary)[0]),
        "compute": drawn(compute_figure(summary)[0]),
        "preamble": preamble(summary),
        "tables": tables(summary),
        "failures": [(e["run"], e["stage"], e["reason"]) for e in summary["failures"]],
        "config": read_object(config) if config.is_file() else None,
    }


def _unfinished(folder: Path) -> Data:
    results = _results(folder)
    return {
        "lead": "Training schedules are compared on one problem; the comparison has not finished.",
        "unfinished": f"Unfinished: {len(results)} runs are kept, and no summary was written. The "
        "same command goes on where it stopped.",
        "finished": [
            (r["name"], r.get("f_dpo"), r.get("f_sft"), r.get("seconds"), r.get("failed") or "")
            for r in results
        ],
    }


def lead(summary: Data) -> str:
    """One sentence: what was compared on what, and who came out closest to both optima."""
    names = [label(line) for line in dict.fromkeys(e["line"] for e in summary["settings"])]
    opening = (
        f"{', '.join(names)} were compared on {_problem(summary)} with {summary['steps']} steps "
        f"and {_plural(summary['seeds'], 'seed')} a setting."
    )
    return " ".join([opening, *_winners(summary)])


def read_summary(folder: Path) -> Data:
    """The summary as it was before JSON took its NaN: an interval of one seed has no ends."""
    summary: Data = _with_nan(read_object(folder / SUMMARY))
    return {"measured_on": HELD_OUT} | summary


def _with_nan(data: Any) -> Any:
    if isinstance(data, list):
        return [_with_nan(each) for each in data]
    if not isinstance(data, dict):
        return data
    if data.keys() >= INTERVAL:
        return {name: math.nan if value is None else value for name, value in data.items()}
    return {name: _with_nan(value) for name, value in data.items()}


def _problem(summary: Data) -> str:
    name = str(summary["problem"])
    return "the embedded problem" if name == "embedded" else name


def _winners(summary: Data) -> Iterator[str]:
    for budget in dict.fromkeys(entry["budget"] for entry in summary["settings"]):
        entries = [
            entry
            for entry in summary["settings"]
            if entry["budget"] == budget and entry["ideal_distance"] is not None
        ]
        if entries:
            best = min(entries, key=lambda entry: entry["ideal_distance"]["mean"])
            where = f"{label(best['line'])} at {knob(best['line'], best['knob'])}"
            yield (
                f"{TITLES[budget]}: closest to both optima is {where}, "
                f"{_interval(best['ideal_distance'])} away{_rivals(best, entries)}."
            )


def _rivals(best: Data, entries: Sequence[Data]) -> str:
    """How many settings are not told apart from the best: their intervals overlap."""
    high = best["ideal_distance"]["high"]
    if not math.isfinite(high):
        return " (one seed: no intervals)"
    others = sum(e["ideal_distance"]["low"] <= high for e in entries if e is not best)
    return f" (the intervals of {_plural(others, 'other setting')} overlap with it)"


def _results(folder: Path) -> list[Data]:
    records = []
    for path in sorted((folder / RUNS).glob(f"*/{RESULT}")):
        try:
            records.append({"name": path.parent.name.rsplit("-", 1)[0], **read_json(path)})
        except (OSError, ValueError, TypeError):
            continue  # not of ours
    if not records:
        raise UserError(f"{folder / RUNS} holds no result that can be read")
    return records


def _interval(interval: Data) -> str:
    half = interval["high"] - interval["mean"]
    tail = f" ± {half:.2g}" if math.isfinite(half) else ""
    return f"{interval['mean']:.3g}{tail}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
