"""The figure of `llm.benchmark`: its document in, Figure out."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from theory.plotting.style import OTHER_COLOURS, STYLE

Lines = list[dict[str, Any]]
SUITE_COLOURS = {
    "dpo": OTHER_COLOURS["wine"],
    "sft": OTHER_COLOURS["cyan"],
    "joint": OTHER_COLOURS["indigo"],
    "cost": OTHER_COLOURS["lilac"],
    "overhead": OTHER_COLOURS["black"],
}
MIB = 1024.0


def benchmark_figure(document: dict[str, Any]) -> Figure:
    """Times against targets, costs against the cost model, memory; empty panels are left out."""
    comparisons: Lines = [line for line in document["comparisons"] if line["what"] == "time"]
    faster = [line for line in comparisons if line["sense"] == "at least"]
    near_one = [line for line in comparisons if line["sense"] != "at least"]
    panels = [
        (faster, _faster),
        (near_one + document["costs"], _near_one),
        (_memory_lines(document["throughput"]), _memory),
    ]
    drawn = [(lines, draw) for lines, draw in panels if lines]
    heights = max((len(lines) for lines, _ in drawn), default=1)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * max(1, len(drawn)), 1.1 + 0.24 * heights))
        figure.set_layout_engine("constrained")
        axes = figure.subplots(1, max(1, len(drawn)), squeeze=False)[0]
        for panel, (lines, draw) in zip(axes, drawn, strict=False):
            draw(panel, lines)
    return figure


def _faster(axes: Axes, lines: Lines) -> None:
    """How many times the time of our trainer; the dotted tick is the target."""
    for row, line in enumerate(lines):
        _point(axes, row, line, SUITE_COLOURS[line["suite"]])
        _target(axes, row, line["target"])
    axes.axvline(1.0, color="0.6", linewidth=0.8)
    axes.set_xlim(0.0, 1.08 * max(max(_end(line), line["target"] or 0.0) for line in lines))
    axes.set_xlabel("times the time of ours (dotted: target)")
    axes.set_title("Time of the others / ours")
    _names(axes, [line["label"] for line in lines])


def _end(line: dict[str, Any]) -> float:
    """Where a line of the figure ends: an interval of few rounds may be without end."""
    median, high = line["median"], line["high"]
    return float(high if high is not None and high <= 3.0 * median else median)


def _near_one(axes: Axes, lines: Lines) -> None:
    """Ratios that should be near 1: the shaded band is the 15% of the cost model."""
    axes.axvspan(0.85, 1.15, color="0.92", linewidth=0.0)
    axes.axvline(1.0, color="0.6", linewidth=0.8)
    names = []
    for row, line in enumerate(lines):
        cost = "ratio" in line
        suite = "cost" if cost else line["suite"]
        _point(axes, row, line["ratio"] if cost else line, SUITE_COLOURS[suite])
        if not cost:
            bounds = [1.0 - line["target"], 1.0 + line["target"]]
            for target in bounds if line["sense"] == "within" else [line["target"]]:
                _target(axes, row, target)
        names.append(f"{_algorithm(line['name'])} / theory" if cost else line["label"])
    axes.set_xlabel("ratio (dotted: bound; band: 15%)")
    axes.set_title("Cost of a step")
    _names(axes, names)


def _memory(axes: Axes, lines: Lines) -> None:
    """Peak of each process; the dark part was there before the model."""
    rows = np.arange(len(lines))
    colours = [SUITE_COLOURS[line["suite"]] for line in lines]
    ours = [1.0 if line["name"].startswith("ours/") else 0.45 for line in lines]
    bars = axes.barh(rows, [line["peak_mib"] / MIB for line in lines], 0.6, color=colours)
    for bar, alpha in zip(bars, ours, strict=True):
        bar.set_alpha(alpha)
    axes.barh(rows, [line["before_mib"] / MIB for line in lines], 0.6, color="0.35")
    axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.set_xlim(0.0, 1.2 * max(line["peak_mib"] for line in lines) / MIB)
    axes.set_xlabel("GiB (dark: before the model)")
    axes.set_title("Peak memory")
    _names(axes, [f"{line['suite']}: {line['name']}" for line in lines])


def _memory_lines(lines: Lines) -> Lines:
    """One bar a contender; of the many on both objectives those of ALRIGHT."""
    return [line for line in lines if line["suite"] != "joint" or "alright" in line["name"]]


def _point(axes: Axes, row: int, ratio: dict[str, Any], colour: str) -> None:
    low, high = ratio["low"], ratio["high"]
    if low is not None and high is not None and 0.0 < low <= high < float("inf"):
        axes.plot([low, high], [row, row], color=colour, linewidth=2.0)
    axes.plot(ratio["median"], row, "o", color=colour, markersize=4.5)


def _target(axes: Axes, row: int, target: float | None) -> None:
    if target is not None:
        axes.plot([target, target], [row - 0.38, row + 0.38], ":", color="black", linewidth=1.4)


def _names(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _algorithm(name: str) -> str:
    """ours/maxright-10 as MAXRIGHT(10)."""
    algo, _, period = name.split("/")[-1].partition("-")
    shown = algo.upper() if algo.endswith("right") else algo
    return f"{shown}({period})" if period else shown
