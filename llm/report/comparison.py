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
from llm.compare.table import TITLES
from llm.report.page import (
    Html,
    details,
    figure,
    markdown,
    paragraph,
    preformatted,
    section,
    table,
)
from llm.report.record import Data, read_object
from theory.cli import UserError
from theory.plotting.style import LABELS
from theory.records import read_json
from theory.schedulers import ORDERS

SUMMARY, PATHS = "summary.json", "paths.parquet"
TABLE, CONFIG = "table.md", "config.json"
PARTS = {"settings", "forgetting", "failures", "costs", "optima"}
"""What tells the summary of a comparison from that of other experiments."""
INTERVAL = {"mean", "low", "high"}


def is_comparison(folder: Path) -> bool:
    path = folder / SUMMARY
    if path.is_file():
        return read_object(path).keys() >= PARTS
    return any((folder / RUNS).glob(f"*/{RESULT}"))


def title(folder: Path) -> str:
    return f"{folder.resolve().name}: comparison of schedules"


def lead(folder: Path) -> str:
    """One sentence: what was compared on what, and who came out closest to both optima."""
    if not (folder / SUMMARY).is_file():
        return "Training schedules are compared on one problem; the comparison has not finished."
    summary = read_summary(folder)
    names = [LABELS[line] for line in dict.fromkeys(e["line"] for e in summary["settings"])]
    opening = (
        f"{', '.join(names)} were compared on {_problem(summary)} with {summary['steps']} steps "
        f"and {_plural(summary['seeds'], 'seed')} a setting."
    )
    return " ".join([opening, *_winners(summary)])


def unfinished(folder: Path) -> str | None:
    if (folder / SUMMARY).is_file():
        return None
    return (
        f"Unfinished: {len(_results(folder))} runs are kept, and no summary was written. The same "
        "command goes on where it stopped."
    )


def body(folder: Path) -> Iterator[Html]:
    if not (folder / SUMMARY).is_file():
        yield section("Finished runs", _finished_runs(folder))
        return
    summary = read_summary(folder)
    yield section("Objectives and gaps", *_figures(folder, summary))
    table_file = folder / TABLE
    if table_file.is_file():
        _, _, results = table_file.read_text(encoding="utf-8").partition("\n")  # it has a title
        yield section("Results, forgetting, learning rates", markdown(results))
    yield section("Failures", _failures(summary))
    yield from _settings(folder)


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
            knob = f"{'split' if best['line'] in ORDERS else 'lam'} {best['knob']:g}"
            yield (
                f"{TITLES[budget]}: closest to both optima is {LABELS[best['line']]} at {knob}, "
                f"{_interval(best['ideal_distance'])} away{_rivals(best, entries)}."
            )


def _rivals(best: Data, entries: Sequence[Data]) -> str:
    """How many settings are not told apart from the best: their intervals overlap."""
    high = best["ideal_distance"]["high"]
    if not math.isfinite(high):
        return " (one seed: no intervals)"
    others = sum(e["ideal_distance"]["low"] <= high for e in entries if e is not best)
    return f" (the intervals of {_plural(others, 'other setting')} overlap with it)"


def _figures(folder: Path, summary: Data) -> Iterator[Html]:
    paths = folder / PATHS
    if paths.is_file():
        yield figure(
            paths_figure(pd.read_parquet(paths), summary)[0],
            "Losses along the runs at the middle of the grid (thin: seeds, thick: their "
            "mean), and the end points of all settings with 95% intervals. Dotted: the optima.",
        )
    yield figure(
        gaps_figure(summary)[0],
        "Gaps to the optima and the distance to both, against lam or the share of the steps on "
        "DPO; 95% t-intervals over seeds.",
    )
    yield figure(
        compute_figure(summary)[0],
        "Cost of a step against sequential training's, counted and measured; and the distance to "
        "both optima at equal steps and at equal compute.",
    )


def _failures(summary: Data) -> Html:
    if not summary["failures"]:
        return paragraph("No run failed.")
    rows = [(entry["run"], entry["stage"], entry["reason"]) for entry in summary["failures"]]
    return table(("run", "stage", "reason"), rows)


def _settings(folder: Path) -> Iterator[Html]:
    path = folder / CONFIG
    if path.is_file():
        config = read_object(path)
        everything = details("Every recorded setting", table(("setting", "value"), config.items()))
        yield section("Settings", preformatted(config.get("command", "")), everything)


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


def _finished_runs(folder: Path) -> Html:
    rows = [
        (r["name"], r.get("f_dpo"), r.get("f_sft"), r.get("seconds"), r.get("failed") or "")
        for r in _results(folder)
    ]
    return table(("run", "f_DPO", "f_SFT", "seconds", "failed"), rows)


def _interval(interval: Data) -> str:
    half = interval["high"] - interval["mean"]
    tail = f" ± {half:.2g}" if math.isfinite(half) else ""
    return f"{interval['mean']:.3g}{tail}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
