"""Figures from records: what is drawn is what the table says, and every line can be told apart."""

from __future__ import annotations

import itertools
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from theory.compared import ALGORITHMS, EVEN_SPLIT, joint
from theory.metrics import Interval, middle
from theory.plotting import gap as plotting
from theory.plotting import style
from theory.schedulers import ORDERS

PROBLEMS = ("first", "second")
STEPS = (10, 100, 1000)
SPLITS = (0.25, EVEN_SPLIT, 0.9)
LIMITS = {"dpo_then_sft": 0.4, "sft_then_dpo": 0.2}
JOINT = joint(ALGORITHMS)
LINES = (*ORDERS, *JOINT)


def hand_made_groups(problems: tuple[str, ...] = PROBLEMS) -> pd.DataFrame:
    """Positive numbers, all different; rows in no useful order, other iterates and lams mixed in.

    Per step, another split is the best one: the hindsight line must follow it.
    """
    counter = itertools.count(1)
    rows = []
    for problem, lam, iterate, step in itertools.product(
        problems, (0.5, 0.9), ("last", "weighted"), reversed(STEPS)
    ):
        runs = [(name, name, np.nan) for name in JOINT]
        runs += [
            ("sequential", f"{o}, split={s:g}", s) for o, s in itertools.product(ORDERS, SPLITS)
        ]
        for algorithm, variant, split in runs:
            means = [
                1e-3 * next(counter) * (10.0 if m == "max_gap" else 1.0) for m in style.GAP_NAMES
            ]
            if split == SPLITS[STEPS.index(step)]:
                means = [mean / 100.0 for mean in means]
            row = {"problem": problem, "algorithm": algorithm, "variant": variant, "split": split}
            row |= {"lam": lam, "step": step, "iterate": iterate, "seeds": 20}
            gaps = {
                metric: Interval(mean, mean / 2.0, mean * 2.0)
                for metric, mean in zip(style.GAP_NAMES, means, strict=True)
            }
            rows.append(row | gaps)
    return pd.DataFrame(rows)


def references(problems: tuple[str, ...] = PROBLEMS) -> dict[str, Any]:
    limits = {order: {"mix_gap": limit} for order, limit in LIMITS.items()}
    return {name: {"lam": {"0.5": {"sequential_limit": limits}}} for name in problems}


def draw(problems: tuple[str, ...] = PROBLEMS) -> tuple[Figure, list[dict[str, Any]]]:
    groups, limits = hand_made_groups(problems), references(problems)
    return plotting.gap_figure(groups, limits, lam=0.5, even_split=EVEN_SPLIT)


def expected_intervals(problem: str, metric: str, line: str) -> dict[int, Interval]:
    """The table's intervals at lam = 1/2, alpha-weighted, even split: step -> interval."""
    found = {}
    for _, row in hand_made_groups().iterrows():
        name = (
            row["variant"].split(",")[0] if row["algorithm"] == "sequential" else row["algorithm"]
        )
        even = row["algorithm"] != "sequential" or row["split"] == EVEN_SPLIT
        wanted = (row["problem"], row["lam"], row["iterate"]) == (problem, 0.5, "weighted")
        if wanted and even and name == line:
            found[row["step"]] = row[metric]
    return found


def panels(figure: Figure) -> dict[tuple[str, str], Axes]:
    """Axes by (metric, problem): rows are metrics, columns problems."""
    keys = itertools.product(style.GAP_NAMES, PROBLEMS)
    return dict(zip(keys, figure.axes, strict=True))


def line_of(axes: Axes, label: str) -> Any:
    (line,) = [line for line in axes.get_lines() if line.get_label() == label]
    return line


# --- the house style


def test_every_algorithm_has_a_colour_a_marker_and_a_label_of_its_own() -> None:
    for table in (style.COLOURS, style.MARKERS, style.LABELS):
        assert set(table) == {*ORDERS, *JOINT}
        assert len(set(table.values())) == len(table)


def test_colours_are_far_apart() -> None:
    """Euclidean distance in RGB; the two oranges of the sequential orders are the closest."""
    colours = [np.array(to_rgb(colour)) for colour in style.COLOURS.values()]
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2)]
    assert min(distances) > 0.25


