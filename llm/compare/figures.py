"""Figures of the comparison on language models: paths, gaps, and what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from theory.metrics import middle
from theory.plotting.style import STYLE, label, looks
from theory.schedulers import ORDERS

Numbers = list[dict[str, Any]]
Entry = dict[str, Any]
"""One setting: budget, line, knob, weight and {mean, low, high} (or None) per metric."""

GAPS = {
    "gap_dpo": r"$f_{\mathrm{DPO}} - f^*_{\mathrm{DPO}}$",
    "gap_sft": r"$f_{\mathrm{SFT}} - f^*_{\mathrm{SFT}}$",
    "ideal_distance": "ideal distance",
}
BUDGETS = {"steps": "equal steps", "compute": "equal compute"}
WEIGHT = r"$\lambda$, or share of steps on DPO"


def paths_figure(paths: pd.DataFrame, summary: Mapping[str, Any]) -> tuple[Figure, Numbers]:
    """(a) Losses along the runs at the middle knob; (b) where the runs of all knobs end.

    Thin lines are seeds, thick ones their mean; dotted lines are f*. The first budget is drawn.
    """
    entries = _finished(summary["settings"], _budgets(summary)[0])
    of = summary.get("measured_on", "held-out")
    rows = paths[(paths["budget"] == _budgets(summary)[0]) & (paths["failed"] == "")]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.9, 3.1), layout="constrained")
        left, right = figure.subplots(1, 2)
        numbers = _draw_paths(left, rows) + _draw_ends(right, entries)
        for axis in (left, right):
            axis.axvline(summary["optima"]["dpo"], color="0.5", ls=":", lw=0.9, zorder=0)
            axis.axhline(summary["optima"]["sft"], color="0.5", ls=":", lw=0.9, zorder=0)
            axis.set_xlabel(rf"{of} $f_{{\mathrm{{DPO}}}}$ (nats/pair)")
            axis.grid(alpha=0.25, lw=0.5)
        left.set_ylabel(rf"{of} $f_{{\mathrm{{SFT}}}}$ (nats/token)")
        left.set_title("(a) paths at the middle of the grid")
        right.set_title(r"(b) end points over $\lambda$ or split")
        start = Line2D([], [], color="black", marker="*", ms=7, ls="", label="initial policy")
        optimum = Line2D([], [], color="0.5", ls=":", lw=0.9, label=r"$f^*$")
        handles = [*_handles(_lines(entries)), start, optimum]
        _legend(figure, handles)
    return figure, [*numbers, {"panel": "optima", **_losses(summary["optima"])}]


def _draw_paths(axis: Axes, rows: pd.DataFrame) -> Numbers:
    numbers: Numbers = []
    for line, look in looks(rows["line"]).items():
        own = rows[rows["line"] == line]
        if own["knob"].notna().all():
            own = own[own["knob"] == middle(sorted(own["knob"].unique()))]
        for _, run in own.groupby("seed"):
            axis.plot(run["f_dpo"], run["f_sft"], color=look.colour, lw=0.5, alpha=0.35)
        mean = own.groupby("step")[["f_dpo", "f_sft"]].mean()
        axis.plot(mean["f_dpo"], mean["f_sft"], color=look.colour)
        ends = own[own["step"] == own["step"].max()]
        axis.plot(
            ends["f_dpo"], ends["f_sft"], color=look.colour, marker=look.marker, ls="", ms=5,
            mec="white", mew=0.5, zorder=3,
        )  # fmt: skip
        start = mean.iloc[0]
        axis.plot(start["f_dpo"], start["f_sft"], color="black", marker="*", ms=7, zorder=4)
        knob, steps = float(own["knob"].iloc[0]), mean.reset_index().to_dict(orient="list")
        numbers.append({"panel": "paths", "line": line, "knob": knob, **steps})
    return numbers


def _draw_ends(axis: Axes, entries: Sequence[Entry]) -> Numbers:
    numbers: Numbers = []
    for line, look in looks(_lines(entries)).items():
        own = sorted((e for e in entries if e["line"] == line), key=lambda e: e["weight"])
        x, y = (np.array([e[loss]["mean"] for e in own]) for loss in ("f_dpo", "f_sft"))
        axis.plot(x, y, color=look.colour, lw=0.8)
        errors = [_errors(own, loss) for loss in ("f_dpo", "f_sft")]
        axis.errorbar(
            *(x, y), xerr=errors[0], yerr=errors[1], color=look.colour, marker=look.marker,
            ls="", ms=4, elinewidth=0.7, mec="white", mew=0.4,
        )  # fmt: skip
        numbers += [
            {"panel": "end points", **_named(e), "f_dpo": e["f_dpo"], "f_sft": e["f_sft"]}
            for e in own
        ]
    return numbers


def gaps_figure(summary: Mapping[str, Any]) -> tuple[Figure, Numbers]:
    """Both gaps and the ideal distance against the weight, one row per budget, 95% intervals."""
    budgets = _budgets(summary)
    numbers: Numbers = []
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.9, 0.8 + 1.75 * len(budgets)), layout="constrained")
        axes = figure.subplots(len(budgets), len(GAPS), sharex=True, sharey="col", squeeze=False)
        for row, budget in zip(axes, budgets, strict=True):
            entries = _finished(summary["settings"], budget)
            for axis, (metric, label) in zip(row, GAPS.items(), strict=True):
                numbers += _draw_against_weight(axis, entries, metric)
                axis.set_ylabel(label)
                axis.axhline(0.0, color="0.5", ls=":", lw=0.9, zorder=0)
                axis.grid(alpha=0.25, lw=0.5)
            row[1].set_title(BUDGETS[budget])
        for axis in axes[-1]:
            axis.set_xlabel(WEIGHT)
        _legend(figure, _handles(_lines(_finished(summary["settings"], budgets[0]))))
    return figure, numbers


def _draw_against_weight(axis: Axes, entries: Sequence[Entry], metric: str) -> Numbers:
    lines = _lines(entries)
    weights = sorted({entry["weight"] for entry in entries})
    steps = np.diff(weights).min() if len(weights) > 1 else 1.0
    for place, (line, look) in enumerate(looks(lines).items()):
        own = sorted((e for e in entries if e["line"] == line), key=lambda e: e["weight"])
        # Side by side, so that no interval hides another.
        x = [e["weight"] + 0.08 * steps * (place - (len(lines) - 1) / 2) for e in own]
        axis.errorbar(
            x, [e[metric]["mean"] for e in own], yerr=_errors(own, metric), color=look.colour,
            marker=look.marker, ms=4, lw=1.0, elinewidth=0.8, mec="white", mew=0.4,
        )  # fmt: skip
    axis.set_xticks(weights, [f"{weight:g}" for weight in weights])
    return [{**_named(entry), "metric": metric, **entry[metric]} for entry in entries]


def compute_figure(summary: Mapping[str, Any]) -> tuple[Figure, Numbers]:
    """(a) Cost per step against that of sequential training: counted, and measured time.

    (b) The ideal distance at the middle knob under either budget, with the number of steps.
    """
    budgets = _budgets(summary)
    entries = _middles(summary["settings"])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.9, 2.7), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.35))
        numbers = _draw_costs(left, [e for e in entries if e["budget"] == budgets[0]], summary)
        numbers += _draw_distances(right, entries, budgets)
        for axis in (left, right):
            axis.set_ylim(bottom=0.0)
    return figure, numbers


def _draw_costs(axis: Axes, entries: Sequence[Entry], summary: Mapping[str, Any]) -> Numbers:
    numbers: Numbers = []
    counted = (summary["costs"]["sft_step"] + summary["costs"]["dpo_step"]) / 2.0
    orders = [e for e in entries if e["line"] in ORDERS] or entries
    measured = float(np.mean([e["seconds_per_step"]["mean"] for e in orders]))
    drawn = looks(_lines(entries))
    for i, entry in enumerate(entries):
        cost = entry["cost_per_step"]["mean"] / counted
        times = {name: value / measured for name, value in entry["seconds_per_step"].items()}
        axis.bar(i, cost, 0.65, color=drawn[entry["line"]].colour)
        axis.plot(i, times["mean"], color="black", marker="_", ms=9, mew=1.2, zorder=3)
        if np.isfinite(times["high"]):
            axis.plot([i, i], [times["low"], times["high"]], color="black", lw=0.8)
        axis.text(i, 0.05, f"{cost:.2f}", ha="center", va="bottom", fontsize=7, color="white")
        numbers.append({"panel": "cost", **_named(entry), "counted": cost, "measured": times})
    axis.axhline(1.0, color="0.5", ls=":", lw=0.9, zorder=0)
    axis.margins(y=0.15)
    _name_bars(axis, entries)
    axis.set_ylabel("cost of a step / sequential's")
    mark = Line2D([], [], color="black", marker="_", ms=9, mew=1.2, ls="", label="measured time")
    _legend_on_top(axis, [mpl.patches.Patch(fc="0.6", label="counted"), mark])
    axis.set_title("(a) cost of a step", pad=18)
    return numbers


def _draw_distances(axis: Axes, entries: Sequence[Entry], budgets: Sequence[str]) -> Numbers:
    lines, width = _lines(entries), 0.8 / len(budgets)
    drawn = looks(lines)
    numbers: Numbers = []
    for entry in entries:
        distance, budget = entry["ideal_distance"], budgets.index(entry["budget"])
        place = lines.index(entry["line"]) + (budget - (len(budgets) - 1) / 2) * width
        hatch = "////" if budget else ""
        colour = drawn[entry["line"]].colour
        axis.bar(
            place, distance["mean"], 0.92 * width, color=colour, ec="white", lw=0.0, hatch=hatch
        )
        top = distance["mean"]
        if np.isfinite(distance["high"]):
            axis.plot([place] * 2, [distance["low"], distance["high"]], color="black", lw=0.8)
            top = distance["high"]
        axis.annotate(
            str(entry["num_steps"]), (place, top), xytext=(0, 2), textcoords="offset points",
            ha="center", fontsize=6,
        )  # fmt: skip
        numbers.append(
            {"panel": "ideal distance", **_named(entry), "num_steps": entry["num_steps"]} | distance
        )
    _name_bars(axis, [next(e for e in entries if e["line"] == line) for line in lines])
    handles = [
        mpl.patches.Patch(fc="0.6", ec="white", hatch="////" if i else "", label=BUDGETS[budget])
        for i, budget in enumerate(budgets)
    ]
    _legend_on_top(axis, handles)
    axis.margins(y=0.15)
    axis.set_ylabel("ideal distance")
    axis.set_title("(b) end of training, and number of steps", pad=18)
    return numbers


def _name_bars(axis: Axes, entries: Sequence[Entry]) -> None:
    axis.set_xticks(range(len(entries)), [label(e["line"]) for e in entries], rotation=30,
                    ha="right", rotation_mode="anchor")  # fmt: skip


def _legend_on_top(axis: Axes, handles: Sequence[Any]) -> None:
    """Between title and axes, where no bar can be."""
    axis.legend(
        handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=2, fontsize=7
    )


def _budgets(summary: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(entry["budget"] for entry in summary["settings"]))


def _finished(entries: Iterable[Entry], budget: str) -> list[Entry]:
    """Settings of one budget of which at least one run finished."""
    return [e for e in entries if e["budget"] == budget and e["seeds"]]


def _middles(entries: Sequence[Entry]) -> list[Entry]:
    """Of every budget and line the setting at its middle knob."""
    chosen: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if entry["seeds"]:
            chosen.setdefault((entry["budget"], entry["line"]), []).append(entry)
    return [min(own, key=lambda e: abs((e["knob"] or 0.5) - 0.5)) for own in chosen.values()]


def _lines(entries: Iterable[Entry]) -> list[str]:
    return list(looks(entry["line"] for entry in entries))


def _errors(entries: Sequence[Entry], metric: str) -> Any:
    """Distances to the ends of the intervals, (2, n); none for a single seed."""
    ends = np.array([[e[metric][end] for end in ("mean", "low", "high")] for e in entries])
    errors = np.stack([ends[:, 0] - ends[:, 1], ends[:, 2] - ends[:, 0]])
    return np.where(np.isfinite(errors), errors, 0.0)


def _named(entry: Entry) -> dict[str, Any]:
    return {key: entry[key] for key in ("budget", "line", "knob", "weight")}


def _losses(optima: Mapping[str, Any]) -> dict[str, float]:
    return {"f_dpo": optima["dpo"], "f_sft": optima["sft"]}


def _handles(lines: Sequence[str]) -> Iterator[Line2D]:
    for look in looks(lines).values():
        yield Line2D([], [], color=look.colour, marker=look.marker, ms=4, label=look.label)


def _legend(figure: Figure, handles: Iterable[Line2D]) -> None:
    figure.legend(
        handles=list(handles), loc="outside upper center", ncols=8, columnspacing=1.0,
        handlelength=1.5,
    )  # fmt: skip
