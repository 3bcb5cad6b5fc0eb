"""Figures of the Pareto experiment: end points and front, the overview, paths in the plane."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from theory.metrics import mix_value
from theory.optima import ProblemOptima
from theory.plotting.style import STYLE, Look, looks
from theory.problems import short_name
from theory.schedulers import ORDERS
from theory.theorems.pareto import Front

Numbers = list[dict[str, Any]]

GAPS = {
    "delta_dpo": r"$\delta_{\mathrm{DPO}}$",
    "delta_sft": r"$\delta_{\mathrm{SFT}}$",
    "ideal_distance": "ideal\ndistance",
}
COSTS = {"dpo_gradients": "DPO grad.", "sft_gradients": "SFT grad.", "probes": "probes of both"}
HATCHES = {"dpo_gradients": "", "sft_gradients": "////", "probes": "xxxx"}


def front_figure(
    lines: list[dict[str, Any]], fronts: Mapping[str, Front]
) -> tuple[Figure, Numbers]:
    """Mean end points (weighted average) of every line over its knob, one panel per problem."""
    numbers: Numbers = []
    shown = looks(record["line"] for record in lines)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(3.4, 0.5 + 1.75 * len(fronts)), 2.6), layout="constrained")
        axes = figure.subplots(1, len(fronts), squeeze=False)[0]
        for axis, (problem, front) in zip(axes, fronts.items(), strict=True):
            numbers += _draw_front(axis, front, problem)
            for record in lines:
                if (record["problem"], record["iterate"]) == (problem, "weighted"):
                    numbers.append({key: record[key] for key in ("problem", "line", "points")})
                    _draw_end_points(axis, record, shown[record["line"]])
            axis.set_title(short_name(problem))
            axis.set_xlabel(r"$f_{\mathrm{DPO}}$")
        axes[0].set_ylabel(r"$f_{\mathrm{SFT}}$")
        ncols = 4 if len(fronts) > 2 else 2
        handles = [*_line_handles(shown, ends=True), *_front_handles()]
        figure.legend(handles=handles, loc="outside upper center", ncols=ncols)
    return figure, numbers


def _draw_front(axis: Axes, front: Front, problem: str) -> Numbers:
    axis.plot(*front.losses.T, color="0.35", lw=1.0, zorder=1)
    axis.plot(*front.ideal, color="black", marker="*", ms=7, ls="", zorder=4)
    axis.grid(alpha=0.25, lw=0.5)
    curve = {"lam": front.lams.tolist(), "losses": front.losses.tolist()}
    return [{"problem": problem, "line": "front", **curve, "ideal": front.ideal.tolist()}]


def _draw_end_points(axis: Axes, record: dict[str, Any], look: Look) -> None:
    x, y = (
        np.array([list(point[loss].values()) for point in record["points"]])
        for loss in ("f_dpo", "f_sft")
    )
    errors = [np.abs(z[:, 1:] - z[:, :1]).T for z in (x, y)]
    if np.all(np.isfinite(errors)):
        bars = {"xerr": errors[0], "yerr": errors[1], "elinewidth": 0.7}
        axis.errorbar(x[:, 0], y[:, 0], **bars, color=look.colour, fmt="none", zorder=2)
    fill = _fill(record["line"], look)
    axis.plot(
        x[:, 0], y[:, 0], color=look.colour, marker=look.marker, ls="", ms=4, mfc=fill, zorder=3
    )


def _fill(name: str, look: Look) -> str:
    return look.colour if name in ORDERS else "white"


def _line_handles(shown: Mapping[str, Look], *, ends: bool = False) -> list[Line2D]:
    """Legend entries: of lines with a marker, or of end points alone."""
    style: dict[str, dict[str, Any]] = {
        name: {"ls": "", "mfc": _fill(name, look)} if ends else {} for name, look in shown.items()
    }
    return [
        Line2D([], [], color=look.colour, marker=look.marker, ms=4, label=look.label, **style[name])
        for name, look in shown.items()
    ]


def _front_handles() -> list[Line2D]:
    return [
        Line2D([], [], color="0.35", lw=1.0, label="Pareto front"),
        Line2D([], [], color="black", marker="*", ms=7, ls="", label="ideal point"),
    ]


def overview_figure(
    lines: list[dict[str, Any]],
    paths: Mapping[str, pd.DataFrame],
    front: Front,
    least_distance: float,
    lam: float,
    even_split: float,
) -> tuple[Figure, Numbers]:
    """The layout of the first figure of arXiv 2410.15483, at one lam and the even split.

    (a) paths of the last iterate in objective space, means over seeds; (b) gaps of the last
    iterate with 95% intervals and the least possible ideal distance; (c) evaluations per step, and
    on top of each bar its cost in forward passes of one SFT sequence (`theory.costs`).
    """
    points = {
        record["line"]: next(
            point
            for point in record["points"]
            if point["knob"] == (even_split if record["line"] in ORDERS else lam)
        )
        for record in lines
        if record["iterate"] == "last"
    }
    problem, shown = lines[0]["problem"], looks(points)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.7), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1.25, 1.0))
        numbers = _draw_front(left, front, problem)
        for name, path in paths.items():
            colour, marker, _ = shown[name]
            left.plot(path["f_dpo"], path["f_sft"], color=colour, lw=1.1, zorder=2)
            end = path.iloc[-1]
            left.plot(end["f_dpo"], end["f_sft"], color=colour, marker=marker, ms=5)
            steps = path.reset_index().to_dict(orient="list")
            numbers.append({"problem": problem, "panel": "paths", "line": name, **steps})
        left.set(xlabel=r"$f_{\mathrm{DPO}}$", ylabel=r"$f_{\mathrm{SFT}}$")
        left.set_title(f"(a) paths, {short_name(problem)}")
        _draw_gaps(middle, points, shown, least_distance)
        _draw_costs(right, points, shown)
        handles = [*_line_handles(shown), *_front_handles()]
        figure.legend(handles=handles, loc="outside upper center", ncols=7,
                      columnspacing=0.9, handlelength=1.4)  # fmt: skip
    numbers += [{"problem": problem, "line": name, **point} for name, point in points.items()]
    return figure, numbers


def _draw_gaps(
    axis: Axes, points: Mapping[str, Any], shown: Mapping[str, Look], least_distance: float
) -> None:
    width = 0.8 / len(points)
    for column, gap in enumerate(GAPS):
        for i, (name, point) in enumerate(points.items()):
            mean, low, high = point[gap].values()
            place = column + (i - (len(points) - 1) / 2) * width
            axis.bar(place, mean, width, color=shown[name].colour)
            if np.isfinite(high):
                axis.plot([place, place], [low, high], color="black", lw=0.8)
    end = len(GAPS) - 1
    span, level = [end - 0.45, end + 0.45], [least_distance] * 2
    axis.plot(span, level, color="0.2", ls="--", lw=1.0, label="least possible distance")
    axis.set_ylim(0.0, 1.2 * axis.get_ylim()[1])  # room for the legend
    axis.legend(loc="upper left", fontsize=7)
    axis.set_xticks(range(len(GAPS)), list(GAPS.values()))
    axis.set_title("(b) gaps after training")


def _draw_costs(axis: Axes, points: Mapping[str, Any], shown: Mapping[str, Look]) -> None:
    for i, (name, point) in enumerate(points.items()):
        bottom = 0.0
        for part, hatch in HATCHES.items():
            height = point["cost"][part]
            colour = shown[name].colour
            axis.bar(i, height, 0.7, bottom=bottom, color=colour, hatch=hatch, ec="white")
            bottom += height
        total = point["cost"]["cost_per_step"]
        axis.text(i, bottom + 0.04, f"{total:.3g}", ha="center", va="bottom", fontsize=7)
    handles = [
        mpl.patches.Patch(fc="0.6", ec="white", hatch=HATCHES[part], label=label)
        for part, label in COSTS.items()
    ]
    axis.legend(handles=handles, loc="upper left", fontsize=7, ncols=1)
    axis.set_ylim(0, 3.6)
    axis.set_xticks(range(len(points)), [shown[name].label for name in points], rotation=35,
                    ha="right", rotation_mode="anchor", fontsize=7)  # fmt: skip
    axis.set_ylabel("evaluations per step")
    axis.set_title("(c) cost per step")


def plane_figure(
    optima: ProblemOptima,
    front: Front,
    paths: Mapping[str, NDArray[np.float64]],
    lam: float,
) -> tuple[Figure, Numbers]:
    """Paths of the last iterate over the contours of G_Mix: one seed, and the mean over seeds.

    `paths` maps a line to (steps, seeds, 2). The grey curve joins the minimisers of f_Mix over lam.
    """
    seeds = next(iter(paths.values())).shape[1]
    views = {
        "one run": {name: path[:, 0] for name, path in paths.items()},
        f"mean of {seeds} runs": {name: path.mean(axis=1) for name, path in paths.items()},
    }
    return plane_views_figure(optima, front, views, lam)


def plane_views_figure(
    optima: ProblemOptima,
    front: Front,
    views: Mapping[str, Mapping[str, NDArray[np.float64]]],
    lam: float,
) -> tuple[Figure, Numbers]:
    """The same from the two views, the first of one run: title to line to path, (steps, 2)."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.6, 3.5), layout="constrained")
        axes = figure.subplots(1, 2, sharex=True, sharey=True)
        one_run = next(iter(views.values()))
        shown = looks(one_run)
        everything = np.concatenate([*one_run.values(), front.theta])
        low, high = everything.min(axis=0) - 0.25, everything.max(axis=0) + 0.25
        for axis, (title, view) in zip(axes, views.items(), strict=True):
            _draw_contours(axis, optima, lam, low, high)
            axis.plot(*front.theta.T, color="0.35", lw=1.2)
            for name, path in view.items():
                colour, marker, _ = shown[name]
                axis.plot(*path.T, color=colour, lw=1.0)
                axis.plot(*path[-1], color=colour, marker=marker, ms=5, mec="white")
            _mark_minimisers(axis, optima, lam)
            axis.set_title(title)
            axis.set_xlabel(r"$\theta_1$")
        axes[0].set_ylabel(r"$\theta_2$")
        handles = _line_handles(shown)
        handles.append(Line2D([], [], color="0.35", lw=1.2, label=r"minimisers over $\lambda$"))
        figure.legend(handles=handles, loc="outside upper center", ncols=6, columnspacing=0.9,
                      handlelength=1.4)  # fmt: skip
    numbers = [
        {"panel": title, "line": name, "theta": path.tolist()}
        for title, view in views.items()
        for name, path in view.items()
    ]
    return figure, numbers