SEEN = {
    "normal": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
"""Linear RGB as the eye sees it: Machado, Oliveira and Fernandes (2009), severity 1."""


def lab(colour: str, seen: Any) -> np.ndarray:
    """CIELAB (D65) of an sRGB colour as an eye sees it."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]]
    xyz = to_xyz @ np.clip(seen @ linear, 0.0, 1.0) / [0.9505, 1.0, 1.0888]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", SEEN.values(), ids=list(SEEN))
def test_what_is_no_algorithm_of_the_paper_has_colours_of_its_own(seen: Any) -> None:
    """About 2.3 is just noticeable; the style promises 15."""
    own = [lab(colour, np.array(seen)) for colour in style.OTHER_COLOURS.values()]
    algorithms = [lab(colour, np.array(seen)) for colour in style.COLOURS.values()]
    pairs = [*itertools.combinations(own, 2), *itertools.product(own, algorithms)]
    assert min(float(np.linalg.norm(a - b)) for a, b in pairs) > 15.0


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6))
def test_middle_is_the_lam_closest_to_one_half(lams: list[float]) -> None:
    assert middle(lams) in lams
    assert abs(middle(lams) - 0.5) == min(abs(lam - 0.5) for lam in lams)


@given(
    st.sets(st.sampled_from([*LINES, "alternate", "importance", *"abcdefgh", "own.module:Mine"]))
)
def test_every_set_of_lines_has_looks_of_its_own(names: set[str]) -> None:
    """The same whatever their order, and the paper's lines as everywhere."""
    looks = style.looks(sorted(names))
    assert looks == style.looks(sorted(names, reverse=True))
    assert looks.keys() == names
    assert list(looks)[: len(names & set(LINES))] == [n for n in style.COLOURS if n in names]
    for name, look in looks.items():
        assert look.label == style.LABELS.get(name, look.label)
        assert ":" not in look.label
    assert len({(look.colour, look.marker) for look in looks.values()}) == len(names)


# --- the gap figure


def test_the_numbers_returned_are_the_tables_and_the_lines_and_bands_drawn_are_they() -> None:
    figure, numbers = draw()
    assert len(numbers) == len(PROBLEMS) * len(style.GAP_NAMES) * len(LINES) * len(STEPS)
    for (metric, problem), axes in panels(figure).items():
        assert len(axes.collections) == len(LINES)
        for name, band in zip(LINES, axes.collections, strict=True):
            key = (problem, metric, name)
            mine = [n for n in numbers if (n["problem"], n["metric"], n["line"]) == key]
            assert [n["step"] for n in mine] == list(STEPS)
            intervals = expected_intervals(*key)
            assert all((n["mean"], n["low"], n["high"]) == intervals[n["step"]] for n in mine)
            line = line_of(axes, style.LABELS[name])
            assert list(line.get_xdata()) == list(STEPS)
            assert list(line.get_ydata()) == [n["mean"] for n in mine]
            look = (line.get_color(), line.get_marker())
            assert look == (style.COLOURS[name], style.MARKERS[name])
            corners = {(int(x), float(y)) for x, y in band.get_paths()[0].vertices}
            assert corners >= {(n["step"], n[end]) for n in mine for end in ("low", "high")}


def test_dashed_lines_follow_the_best_split_at_each_step() -> None:
    groups = hand_made_groups()
    figure, _ = draw()
    for (metric, problem), axes in panels(figure).items():
        dashed = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
        assert [line.get_color() for line in dashed] == [style.COLOURS[o] for o in ORDERS]
        for order, line in zip(ORDERS, dashed, strict=True):
            best = []
            for step in STEPS:
                chosen = groups[
                    (groups["problem"] == problem)
                    & (groups["lam"] == 0.5)
                    & (groups["iterate"] == "weighted")
                    & (groups["step"] == step)
                    & groups["variant"].str.startswith(order)
                ]
                best.append(min(interval.mean for interval in chosen[metric]))
            assert list(line.get_ydata()) == best
            assert list(line.get_xdata()) == list(STEPS)


def test_the_limits_are_drawn_over_the_mix_gaps_only() -> None:
    figure, _ = draw()
    for (metric, _), axes in panels(figure).items():
        dotted = {
            line.get_color(): line.get_ydata()[0]
            for line in axes.get_lines()
            if line.get_linestyle() == ":"
        }
        expected = {style.COLOURS[order]: limit for order, limit in LIMITS.items()}
        assert dotted == (expected if metric == "mix_gap" else {})


def test_axes_are_logarithmic_and_labelled() -> None:
    figure, _ = draw()
    for axes in figure.axes:
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    top_left, top_right, bottom_left, _ = figure.axes
    assert [top_left.get_title(), top_right.get_title()] == list(PROBLEMS)
    assert "Mix" in top_left.get_ylabel()
    assert "Max" in bottom_left.get_ylabel()
    label = figure.get_supxlabel()
    assert all(part in label for part in ("steps", "= 0.5", "20 seeds", "95%"))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_legend_names_every_line_and_fits_into_the_figure(count: int) -> None:
    figure, _ = draw(tuple(f"problem {i}" for i in range(count)))
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels[: len(LINES)] == list(style.LABELS.values())
    assert len(labels) == len(LINES) + 2  # the dashed and the dotted lines
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = legend.get_window_extent(canvas.get_renderer())
    assert box.x0 >= 0.0
    assert box.x1 <= figure.bbox.width
    assert box.y1 <= figure.bbox.height
    assert box.y0 >= max(a.get_window_extent().y1 for a in figure.axes)


def test_a_single_seed_draws_without_a_band() -> None:
    groups = hand_made_groups()
    for metric in style.GAP_NAMES:
        groups[metric] = [Interval(i.mean, -np.inf, np.inf) for i in groups[metric]]
    figure, numbers = plotting.gap_figure(groups, references(), 0.5, EVEN_SPLIT)
    FigureCanvasAgg(figure).draw()  # warnings are errors
    assert all(np.isfinite(number["mean"]) for number in numbers)
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert 1e-6 < low < high < 1e3


def test_drawing_leaves_no_global_state_and_the_table_alone() -> None:
    settings, open_figures, groups = dict(mpl.rcParams), plt.get_fignums(), hand_made_groups()
    figure, _ = plotting.gap_figure(groups, references(), 0.5, EVEN_SPLIT)
    assert isinstance(figure, Figure)
    assert plt.get_fignums() == open_figures
    assert dict(mpl.rcParams) == settings
    pd.testing.assert_frame_equal(groups, hand_made_groups())
