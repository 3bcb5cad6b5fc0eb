"""Figures of one training run: held-out losses, path, decisions, gradient norms, time.

Log lines are dictionaries as `llm.train.reporting` names their entries: `step`, `dpo_loss`,
`eval_dpo_loss`, `sft_grad_norm`, `time_forward`, ... What was not measured is not drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

from theory.plotting.style import STYLE

Lines = Sequence[Mapping[str, Any]]
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Steps and values."""

TASKS = ("sft", "dpo")
TASK_COLOURS = {"sft": "#0072B2", "dpo": "#D55E00"}
TASK_NAMES = {"sft": "SFT", "dpo": "DPO"}
UNITS = {"sft": "nats/token", "dpo": "nats/pair"}
PHASE_COLOURS = {
    "data": "#999999",
    "forward": "#56B4E9",
    "backward": "#0072B2",
    "optimizer": "#009E73",
    "probes": "#CC79A7",
    "evaluation": "#E69F00",
    "other": "#CCCCCC",
}
WINDOWS = 40
"""The share of DPO is averaged over windows of this fraction of the run."""
TIME_WINDOWS = 15
MOST_TICKS = 400
"""More probes than this would be a black bar."""


def losses_figure(lines: Lines, optimum: Mapping[str, float] | None = None) -> Figure:
    """Held-out losses over the steps with the means of what was trained on, and their path.

    The path in the plane of both losses is drawn if both were measured.
    """
    curves = {task: curve(lines, f"eval_{task}_loss") for task in TASKS}
    tasks = [task for task in TASKS if len(curves[task][0])]
    with_path = len(tasks) == len(TASKS)
    panels = len(tasks) + with_path
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.9 if panels > 1 else 4.4, 2.5), layout="constrained")
        axes = figure.subplots(1, max(panels, 1), squeeze=False)[0]
        for axis, task in zip(axes, tasks, strict=False):
            _draw_loss(axis, task, curves[task], curve(lines, f"{task}_loss"), optimum)
        if with_path:
            _draw_path(axes[-1], curves, optimum)
    return figure


def _draw_loss(
    axis: Axes, task: str, held_out: Curve, training: Curve, optimum: Mapping[str, float] | None
) -> None:
    colour = TASK_COLOURS[task]
    axis.plot(*training, color=colour, alpha=0.6, lw=0.8, label="trained on")
    axis.plot(*held_out, color=colour, marker="o", ms=3, label="held out")
    if optimum is not None:
        axis.axhline(optimum[task], color="0.5", ls=":", lw=0.9, label=r"$f^*$")
    axis.set_xlabel("step")
    axis.set_title(rf"$f_{{\mathrm{{{TASK_NAMES[task]}}}}}$ ({UNITS[task]})")
    axis.grid(alpha=0.25, lw=0.5)
    axis.legend(loc="best")


def _draw_path(
    axis: Axes, curves: Mapping[str, Curve], optimum: Mapping[str, float] | None
) -> None:
    common, sft, dpo = np.intersect1d(
        curves["sft"][0], curves["dpo"][0], assume_unique=True, return_indices=True
    )
    x, y = curves["dpo"][1][dpo], curves["sft"][1][sft]
    axis.plot(x, y, color="0.5", marker=".", ms=4, lw=1.0)
    axis.plot(x[:1], y[:1], color="black", marker="*", ms=8, ls="", label=f"step {common[0]:g}")
    end = f"step {common[-1]:g}"
    axis.plot(x[-1:], y[-1:], color="#009E73", marker="o", ms=5, ls="", label=end)
    if optimum is not None:
        axis.axvline(optimum["dpo"], color="0.5", ls=":", lw=0.9)
        axis.axhline(optimum["sft"], color="0.5", ls=":", lw=0.9, label=r"$f^*$")
    axis.set_xlabel(r"held-out $f_{\mathrm{DPO}}$")
    axis.set_ylabel(r"held-out $f_{\mathrm{SFT}}$")
    axis.set_title("path of both losses")
    axis.grid(alpha=0.25, lw=0.5)
    axis.legend(loc="best")


