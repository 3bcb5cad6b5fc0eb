"""The figure of `llm.features --vary`: what the conflict on a model's features depends on."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from theory.plotting.style import COLOURS, LABELS, MARKERS, STYLE
from theory.schedulers import ORDERS

NAMES = {
    "dim": "dimensions",
    "base_policy": r"base policy $\pi_0$",
    "label_noise": "label noise",
    "beta": r"$\beta$ of DPO",
}
COSINE = "#0072B2"


def conflict_figure(settings: list[dict[str, Any]]) -> Figure:
    """Share of the joint gain that sequential training gives up, and the gradients' cosine.

    One column per option; bars and bands are bootstrap 95% intervals over prompts.
    """
    options = list(dict.fromkeys(record["option"] for record in settings))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.0 + 1.55 * len(options), 3.6), layout="constrained")
        axes = figure.subplots(2, len(options), squeeze=False, sharey="row", sharex="col")
        for column, option in zip(axes.T, options, strict=True):
            records = [record for record in settings if record["option"] == option]
            for order in ORDERS:
                values = [record[order]["share"] for record in records]
                style = {"color": COLOURS[order], "marker": MARKERS[order], "label": LABELS[order]}
                _draw(column[0], records, values, order, style)
            values = [record["gradient_cosine"] for record in records]
            _draw(column[1], records, values, "gradient_cosine", {"color": COSINE, "marker": "o"})
            column[0].set_yscale("log")
            column[1].axhline(0.0, color="0.6", lw=0.6)
            column[1].set_xlabel(NAMES[option])
            if option in ("dim", "beta"):
                column[1].set_xscale("log")
                places = [record["value"] for record in records]
                column[1].set_xticks(places, [f"{place:g}" for place in places])
                column[1].minorticks_off()
            column[1].margins(x=0.12)
        axes[0, 0].set_ylabel("share of the joint\ngain given up")
        axes[1, 0].set_ylabel("cosine of the\ngradients at start")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(handles))
    return figure


def _draw(
    axis: Axes,
    records: list[dict[str, Any]],
    values: list[float],
    name: str,
    style: dict[str, Any],
) -> None:
    places = [record["value"] for record in records]
    low, high = np.array([record["intervals"][name] for record in records]).T
    axis.plot(places, values, ls="none" if isinstance(places[0], str) else "-", **style)
    axis.vlines(places, low, high, color=style["color"], lw=1.0, alpha=0.6)
    axis.grid(alpha=0.25, lw=0.5)
