"""What the commands left under figures/, back as the inputs of the functions that drew it.

The tables of all runs (results.parquet) are not kept; the numbers in the JSON beside every figure
are, and they are enough to draw it again. Each function takes a command's output directory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from theory.gap_experiment import EVEN_SPLIT
from theory.metrics import Interval
from theory.optima import ProblemOptima
from theory.pareto_summary import PLANE
from theory.plotting.style import middle, short_name
from theory.problems import make_problem
from theory.records import read_json
from theory.schedulers import ORDERS
from theory.theorems.pareto import Front, pareto_front

PLANE_FRONT = 41
"""Points of the curve of minimisers in the plane; it is smooth."""


def read(path: Path) -> Any:
    """The JSON in `path`, the infinite ends of an interval (null in JSON) as NaN."""
    return _with_nan(read_json(path))


def _with_nan(data: Any) -> Any:
    if isinstance(data, list):
        return [_with_nan(value) for value in data]
    if not isinstance(data, dict):
        return data
    ends = {"low", "high"} if data.keys() >= {"low", "high"} else set()
    return {k: np.nan if k in ends and v is None else _with_nan(v) for k, v in data.items()}


def gap_inputs(folder: Path) -> tuple[pd.DataFrame, dict[str, Any], float, float]:
    """(groups, references, lam, even split) of `theory.plotting.gap.gap_figure`."""
    record, references = read(folder / "gap.json"), read(folder / "summary.json")["references"]
    return _groups(record), references, middle(record["config"]["lams"]), EVEN_SPLIT


def convergence_inputs(
    folder: Path,
) -> tuple[pd.DataFrame, dict[tuple[str, float, str, str], pd.Series], dict[str, Any], float]:
    """(groups, bounds, limits, lam) of `theory.plotting.convergence.convergence_figure`."""
    record = read(folder / "convergence.json")
    lam, bounds = middle(record["config"]["lams"]), {}
    numbers = pd.DataFrame([n for n in record["panels"] if "bound" in n])
    for (problem, line), rows in numbers.groupby(["problem", "line"], sort=False):
        key = (problem, lam, line.removeprefix("bound of "), "weighted")
        bounds[key] = rows.set_index("step")["bound"]
    return _groups(record), bounds, read(folder / "summary.json")["sequential_limits"], lam


def _groups(record: dict[str, Any]) -> pd.DataFrame:
    """The rows of `theory.sweep.summarise` that the figure shows."""
    fixed = {
        "iterate": "weighted",
        "lam": middle(record["config"]["lams"]),
        "seeds": record["config"]["num_seeds"],
    }
    return pd.DataFrame([row | fixed for row in _rows(record["panels"])])


def _rows(panels: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    rows: dict[tuple[str, str, int, float], dict[str, Any]] = {}
    for number in panels:
        if "mean" not in number:
            continue
        line, order = number["line"], number["line"] in ORDERS
        found = {EVEN_SPLIT if order else np.nan: (number["mean"], number["low"], number["high"])}
        if "best_split" in number:  # of another split at every step: no number of its own
            found[-1.0] = (number["best_split"], np.nan, np.nan)
        for split, interval in found.items():
            key = {"problem": number["problem"], "variant": line, "step": number["step"]}
            key |= {"algorithm": "sequential" if order else line, "split": split}
            row = rows.setdefault((number["problem"], line, number["step"], split), key)
            row[number["metric"]] = Interval(*interval)
    yield from rows.values()


def fronts(folder: Path) -> dict[str, Front]:
    """The certified fronts by problem; where in parameter space is not recorded: theta is empty."""
    certificates = read(folder / "summary.json")["fronts"]
    return {
        panel["problem"]: _front(panel, certificates[panel["problem"]]["largest_certificate"])
        for panel in read(folder / "front.json")["panels"]
        if panel["line"] == "front"
    }


def _front(panel: dict[str, Any], certificate: float) -> Front:
    lams = np.array(panel["lam"])
    return Front(
        lams=lams,
        theta=np.empty((len(lams), 0)),
        losses=np.array(panel["losses"]),
        certificates=np.full(len(lams), certificate),
    )


def overview_inputs(
    folder: Path, problem: str
) -> tuple[list[dict[str, Any]], dict[str, pd.DataFrame], Front, float, float, float]:
    """The arguments of `theory.plotting.pareto.overview_figure` for one problem."""
    record, summary = read(folder / f"overview_{short_name(problem)}.json"), _summary(folder)
    lines = [line for line in summary["lines"] if line["problem"] == problem]
    paths = {
        panel["line"]: pd.DataFrame({key: panel[key] for key in ("step", "f_dpo", "f_sft")})
        for panel in record["panels"]
        if panel.get("panel") == "paths"
    }
    least = summary["fronts"][problem]["least_ideal_distance"]
    steps = {line: path.set_index("step") for line, path in paths.items()}
    return lines, steps, fronts(folder)[problem], least, _middle(summary), EVEN_SPLIT


def plane_inputs(
    folder: Path,
) -> tuple[ProblemOptima, Front, dict[str, dict[str, NDArray[np.float64]]], float]:
    """The arguments of `theory.plotting.pareto.plane_views_figure`; the optima are computed."""
    views: dict[str, dict[str, NDArray[np.float64]]] = {}
    for panel in read(folder / "paths.json")["panels"]:
        views.setdefault(panel["panel"], {})[panel["line"]] = np.array(panel["theta"])
    optima = ProblemOptima(make_problem(PLANE))
    return optima, pareto_front(optima, PLANE_FRONT), views, _middle(_summary(folder))


def _summary(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = read(folder / "summary.json")
    return summary


def _middle(summary: dict[str, Any]) -> float:
    return middle(summary["config"]["lams"])
