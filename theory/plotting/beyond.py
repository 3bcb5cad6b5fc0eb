"""Figures of the experiments beyond the paper: summaries in, Figure and the numbers drawn out.

Style, colours and labels are those of `theory.plotting.style`.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_lowercase
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from theory.plotting.style import (
    COLOURS,
    GAP_NAMES,
    LABELS,
    MARKERS,
    OTHER_ALGORITHMS,
    OTHER_COLOURS,
    STYLE,
    Look,
    looks,
)
from theory.problems import short_name

STYLED = mpl.rc_context(STYLE)
"""Decorates a figure: its style holds while it is drawn, and nowhere else."""
Numbers = list[dict[str, Any]]
Summary = dict[str, Any]

GREY = "0.45"
RULE_STYLES = {
    "none": (OTHER_COLOURS["black"], "o", "SGD"),
    "adam": (OTHER_COLOURS["indigo"], "s", "Adam"),
    "adam, beta2=0.95": (OTHER_COLOURS["cyan"], "D", r"Adam, $\beta_2=0.95$"),
    "clip 3": (OTHER_COLOURS["wine"], "v", "clip 3"),
    "clip 3 + adam": (OTHER_COLOURS["lilac"], "^", "clip 3, Adam"),
}
SOURCE_STYLES = {
    "exact": (OTHER_COLOURS["black"], "o", "exact"),
    "same": (OTHER_COLOURS["indigo"], "v", "same batch"),
    "fresh": (OTHER_COLOURS["wine"], "^", "fresh batch"),
    "same_ema": (OTHER_COLOURS["cyan"], "s", "same, EMA"),
    "fresh_ema": (OTHER_COLOURS["lilac"], "D", "fresh, EMA"),
}


@STYLED
def switches_figure(summary: Summary) -> tuple[Figure, Numbers]:
    """G_Mix against the number of switches, a panel per problem."""
    numbers: Numbers = []
    figure, axes = _panels(len(summary), height=2.9)
    for axis, (problem, data) in zip(axes, summary.items(), strict=True):
        switches = np.array(data["switches"])
        numbers += _law(axis, switches, data["bound"], "bound T7", problem, ls="-.")
        numbers += _law(axis, switches, data["drift"], "drift, no noise", problem, ls="--")
        curve = OTHER_ALGORITHMS["alternate"][:2]
        numbers += _curve(axis, switches, data["last"], *curve, "alternation, last", problem)
        mean = "alternation, average"
        numbers += _curve(axis, switches, data["weighted"], curve[0], "", mean, problem, ls=":")
        for line, key in (("alright", "alright"), ("sequential", "dpo_then_sft")):
            value = data[line]["last"]
            axis.axhline(value["mean"], color=COLOURS[key], lw=0.9, label=LABELS[key] + ", last")
            if np.isfinite(value["low"]):
                axis.axhspan(value["low"], value["high"], color=COLOURS[key], alpha=0.2, lw=0)
            numbers.append({"panel": problem, "line": line} | value)
        everything = [value["mean"] for key in ("last", "weighted") for value in data[key]]
        axis.set_ylim(min(everything) / 3, 10 * data["limit"]["mix_gap"])
        _log_axes(axis, short_name(problem), "switches")
    axes[0].set_ylabel(GAP_NAMES["mix_gap"])
    _legend(figure, axes[0], ncols=min(3, len(summary) + 1))
    return figure, numbers


@STYLED
def equal_compute_figure(summary: Summary) -> tuple[Figure, Numbers]:
    """The gap against compute in each case, and the ratio to Mix measured and predicted."""
    numbers: Numbers = []
    figure, axes = _panels(len(summary) + 1, height=4.2, rows=2)
    styles = looks(("mix", "alright", "importance"))
    for axis, tag, (label, data) in zip(axes[:-1], ascii_lowercase, summary.items(), strict=False):
        for method, style in styles.items():
            own = data[method]
            compute = np.array(own["compute"])
            numbers += _curve(axis, compute, own["mix_gap"], *style, label)
            law = own["cost"] * own["trace"] / (2.0 * compute)
            numbers += _law(axis, compute, law, f"law, {style[2]}", label, style[0], ls=":")
        _log_axes(axis, f"({tag}) {_short(label)}", "compute (SFT forwards)")
    for axis in axes[:: len(axes) // 2]:
        axis.set_ylabel(GAP_NAMES["mix_gap"])
    numbers += _draw_ratios(axes[-1], summary, styles)
    handles = [_entry(colour, "-", label, marker) for colour, marker, label in styles.values()]
    handles += [_entry(GREY, ":", "law cost tr$(H^{-1}V)/2C$"), _entry("0.2", "", "predicted", "|")]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, columnspacing=1.2)
    return figure, numbers


def _draw_ratios(axis: Axes, summary: Summary, styles: dict[str, Look]) -> Numbers:
    numbers: Numbers = []
    labels = list(summary)
    for method, offset in (("alright", -0.16), ("importance", 0.16)):
        colour, marker, _ = styles[method]
        for row, label in enumerate(labels):
            own = summary[label][method]
            value, predicted = own["measured_ratio"], own["predicted_ratio"]["full"]
            y = row + offset
            _interval_bar(axis, value, y, colour, marker)
            axis.plot(predicted, y, "|", color="0.2", ms=9, mew=1.2, zorder=3)
            numbers.append({"panel": "ratio", "line": method, "case": label} | value)
            numbers[-1]["predicted"] = predicted
    axis.axvline(1.0, color=GREY, lw=0.8, ls=":")
    axis.set_yticks(range(len(labels)), [f"({tag})" for tag in ascii_lowercase[: len(labels)]])
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set_xlabel("gap / gap of Mix")
    axis.set_title("at equal compute")
    axis.set_xlim(0.0, None)
    axis.grid(axis="x", alpha=0.25, lw=0.5)
    return numbers


@STYLED
def clipping_figure(summary: Summary, lam: float) -> tuple[Figure, Numbers]:
    """Effective lam against the clipping norm (top) and against lam (bottom), by problem."""
    numbers: Numbers = []
    figure, axes = _panels(2 * len(summary), height=4.4, rows=2)
    for column, (problem, data) in enumerate(summary.items()):
        axis, along = axes[column], data["along_norms"]
        norms = np.array(along["max_norm"])
        for key in ("alright", "mix"):
            numbers += _curve(axis, norms, along[key], *looks([key])[key], problem)
        numbers += _law(axis, norms, along["predicted"], "predicted", problem, ls="--")
        axis.axhline(lam, color=GREY, lw=0.8, ls=":")
        axis.set(xscale="log", title=problem, xlabel="clipping norm", ylim=(0.0, None))
        _diagonal(axes[len(summary) + column], data["along_lam"], problem, numbers)
    for axis in axes[:: len(summary)]:
        axis.set_ylabel("effective λ")
    _legend(figure, axes[0], ncols=3)
    _legend(figure, axes[-1], ncols=3, below=True)
    for axis in axes:
        axis.grid(alpha=0.25, lw=0.5)
    return figure, numbers


def _diagonal(axis: Axes, along: Summary, problem: str, numbers: Numbers) -> None:
    lams = np.array(along["lam"])
    for rule, style in RULE_STYLES.items():
        numbers += _curve(axis, lams, along[rule], *style, problem)
    numbers += _law(axis, lams, along["predicted"], "clip 3, predicted", problem, ls="--")
    axis.plot([0, 1], [0, 1], color=GREY, lw=0.8, ls=":")
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="λ given")


@STYLED
def lockout_figure(summary: Summary) -> tuple[Figure, Numbers]:
    """The response of the gaps to lam against the refresh period, a panel per problem."""
    numbers: Numbers = []
    figure, axes = _panels(len(summary), height=2.6)
    for axis, (problem, data) in zip(axes, summary.items(), strict=True):
        periods = np.array(data["refresh_every"])
        for source, style in SOURCE_STYLES.items():
            numbers += _curve(axis, periods, data[source], *style, problem)
        axis.axhline(-1.0, color=GREY, lw=0.8, ls=":")
        axis.axhline(0.0, color=GREY, lw=0.5)
        axis.set(xscale="log", title=short_name(problem), xlabel="refresh period $k$")
        axis.set_xticks(periods, [f"{period:,}" for period in periods])
        axis.grid(alpha=0.25, lw=0.5)
    axes[0].set_ylabel(r"slope of $\log\,\delta_1/\delta_2$ in logit λ")
    _legend(figure, axes[0], ncols=3)
    return figure, numbers


@STYLED
def plateau_figure(summary: Summary) -> tuple[Figure, Numbers]:
    """G_Mix over the certified limit at the largest budget, a row per optimiser."""
    numbers: Numbers = []
    problems = summary["problems"]
    figure, axes = _panels(len(problems), height=2.6, sharey=True)
    for axis, (problem, orders) in zip(axes, problems.items(), strict=True):
        lines: list[tuple[str, str, float]] = [(order, order, 0.0) for order in orders]
        lines += [("alright", next(iter(orders)), 0.0)]
        for (line, order, _), offset in zip(lines, (-0.2, 0.0, 0.2), strict=True):
            for row, (name, cell) in enumerate(orders[order]["optimisers"].items()):
                value = cell["alright" if line == "alright" else "sequential"][-1]
                _interval_bar(axis, value, row + offset, COLOURS[line], MARKERS[line])
                numbers.append({"panel": problem, "line": line, "optimiser": name} | value)
        axis.axvline(1.0, color=GREY, lw=0.8, ls=":")
        axis.set_title(short_name(problem))
        axis.set_xlim(-0.05, None)
        axis.grid(axis="x", alpha=0.25, lw=0.5)
    names = list(next(iter(next(iter(problems.values())).values()))["optimisers"])
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel(r"$G_{\mathrm{Mix}}$ / certified limit of sequential training", fontsize=8)
    keys = ("dpo_then_sft", "sft_then_dpo", "alright")
    handles = [_entry(COLOURS[key], "", LABELS[key], MARKERS[key]) for key in keys]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure, numbers


def _panels(
    count: int, *, height: float, rows: int = 1, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    columns = -(-count // rows)
    figure = Figure(figsize=(max(3.4, 0.6 + 1.75 * columns), height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey).ravel().tolist()
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def _curve(
    axis: Axes,
    x: np.ndarray,
    values: Sequence[dict[str, float]],
    colour: str,
    marker: str,
    label: str,
    panel: str,
    ls: str = "-",
) -> Numbers:
    """Means as a line, intervals as a band; returns what it drew."""
    mean, low, high = (
        np.array([value[key] for value in values]) for key in ("mean", "low", "high")
    )
    axis.plot(x, mean, color=colour, marker=marker, ls=ls, ms=3.2, lw=1.3, label=label)
    if np.isfinite(low).all():
        axis.fill_between(x, low, high, color=colour, alpha=0.25, lw=0)
    rows = zip(x.tolist(), values, strict=True)
    return [{"panel": panel, "line": label, "x": position} | value for position, value in rows]


def _law(
    axis: Axes,
    x: np.ndarray,
    values: Sequence[float],
    label: str,
    panel: str,
    colour: str = "0.3",
    *,
    ls: str,
) -> Numbers:
    """A curve from theory; returns what it drew."""
    y = np.array(values, dtype=float)
    axis.plot(x, y, color=colour, lw=0.9, ls=ls, zorder=3, label=label)
    drawn = np.isfinite(y)
    pairs = zip(x[drawn].tolist(), y[drawn].tolist(), strict=True)
    return [{"panel": panel, "line": label, "x": a, "mean": b} for a, b in pairs]


def _interval_bar(axis: Axes, value: dict[str, float], y: float, colour: str, marker: str) -> None:
    if np.isfinite(value["low"]):
        axis.plot([value["low"], value["high"]], [y, y], color=colour, lw=1.3)
    axis.plot(value["mean"], y, marker, color=colour, ms=3.6)


def _log_axes(axis: Axes, title: str, xlabel: str) -> None:
    axis.set(xscale="log", yscale="log", title=title, xlabel=xlabel)
    axis.grid(alpha=0.25, lw=0.5)


def _short(label: str) -> str:
    """'softmax, beta=0.1, lam=0.5' as 'softmax β=0.1 λ=0.5'."""
    first, rest = label.split(", ", 1)
    return first + " " + rest.replace(", ", " ").replace("beta", "β").replace("lam", "λ")


def _entry(colour: str, ls: str, label: str, marker: str = "") -> Line2D:
    return Line2D([], [], color=colour, lw=0.9, ls=ls, marker=marker, ms=4, label=label)


def _legend(figure: Figure, axis: Axes, ncols: int, below: bool = False) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center" if below else "outside upper center",
        ncols=ncols,
        columnspacing=1.2,
        fontsize=7,
    )