def decisions_figure(decisions: Sequence[Sequence[float]], probes: Sequence[int] = ()) -> Figure:
    """Share of DPO in the weights of a step, (T, 2) over (DPO, SFT), averaged over windows.

    `probes` are the steps at which both losses were evaluated; they are ticks below.
    """
    shares = dpo_shares(decisions)
    edges, values = window_means(shares)
    overall = float(shares.mean())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.9, 1.9), layout="constrained")
        axis = figure.subplots()
        axis.stairs(values, edges, fill=True, color=TASK_COLOURS["dpo"], alpha=0.75, label="DPO")
        axis.stairs(
            np.ones_like(values), edges, baseline=values, fill=True, color=TASK_COLOURS["sft"],
            alpha=0.75, label="SFT",
        )  # fmt: skip
        axis.axhline(overall, color="white", lw=2.2)
        axis.axhline(overall, color="black", ls="--", lw=1.0, label=f"whole run, {overall:.2f}")
        if 0 < len(probes) <= MOST_TICKS:
            axis.plot(
                probes, np.full(len(probes), -0.06), color="black", marker="|", ms=5, mew=0.7,
                ls="", clip_on=False, label="probe of both losses",
            )  # fmt: skip
        axis.set_xlim(edges[0], edges[-1])
        axis.set_ylim(-0.12 if len(probes) else 0.0, 1.0)
        axis.set_yticks([0.0, 0.5, 1.0])
        axis.set_xlabel("step")
        axis.set_ylabel("share of DPO")
        figure.legend(loc="outside upper center", ncols=4)
    return figure


def norms_figure(lines: Lines, max_grad_norm: float | None = None) -> Figure:
    """Norms of the gradient of each objective before clipping, in steps on it alone."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.4, 2.3), layout="constrained")
        axis = figure.subplots()
        for task in TASKS:
            steps, values = curve(lines, f"{task}_grad_norm")
            if len(steps):
                axis.plot(steps, values, color=TASK_COLOURS[task], label=TASK_NAMES[task])
        if max_grad_norm:
            axis.axhline(max_grad_norm, color="0.5", ls=":", lw=0.9, label="clipped above")
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("step")
        axis.set_title("gradient norms before clipping")
        axis.grid(alpha=0.25, lw=0.5)
        axis.legend(loc="best")
    return figure


def time_figure(lines: Lines) -> Figure:
    """Shares of the time between two log lines, stacked; means over neighbouring lines."""
    rows = [line for line in lines if any(name.startswith("time_") for name in line)]
    steps = np.array([0.0, *(line["step"] for line in rows)])
    present = [name for name in PHASE_COLOURS if any(line.get(f"time_{name}") for line in rows)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.4, 2.3), layout="constrained")
        axis = figure.subplots()
        base = np.zeros(min(len(rows), TIME_WINDOWS))
        for name in present:
            shares = np.array([line.get(f"time_{name}", 0.0) for line in rows])
            edges, means = window_means(shares, TIME_WINDOWS)
            top = base + means
            axis.stairs(
                top, steps[edges.astype(int)], baseline=base, fill=True, label=name,
                color=PHASE_COLOURS[name],
            )  # fmt: skip
            base = top
        axis.set_xlim(steps[0], steps[-1])
        axis.set_ylim(0.0, 1.0)
        axis.set_xlabel("step")
        axis.set_title("share of the time")
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside right upper", handlelength=1.0)
    return figure


def curve(lines: Lines, name: str) -> Curve:
    """Steps and finite values of one entry of the log; of two lines of a step, the later."""
    points = {
        float(line["step"]): float(line[name])
        for line in lines
        if isinstance(line.get(name), int | float) and np.isfinite(line[name])
    }
    steps = np.array(sorted(points))
    return steps, np.array([points[step] for step in steps])


def dpo_shares(decisions: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """w_DPO / (w_DPO + w_SFT) of each step, in [0, 1]; decisions have shape (T, 2)."""
    weights = np.asarray(decisions, dtype=float)
    return np.asarray(weights[:, 0] / weights.sum(axis=1))


def window_means(values: NDArray[np.float64], windows: int = WINDOWS) -> Curve:
    """Edges (n + 1,) and means (n,) over n <= `windows` runs of neighbours of nearly equal size."""
    edges = np.unique(np.linspace(0, len(values), min(windows, len(values)) + 1).round())
    pairs = zip(edges[:-1].astype(int), edges[1:].astype(int), strict=True)
    return edges, np.array([values[start:stop].mean() for start, stop in pairs])
