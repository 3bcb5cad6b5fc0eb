"""The figure of a validation: verdicts, and theory's numbers next to the measured ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from theory.plotting.style import STYLE

Entry = dict[str, Any]
Numbers = list[dict[str, Any]]

COLOURS = {"holds": "#0072B2", "fails": "#D55E00", "not decided": "0.55", "": "0.55"}
TICKS = (-100.0, -10.0, -1.0, -0.1, 0.0, 0.1, 1.0, 10.0, 100.0)
THEORY: dict[str, Any] = {
    "color": "black",
    "marker": "_",
    "ms": 9,
    "ls": "",
    "mew": 1.6,
    "zorder": 4,
}


def validate_figure(record: Entry) -> tuple[Figure, Numbers]:
    """(a) Margins of the predictions beyond their thresholds, (b) of the hypotheses, and theory
    (black bars) next to measurement: (c) gap against switches and T8, (d) effective lam."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 6.6), layout="constrained")
        axes = figure.subplots(2, 2, height_ratios=(1.5, 1.0))
        numbers = [
            *_margins(axes[0, 0], record["predictions"], "(a) predictions: margin over threshold"),
            *_margins(axes[0, 1], record["hypotheses"], "(b) hypotheses: measured differences"),
            *_gaps(axes[1, 0], _named(record, "gap")),
            *_lams(axes[1, 1], _named(record, "effective lam")),
        ]
    return figure, numbers


def _named(record: Entry, start: str) -> list[Entry]:
    """Studies' quantities by the beginning of their name, those with a number."""
    return [
        q for q in record["quantities"] if q["name"].startswith(start) and _finite(q["measured"])
    ]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _margins(axis: Axes, entries: Sequence[Entry], title: str) -> Numbers:
    axis.set_title(title, loc="left")
    numbers: Numbers = []
    for row, entry in enumerate(entries):
        threshold = entry.get("threshold", 0.0)
        colour = COLOURS[entry["verdict"]]
        if _finite(entry["measured"]):
            values = [v - threshold for v in (entry["measured"], *entry["interval"])]
            mean, low, high = (float(v) for v in values)
            _whisker(axis, mean, row, low, high, colour)
            numbers.append({"panel": title[:3], "name": entry["name"], "mean": mean, "low": low,
                            "high": high, "verdict": entry["verdict"]})  # fmt: skip
    labels = [f"{_wrapped(e['name'])}\n{e['verdict']}" for e in entries]
    axis.set_yticks(range(len(entries)), labels, fontsize=6)
    for label, entry in zip(axis.get_yticklabels(), entries, strict=True):
        label.set_color(COLOURS[entry["verdict"]])
    axis.axvline(0.0, color="black", lw=0.8)
    axis.set_ylim(len(entries) - 0.4, -0.6)
    axis.set_xscale("symlog", linthresh=0.1, linscale=0.5)
    low, high = axis.get_xlim()
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(axis="x", alpha=0.25, lw=0.5)
    return numbers if numbers else _empty(axis)


def _empty(axis: Axes) -> Numbers:
    """A panel whose study was left out, or found no number, says so."""
    title = axis.get_title(loc="left")
    axis.clear()
    axis.set_title(title, loc="left")
    axis.set_axis_off()
    axis.text(0.5, 0.5, "not studied", transform=axis.transAxes, ha="center", color="0.5")
    return []


def _whisker(axis: Axes, mean: float, row: float, low: float, high: float, colour: str) -> None:
    """An unbounded interval is drawn as its mean alone."""
    spread = [
        [mean - low if np.isfinite(low) else 0.0],
        [high - mean if np.isfinite(high) else 0.0],
    ]
    axis.errorbar([mean], [row], xerr=np.maximum(spread, 0.0), color=colour, marker="o", ms=4)


def _wrapped(name: str) -> str:
    words, lines = name.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 36:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _gaps(axis: Axes, entries: Sequence[Entry]) -> Numbers:
    """Gap to Mix by cycle, and of the two orders; the bar is T7's bound or T8's lower estimate."""
    axis.set_title("(c) gap to Mix; bars: bounds (T7, T8)", loc="left")
    kept = [e for e in entries if isinstance(e["theory"], str) and e["theory"][:2] in ("<=", ">=")]
    numbers: Numbers = []
    for place, entry in enumerate(kept):
        bound = float(entry["theory"][2:])
        ends = [
            max(entry["measured"] - entry["low"], 0.0),
            max(entry["high"] - entry["measured"], 0.0),
        ]
        spread = [[v if np.isfinite(v) else 0.0] for v in ends]
        colour = COLOURS[entry["verdict"]]
        axis.errorbar([place], [entry["measured"]], yerr=spread, color=colour, marker="o", ms=4)
        axis.plot([place], [bound], **THEORY)
        numbers.append({"panel": "(c)", "bound": bound} | entry)
    axis.set_yscale("symlog", linthresh=0.1, linscale=0.5)
    names = [_short(entry["name"]) for entry in kept]
    axis.set_xticks(range(len(kept)), names, fontsize=6, rotation=45, ha="right")
    axis.set_ylabel("nats")
    axis.grid(axis="y", alpha=0.25, lw=0.5)
    return numbers if numbers else _empty(axis)


def _short(name: str) -> str:
    """`cycle 16` or the order of the stages."""
    return name.partition("(")[2].rstrip(")") or name.removeprefix("gap of ")


def _lams(axis: Axes, entries: Sequence[Entry]) -> Numbers:
    """Effective lam of ALRIGHT by clipping rule and nominal lam."""
    axis.set_title(r"(d) effective $\lambda$; bars: predicted", loc="left")
    styles = {"none": ("#0072B2", "s"), "global": ("#009E73", "o"), "per_step": ("#D55E00", "v")}
    numbers: Numbers = []
    for index, (rule, (colour, marker)) in enumerate(styles.items()):
        own = [e for e in entries if f"clipping {rule}," in e["name"]]
        if not own:
            continue
        lams = np.array([float(e["name"].rpartition("lam ")[2]) for e in own])
        mean, low, high = (
            np.array([e[k] for e in own], float) for k in ("measured", "low", "high")
        )
        spread = np.nan_to_num(np.stack([mean - low, high - mean]), posinf=0.0)
        x = lams + 0.02 * (index - 1)
        style: Entry = {"color": colour, "marker": marker, "ls": ""}
        axis.errorbar(x, mean, spread, label=rule, **style)
        axis.plot(x, [e["theory"] for e in own], **THEORY)
        numbers += [{"panel": "(d)"} | e for e in own]
    axis.plot([0, 1], [0, 1], color="0.6", lw=0.8, zorder=0)
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel=r"nominal $\lambda$", ylabel=r"effective $\lambda$")
    if not numbers:
        return _empty(axis)
    axis.legend(fontsize=6.5, title="clipping", title_fontsize=6.5)
    return numbers