def _draw_contours(
    axis: Axes,
    optima: ProblemOptima,
    lam: float,
    low: NDArray[np.float64],
    high: NDArray[np.float64],
) -> None:
    """Contours of G_Mix at levels that grow geometrically."""
    x, y = (np.linspace(a, b, 121) for a, b in zip(low, high, strict=True))
    points = np.stack(np.meshgrid(x, y), axis=-1)
    gap = mix_value(optima.problem.losses(points), lam) - optima.mix(lam).value
    levels = gap.max() * 2.0 ** np.arange(-9.0, 0.0)
    axis.contour(x, y, gap, levels=levels, colors="0.75", linewidths=0.5)


def _mark_minimisers(axis: Axes, optima: ProblemOptima, lam: float) -> None:
    marks = {
        r"$\theta^*_{\mathrm{DPO}}$": optima.single[0].theta,
        r"$\theta^*_{\mathrm{SFT}}$": optima.single[1].theta,
        r"$\theta^*_{\mathrm{Mix}}$": optima.mix(lam).theta,
    }
    for label, theta in marks.items():
        axis.plot(*theta, color="black", marker="*", ms=8, mec="white", zorder=5)
        x, y = theta
        note = axis.annotate(label, (x, y), xytext=(6, 6), textcoords="offset points", zorder=6)
        note.set_bbox({"fc": "white", "ec": "none", "alpha": 0.7, "pad": 0.5})
