"""The figure of the verdicts: a table of outcomes, and the equalisation of MAXRIGHT beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy.special import logit

from theory.metrics import mean_interval
from theory.plotting.style import STYLE
from theory.predictions.end_points import EndPoint, Optima
from theory.predictions.paper_numbers import MAXRIGHT_SLOPE
from theory.predictions.verdicts import Verdict
from theory.tasks import Task

PAPER = "paper"
"""The column of the published numbers."""

NAMES = {
    "P1": "P1 revealed\npreference",
    "P2": "P2 monotone\nin $\\lambda$",
    "P3": "P3 equalisation",
    "P4": "P4 ideal\ndistance",
    "P5": "P5 best on\nown metric",
    "P6": "P6 cost\nper step",
}
FILLS = {"holds": "#CFE5F2", "fails": "#D55E00", "not decided": "#EEEEEE"}
SERIES = (
    ("#0072B2", "s", 8.0),
    ("#009E73", "o", 6.0),
    ("#CC79A7", "D", 3.6),
    ("#E69F00", "v", 2.0),
)
"""Colour, marker and size by problem: hollow and nested, because the points coincide."""


def verdict_figure(
    results: dict[str, list[Verdict]], fits: dict[str, tuple[Sequence[EndPoint], Optima]]
) -> tuple[Figure, dict[str, Any]]:
    """Outcomes by prediction and source (left), log gap ratios of exact MAXRIGHT (right).

    A cell shows the distance of the deciding margin to its threshold, with its interval.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 3.1), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(2.7, 1.0))
        cells = _draw_table(left, results)
        points = _draw_equalisation(right, fits)
    return figure, {"verdicts": cells, "equalisation": points}


def _draw_table(axis: Axes, results: dict[str, list[Verdict]]) -> list[dict[str, Any]]:
    numbers = []
    keys = [verdict.prediction for verdict in next(iter(results.values()))]
    for column, (source, verdicts) in enumerate(results.items()):
        for row, verdict in enumerate(verdicts):
            slack, low, high = (
                value - verdict.threshold for value in (verdict.margin, verdict.low, verdict.high)
            )
            patch = Rectangle((column, row), 0.96, 0.92, color=FILLS[verdict.outcome], lw=0)
            axis.add_patch(patch)
            ink = "white" if verdict.outcome == "fails" else "black"
            text: dict[str, Any] = {"ha": "center", "va": "center", "color": ink}
            bold = "bold" if verdict.outcome != "not decided" else "normal"
            axis.text(column + 0.48, row + 0.29, verdict.outcome, weight=bold, **text)
            axis.text(column + 0.48, row + 0.66, _interval(slack, low, high), fontsize=6, **text)
            numbers.append(
                {"source": source, "prediction": verdict.prediction, "outcome": verdict.outcome}
                | {"claim": verdict.claim, "slack": slack, "low": low, "high": high}
            )
    axis.set(xlim=(0, len(results)), ylim=(len(keys), 0))
    centres = np.arange(len(results)) + 0.48
    axis.set_xticks(centres, [f"{s}*" if s == PAPER else s for s in results])
    axis.set_yticks(np.arange(len(keys)) + 0.46, [NAMES[key] for key in keys])
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel(
        "numbers: 95% limits of the margin beyond its threshold\n"
        "* read off published figures and rounded, no seeds; only the slope is known of P3",
        fontsize=7,
    )
    return numbers


def _interval(slack: float, low: float, high: float) -> str:
    if np.isnan(slack):
        return "no data"
    words = f"{low:.3f} to {high:.3f}".replace("inf", "\N{INFINITY}")
    return words.replace("-", "\N{MINUS SIGN}")


def _draw_equalisation(
    axis: Axes, fits: dict[str, tuple[Sequence[EndPoint], Optima]]
) -> list[dict[str, Any]]:
    numbers = []
    for index, (problem, (points, optima)) in enumerate(fits.items()):
        colour, marker, size = SERIES[index]
        x, intervals = [], []
        for point in points:
            gaps = point.losses - optima.values
            if point.lam is None or not 0.0 < point.lam < 1.0 or np.any(gaps <= 0.0):
                continue
            ratio = np.log(gaps[:, Task.DPO] / gaps[:, Task.SFT])
            x.append(float(logit(point.lam)))
            intervals.append(mean_interval(ratio))
            numbers.append({"problem": problem, "lam": point.lam} | intervals[-1]._asdict())
        if not x:
            continue
        mean, low, high = np.array(intervals).T
        spread = np.stack([mean - low, high - mean])
        spread = np.where(np.isfinite(spread), spread, 0.0)
        style: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "ls": "",
            "ms": size,
            "mfc": "none",
            "mew": 1.0,
            "elinewidth": 1.0,
        }
        axis.errorbar(x, mean, spread, label=problem, **style)
    ends = np.array([-2.6, 2.6])
    axis.plot(ends, -ends, color="0.35", lw=0.9, zorder=0, label="predicted, slope $-1$")
    slope = f"paper*, slope ${MAXRIGHT_SLOPE.mean:.2f}$"  # its intercept is not known
    axis.plot(ends, MAXRIGHT_SLOPE.mean * ends, color="#D55E00", ls="--", lw=1.1, label=slope)
    axis.set_xlabel(r"logit $\lambda$")
    axis.set_ylabel(r"$\log(\delta_{\mathrm{DPO}}/\delta_{\mathrm{SFT}})$, MAXRIGHT")
    axis.legend(fontsize=6, loc="upper right", handlelength=1.6, labelspacing=0.3)
    axis.set_ylim(-3.0, 4.6)
    axis.grid(alpha=0.25, lw=0.5)
    return numbers
