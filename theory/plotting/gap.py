"""The figure of the gap experiment."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from theory.compared import line_of
from theory.plotting.style import COLOURS, GAP_NAMES, STYLE, Look, looks
from theory.problems import short_name
from theory.schedulers import ORDERS


def gap_figure(
    groups: pd.DataFrame, references: dict[str, Any], lam: float, even_split: float
) -> tuple[Figure, list[dict[str, Any]]]:
    """G_Mix (top) and G_Max (bottom) against T, one column per problem, and the numbers drawn.

    `best_split` of a number is the mean at the best split of its T, the dashed line.
    """
    rows = groups[(groups["iterate"] == "weighted") & (groups["lam"] == lam)]
    rows = rows.assign(line=line_of(rows))
    lines = looks(rows["line"])
    problems = list(references)
    numbers: list[dict[str, Any]] = []
    with mpl.rc_context(STYLE):
        width = max(3.4, 1.0 + 1.75 * len(problems))
        figure = Figure(figsize=(width, 4.5), layout="constrained")
        axes = figure.subplots(2, len(problems), sharex=True, squeeze=False)
        for column, problem in enumerate(problems):
            table = rows[rows["problem"] == problem]
            limits = references[problem]["lam"][f"{lam:g}"]["sequential_limit"]
            for axis, metric in zip(axes[:, column], GAP_NAMES, strict=True):
                numbers += _draw_panel(axis, table, metric, lines, even_split)
            for order, limit in limits.items():
                axes[0, column].axhline(limit["mix_gap"], color=COLOURS[order], lw=0.8, ls=":")
            axes[0, column].set_title(short_name(problem))
        for axis, name in zip(axes[:, 0], GAP_NAMES.values(), strict=True):
            axis.set_ylabel(name)
        seeds = int(rows["seeds"].max())
        wide = len(problems) > 2
        figure.supxlabel(
            f"training budget $T$ (steps){';  ' if wide else chr(10)}"
            rf"$\lambda$ = {lam:g}, $\alpha$-weighted averages, "
            f"{seeds} seeds, 95% intervals",
            fontsize=8,
        )
        handles, _ = axes[0, 0].get_legend_handles_labels()
        for style, label in (("--", "best split, in hindsight"), (":", "limit of sequential")):
            if style == ":" or lines.keys() & ORDERS.keys():
                handles.append(Line2D([], [], color="0.4", lw=0.9, ls=style, label=label))
        ncols = min(4, len(problems) + 1)  # as many as the figure is wide enough for
        figure.legend(handles=handles, loc="outside upper center", ncols=ncols, columnspacing=1.2)
    return figure, numbers


def _draw_panel(
    axis: Axes, table: pd.DataFrame, metric: str, lines: dict[str, Look], even_split: float
) -> list[dict[str, Any]]:
    numbers = []
    for key, (colour, marker, label) in lines.items():
        sequential = key in ORDERS
        tuned: dict[int, float] = {}
        rows = table[table["line"] == key]
        if sequential:
            tuned = _draw_tuned(axis, rows, metric, colour)
            rows = rows[rows["split"] == even_split]
        rows = rows.sort_values("step")
        mean, low, high = np.array([list(interval) for interval in rows[metric]]).T
        axis.plot(rows["step"], mean, color=colour, marker=marker, label=label)
        # An interval that reaches below 0 has no place on a log axis: cut it a decade down.
        axis.fill_between(
            rows["step"], np.maximum(low, mean / 10), high, color=colour, alpha=0.2, lw=0
        )
        numbers += [
            {"problem": rows["problem"].iloc[0], "metric": metric, "line": key, "step": int(s)}
            | {"mean": m, "low": lo, "high": hi}
            | ({"best_split": tuned[s]} if sequential else {})
            for s, m, lo, hi in zip(rows["step"], mean, low, high, strict=True)
        ]
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.grid(alpha=0.25, lw=0.5)
    return numbers


def _draw_tuned(axis: Axes, rows: pd.DataFrame, metric: str, colour: str) -> dict[int, float]:
    """The best split at each T, chosen in hindsight: what tuning can save of sequential."""
    means = rows.assign(mean=[interval.mean for interval in rows[metric]])
    best = means.groupby("step")["mean"].min()
    axis.plot(best.index, best, color=colour, ls="--", lw=0.9)
    return {int(step): float(mean) for step, mean in best.items()}
