"""Figures of the comparison: what is drawn is what the summary says, lines can be told apart."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from llm.compare import figures as plotting
from theory.plotting.style import COLOURS, LABELS
from theory.schedulers import ORDERS

KNOBS = (0.25, 0.5, 0.75)
BUDGETS = ("steps", "compute")
METRICS = ("f_dpo", "f_sft", *plotting.GAPS, "cost_per_step", "seconds_per_step")


def hand_made_summary(seeds: int = 3) -> dict[str, Any]:
    """All numbers differ; without seeds for an interval, its ends are infinite."""
    counter = itertools.count(1)
    settings = []
    for budget, line, knob in itertools.product(BUDGETS, COLOURS, KNOBS):
        entry: dict[str, Any] = {"budget": budget, "line": line, "knob": knob, "seeds": seeds}
        entry |= {"weight": 1.0 - knob if line == "sft_then_dpo" else knob, "num_steps": 100}
        for metric in METRICS:
            mean = 0.01 * next(counter)
            half = 0.1 * mean if seeds > 1 else np.inf
            entry[metric] = {"mean": mean, "low": mean - half, "high": mean + half}
        settings.append(entry)
    return {
        "settings": settings,
        "optima": {"dpo": 0.005, "sft": 0.004},
        "costs": {"sft_step": 3.0, "dpo_step": 5.0},
    }


def hand_made_paths() -> pd.DataFrame:
    rows = [
        {"budget": budget, "line": line, "knob": knob, "seed": seed, "step": step, "failed": ""}
        | {"f_dpo": 0.7 - 0.001 * step * (1 + i) + 0.01 * seed * (step > 0)}
        | {"f_sft": 0.3 + 0.002 * step * (1 + i)}
        for budget, (i, line), knob, seed, step in itertools.product(
            BUDGETS, enumerate(COLOURS), KNOBS, range(2), (0, 50, 100)
        )
    ]
    return pd.DataFrame(rows)


def entry_of(summary: dict[str, Any], budget: str, line: str, knob: float) -> dict[str, Any]:
    key = (budget, line, knob)
    (entry,) = (e for e in summary["settings"] if (e["budget"], e["line"], e["knob"]) == key)
    return dict(entry)


def render(figure: Figure) -> None:
    """Draws without a warning (an overfull layout would be one) at a width that a page can hold."""
    FigureCanvasAgg(figure).draw()
    assert figure.get_size_inches()[0] <= 7.2


def legend_labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_paths_are_means_over_seeds_of_the_first_budget_at_the_middle_knob() -> None:
    paths, summary = hand_made_paths(), hand_made_summary()
    figure, numbers = plotting.paths_figure(paths, summary)
    render(figure)
    assert legend_labels(figure)[:5] == [LABELS[line] for line in COLOURS]
    drawn = {n["line"]: n for n in numbers if n["panel"] == "paths"}
    assert list(drawn) == list(COLOURS)
    for line, record in drawn.items():
        own = paths[(paths["budget"] == "steps") & (paths["line"] == line) & (paths["knob"] == 0.5)]
        expected = own.groupby("step")["f_dpo"].mean()
        assert record["knob"] == 0.5
        assert record["step"] == expected.index.tolist()
        np.testing.assert_allclose(record["f_dpo"], expected)
        curves = [c for c in figure.axes[0].get_lines() if to_rgb(c.get_color()) ==
                  to_rgb(COLOURS[line]) and len(c.get_xdata()) == 3]  # fmt: skip
        assert any(np.allclose(c.get_xdata(), expected) for c in curves)
        assert len(curves) == 3  # two seeds and their mean
    ends = [n for n in numbers if n["panel"] == "end points"]
    assert len(ends) == len(COLOURS) * len(KNOBS)
    assert ends[0]["f_sft"] == entry_of(summary, "steps", ends[0]["line"], ends[0]["knob"])["f_sft"]


def test_gaps_are_drawn_in_order_of_the_weight_with_their_intervals() -> None:
    summary = hand_made_summary()
    figure, numbers = plotting.gaps_figure(summary)
    render(figure)
    assert len(figure.axes) == len(BUDGETS) * len(plotting.GAPS)
    assert len(numbers) == len(summary["settings"]) * len(plotting.GAPS)
    for axis, (budget, metric) in zip(
        figure.axes, itertools.product(BUDGETS, plotting.GAPS), strict=True
    ):
        for container, line in zip(axis.containers, COLOURS, strict=True):
            curve, _, (bars,) = container
            knobs = sorted(KNOBS, reverse=line == "sft_then_dpo")  # the weight is DPO's share
            own = [entry_of(summary, budget, line, knob)[metric] for knob in knobs]
            np.testing.assert_allclose(
                curve.get_ydata(orig=False), [interval["mean"] for interval in own]
            )
            assert to_rgb(curve.get_color()) == to_rgb(COLOURS[line])
            ends = np.array([segment[:, 1] for segment in bars.get_segments()], dtype=float)
            np.testing.assert_allclose(ends, [[i["low"], i["high"]] for i in own])
            # Shifted aside for legibility, by less than half of the way to the next weight.
            assert np.all(np.abs(curve.get_xdata(orig=False) - np.array(KNOBS)) < 0.125)


def test_costs_are_relative_to_sequential_training() -> None:
    summary = hand_made_summary()
    figure, numbers = plotting.compute_figure(summary)
    render(figure)
    costs = {n["line"]: n for n in numbers if n["panel"] == "cost"}
    middles = {line: entry_of(summary, "steps", line, 0.5) for line in COLOURS}
    sequential = np.mean([middles[order]["seconds_per_step"]["mean"] for order in ORDERS])
    for bar, (line, entry) in zip(figure.axes[0].patches, middles.items(), strict=True):
        # The mean of a DPO and an SFT step costs 4.
        assert bar.get_height() == pytest.approx(entry["cost_per_step"]["mean"] / 4.0)
        assert costs[line]["measured"]["mean"] == pytest.approx(
            entry["seconds_per_step"]["mean"] / sequential
        )
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    expected = [
        entry_of(summary, budget, line, 0.5)["ideal_distance"]["mean"]
        for budget, line in itertools.product(BUDGETS, COLOURS)
    ]
    assert heights == pytest.approx(expected)


def test_a_setting_without_a_finished_run_and_a_single_seed_leave_no_mark() -> None:
    summary = hand_made_summary(seeds=1)
    for entry in summary["settings"]:
        if entry["line"] == "mix":
            entry |= {"seeds": 0} | dict.fromkeys(METRICS)
    for figure, numbers in (
        plotting.gaps_figure(summary),
        plotting.compute_figure(summary),
        plotting.paths_figure(hand_made_paths().query("line != 'mix'"), summary),
    ):
        render(figure)
        assert "mix" not in {number.get("line") for number in numbers}
    axes = plotting.gaps_figure(summary)[0].axes
    containers = [container for axis in axes for container in axis.containers]
    bars = [segment for each in containers for segment in each[2][0].get_segments()]
    assert all(np.ptp(segment[:, 1]) == 0.0 for segment in bars)
