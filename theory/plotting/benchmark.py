"""The figure of `theory.benchmark`: numbers in, Figure out."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from theory.plotting.style import COLOURS, LABELS, STYLE

ALGORITHMS = ("mix", "alright", "maxright", "sequential")
SOURCES = ("exact", "lazy", "fresh", "same")


def cost_figure(times: dict[str, list[float]]) -> Figure:
    """CPU time per step of a run: the plain loop against the batch, and MAXRIGHT by source."""
    medians = {name: float(np.median(rounds)) / 1e3 for name, rounds in times.items()}
    medians["maxright"] = medians["lazy"]
    plain = {a: medians[f"plain {a}"] for a in ALGORITHMS}
    ours = {a: medians[a] for a in ALGORITHMS}
    names = LABELS | {"sequential": "sequential"}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 2.3), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(4, 3))
        positions = np.arange(len(ALGORITHMS))
        for shift, label, colour, values in (
            (0.2, "plain NumPy loop", "0.65", plain),
            (-0.2, "this package", COLOURS["mix"], ours),
        ):
            bars = left.barh(positions + shift, values.values(), 0.38, color=colour, label=label)
            left.bar_label(bars, fmt="%.2g", padding=2, fontsize=7)
        left.set_yticks(positions, [names[a] for a in ALGORITHMS])
        left.set_xscale("log")
        left.set_xlim(min(ours.values()) / 3, 4 * max(plain.values()))
        left.set_title("four algorithms (log scale)")
        bars = right.barh(SOURCES, [medians[s] for s in SOURCES], 0.6, color=COLOURS["maxright"])
        right.bar_label(bars, fmt="%.2g", padding=2, fontsize=7)
        right.set_xlim(right=1.2 * max(medians[s] for s in SOURCES))
        right.set_title("MAXRIGHT by source of values")
        figure.supxlabel("CPU time per step of a run (µs)", fontsize=8)
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure
