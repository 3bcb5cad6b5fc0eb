"""Figures of the convergence experiment: measured curves with their bounds, and slopes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from theory.plotting.style import COLOURS, GAP_NAMES, MARKERS, STYLE, Look, label, looks
from theory.problems import short_name

Numbers = list[dict[str, Any]]


MAX_LINES = {
    # Staleness darkens MAXRIGHT's colour; noisy values have colours of their own.
    "exact": Look(COLOURS["maxright"], MARKERS["maxright"], "exact"),
    "stale k=10": Look("#A9568A", "s", "$k=10$"),
    "stale k=100": Look("#7B2F63", "v", "$k=100$"),
    "stale k=inf": Look("#40102F", "X", "$k=T$"),
    "same": Look("#56B4E9", "P", "same batch"),
    "fresh": Look("#222222", "o", "fresh batch"),
    "fresh EMA": Look("#8C8C8C", "^", "fresh, averaged"),
}
UNSCALED = " unscaled"
"""Ends the names of MAXRIGHT's methods whose steps are not scaled by w_i: in the slopes only."""
BOUNDED = {"mix_gap": ("alright", "bound of ALRIGHT"), "max_gap": ("exact", "bound of MAXRIGHT")}
"""The line whose bound is drawn."""

FOREST_MARKS = {"last": "^", "uniform": "s", "weighted": "o"}
FOREST_COLOURS = {"last": "#D55E00", "uniform": "#56B4E9", "weighted": "#000000"}


def convergence_figure(
    groups: pd.DataFrame,
    bounds: Mapping[tuple[str, float, str, str], pd.Series],
    limits: dict[str, Any],
    lam: float,
) -> tuple[Figure, Numbers]:
    """G_Mix (top) and G_Max (bottom) of the weighted average against T, one column per problem.

    Bands are 95% intervals over seeds; dashed lines are bounds, dotted ones sequential limits.
    """
    rows = groups[(groups["iterate"] == "weighted") & (groups["lam"] == lam)]
    problems, numbers, shown = list(limits), [], lines(rows["variant"])
    with mpl.rc_context(STYLE):
        width = max(3.4, 1.0 + 1.75 * len(problems))
        figure = Figure(figsize=(width, 2.45 * len(shown)), layout="constrained")
        halves = cast(
            "list[SubFigure]", list(figure.subfigures(len(shown), 1, squeeze=False)[:, 0])
        )
        for half, (metric, own) in zip(halves, shown.items(), strict=True):
            axes = half.subplots(1, len(problems), sharex=True, squeeze=False)[0]
            for axis, problem in zip(axes, problems, strict=True):
                numbers += _draw_curves(axis, rows[rows["problem"] == problem], metric, own)
                bounded = BOUNDED[metric][0]
                if bounded in own:
                    curve = bounds[problem, lam, bounded, "weighted"]
                    axis.plot(curve, color=own[bounded].colour, ls="--", lw=1.0)
                    numbers += [
                        {"problem": problem, "metric": metric, "line": f"bound of {bounded}"}
                        | {"step": int(step), "bound": value}
                        for step, value in curve.items()
                    ]
                if metric == next(iter(shown)):
                    axis.set_title(short_name(problem))
                if metric == "mix_gap":
                    for order, limit in limits[problem][f"{lam:g}"].items():
                        axis.axhline(limit["mix_gap"], color=COLOURS[order], lw=0.8, ls=":")
            axes[0].set_ylabel(GAP_NAMES[metric])
            half.legend(
                handles=_legend(metric, own),
                loc="outside upper center",
                ncols=4 if len(problems) > 2 else 2,
                columnspacing=1.2,
                handlelength=1.8,
            )
        figure.supxlabel(
            f"steps $T${';  ' if len(problems) > 2 else chr(10)}"
            rf"$\lambda$ = {lam:g}, $\alpha$-weighted averages, "
            f"{int(rows['seeds'].max())} seeds, 95% intervals",
            fontsize=8,
        )
    return figure, numbers


def lines(variants: Iterable[str]) -> dict[str, dict[str, Look]]:
    """What is drawn of the methods named, by metric: MAXRIGHT's for G_Max, the others for G_Mix."""
    names = [name for name in dict.fromkeys(variants) if not name.endswith(UNSCALED)]
    shown = {
        "mix_gap": looks(name for name in names if name not in MAX_LINES),
        "max_gap": {name: look for name, look in MAX_LINES.items() if name in names},
    }
    return {metric: own for metric, own in shown.items() if own}


def _legend(metric: str, own: Mapping[str, Look]) -> list[Line2D]:
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, label=look.label)
        for look in own.values()
    ]
    name, text = BOUNDED[metric]
    if name in own:
        handles.append(Line2D([], [], color=own[name].colour, ls="--", lw=1.0, label=text))
    return handles


def _draw_curves(axis: Axes, table: pd.DataFrame, metric: str, own: Mapping[str, Look]) -> Numbers:
    numbers = []
    for name, look in own.items():
        rows = table[table["variant"] == name].sort_values("step")
        steps = rows["step"].to_numpy()
        mean, low, high = np.array([list(interval) for interval in rows[metric]]).T
        axis.plot(steps, mean, color=look.colour, marker=look.marker, label=look.label, lw=1.1)
        # A band that reaches 0 has no place on a logarithmic axis: it ends a decade below.
        axis.fill_between(
            steps, np.maximum(low, mean / 10), high, color=look.colour, alpha=0.22, lw=0
        )
        numbers += [
            {"problem": rows["problem"].iloc[0], "metric": metric, "line": name, "step": int(s)}
            | {"mean": m, "low": lo, "high": hi}
            for s, m, lo, hi in zip(steps, mean, low, high, strict=True)
        ]
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.grid(alpha=0.25, lw=0.5)
    return numbers


def slopes_figure(rates: list[dict[str, Any]], lam: float) -> tuple[Figure, Numbers]:
    """Forest plot: slope and bootstrap interval of every method and iterate, with its bound's.

    A tick in the colour of the iterate marks the slope of its bound, where a theorem gives one.
    """
    rates = [rate for rate in rates if rate["lam"] == lam]
    problems = list(dict.fromkeys(rate["problem"] for rate in rates))
    names = list(dict.fromkeys(rate["method"] for rate in rates))
    with mpl.rc_context(STYLE):
        width = max(3.4, 1.6 + 1.4 * len(problems))
        figure = Figure(figsize=(width, 0.6 + 0.24 * len(names)), layout="constrained")
        axes = figure.subplots(1, len(problems), sharey=True, squeeze=False)[0]
        for axis, problem in zip(axes, problems, strict=True):
            for rate in rates:
                if rate["problem"] == problem:
                    _draw_slope(axis, names.index(rate["method"]), rate)
            axis.axvline(0.0, color="0.6", lw=0.6)
            axis.set_title(short_name(problem))
            axis.set_xlabel("slope")
            axis.grid(axis="x", alpha=0.25, lw=0.5)
        axes[0].set_yticks(range(len(names)), [_method_label(name) for name in names])
        axes[0].set_ylim(len(names) - 0.5, -0.5)
        figure.legend(handles=_forest_legend(), loc="outside upper center", ncols=4)
    return figure, [{**rate} for rate in rates]


def _draw_slope(axis: Axes, row: int, rate: dict[str, Any]) -> None:
    iterate = rate["iterate"]
    place = row + 0.24 * (list(FOREST_MARKS).index(iterate) - 1)
    slope, colour = rate["slope"], FOREST_COLOURS[iterate]
    if np.isfinite(slope["low"]):
        axis.plot([slope["low"], slope["high"]], [place, place], color=colour, lw=1.0)
    axis.plot(slope["mean"], place, color=colour, marker=FOREST_MARKS[iterate], ms=2.8)
    if rate["bound_slope"] is not None:
        axis.plot(rate["bound_slope"], place, color=colour, marker="|", ms=5, mew=1.2)


def _method_label(name: str) -> str:
    base = name.removesuffix(UNSCALED)
    if base not in MAX_LINES:
        return label(name)
    return f"{'MAXRIGHT' if base == name else 'unscaled'}: {MAX_LINES[base].label}"


def _forest_legend() -> list[Line2D]:
    handles = [
        Line2D([], [], color=FOREST_COLOURS[iterate], marker=mark, lw=1.0, label=iterate)
        for iterate, mark in FOREST_MARKS.items()
    ]
    return [*handles, Line2D([], [], color="0.3", marker="|", ls="", ms=6, label="bound")]
