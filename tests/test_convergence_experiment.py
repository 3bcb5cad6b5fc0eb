"""The convergence experiment: what it writes, and what the theorems demand of it.

A small run through `main` (two problems, T = 2,000, fitted from 200 on) serves most tests.
"""

from __future__ import annotations

import io
import shlex
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from theory.convergence_experiment import (
    ConvergenceConfig,
    bound_curves,
    limits,
    main,
    methods,
)
from theory.plotting import convergence as plotting
from theory.records import read_json
from theory.simulate import ITERATES, log_spaced_steps
from theory.sweep import summarise

PROBLEMS = ("bernoulli", "toy2d")
LAM = 0.3
ARGV = shlex.split(
    f"--problem {' '.join(PROBLEMS)} --lam {LAM} --steps 2000 --fit_from 200 --seeds 8 --jobs 1"
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("convergence") / "new"
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        main([*ARGV, "--out", str(out)])
    return out


def rates_of(out: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    rates = read_json(out / "summary.json")["rates"]
    return {(r["problem"], r["method"], r["iterate"]): r for r in rates}


# --- what a run leaves


def test_every_problem_method_and_iterate_has_one_rate(small: Path) -> None:
    rates = read_json(small / "summary.json")["rates"]
    keys = [(r["problem"], r["method"], r["iterate"]) for r in rates]
    names = [method.name for method in methods(2000)]
    assert keys == [(p, m, i) for p in PROBLEMS for m in names for i in ITERATES]
    assert all(r["slope"]["low"] <= r["slope"]["high"] for r in rates)


def test_sequential_runs_are_a_training_of_their_own_at_each_budget(small: Path) -> None:
    rows = pd.read_parquet(small / "results.parquet")
    rows = rows[rows["algorithm"] == "sequential"]
    assert set(rows["step"]) == set(log_spaced_steps(2000, per_decade=2).tolist())
    first = rows["variant"].eq("dpo_then_sft")
    np.testing.assert_array_equal(rows.loc[first, "dpo_gradients"], rows.loc[first, "step"] // 2)
    np.testing.assert_array_equal(rows.loc[~first, "sft_gradients"], rows.loc[~first, "step"] // 2)


# --- what the theorems demand


def test_every_mean_gap_stays_below_its_bound(small: Path) -> None:
    bounded = [rate for rate in rates_of(small).values() if rate["final_bound"] is not None]
    assert len(bounded) == len(PROBLEMS) * 19
    for rate in bounded:
        assert rate["gap_below_bound"]
        assert rate["final_gap"]["mean"] <= rate["final_bound"]


def test_averages_of_mix_and_exact_maxright_fall_no_slower_than_their_bound(small: Path) -> None:
    """The fitted slope itself: 8 seeds over one decade leave some of the intervals open."""
    for problem in PROBLEMS:
        for method, iterate in (("mix", "uniform"), ("mix", "weighted"), ("exact", "weighted")):
            rate = rates_of(small)[problem, method, iterate]
            assert rate["slope"]["mean"] <= rate["bound_slope"]


def test_sequential_training_has_no_rate(small: Path) -> None:
    for problem in PROBLEMS:
        for order in ("dpo_then_sft", "sft_then_dpo"):
            rate = rates_of(small)[problem, order, "weighted"]
            assert rate["slope"]["high"] > -0.1
            mix = rates_of(small)[problem, "mix", "weighted"]
            assert rate["final_gap"]["low"] > 10.0 * mix["final_gap"]["high"]


def test_values_that_are_never_renewed_end_higher_than_exact_ones(small: Path) -> None:
    for problem in PROBLEMS:
        stale, exact = (rates_of(small)[problem, m, "weighted"] for m in ("stale k=inf", "exact"))
        assert stale["final_gap"]["mean"] > exact["final_gap"]["mean"]


def test_verdicts_follow_from_the_numbers_beside_them(small: Path) -> None:
    for rate in rates_of(small).values():
        slope, bound, verdict = rate["slope"], rate["bound_slope"], rate["slope_below_bound"]
        if bound is None:
            assert verdict is None
        else:
            expected = {"yes": slope["high"] <= bound, "no": slope["low"] > bound}
            assert expected.get(verdict, not any(expected.values()))


# --- figures


def test_the_curves_are_the_table_and_the_bounds_the_theorems(small: Path) -> None:
    results = pd.read_parquet(small / "results.parquet")
    drawn = pd.DataFrame(read_json(small / "convergence.json")["panels"])
    weighted = results[results["iterate"] == "weighted"]
    for (problem, metric, line), rows in drawn[drawn["mean"].notna()].groupby(
        ["problem", "metric", "line"]
    ):
        table = weighted[(weighted["problem"] == problem) & (weighted["variant"] == line)]
        expected = table.groupby("step")[metric].mean()
        np.testing.assert_array_equal(rows["step"], expected.index)
        np.testing.assert_allclose(rows["mean"], expected, rtol=1e-12)
    config = ConvergenceConfig(PROBLEMS, (LAM,), 2000, 8, 200)
    curves = bound_curves(config)
    for problem in PROBLEMS:
        rows = drawn[(drawn["problem"] == problem) & (drawn["line"] == "bound of alright")]
        np.testing.assert_allclose(rows["bound"], curves[problem, LAM, "alright", "weighted"])


def test_each_line_has_a_colour_and_a_marker_of_its_own() -> None:
    for lines in plotting.lines(method.name for method in methods(2000)).values():
        looks = list(lines.values())
        assert len({to_rgb(look.colour) for look in looks}) == len(looks)
        assert len({look.marker for look in looks}) == len(looks)


def test_the_figures_show_every_method_of_the_experiment(small: Path) -> None:
    config = ConvergenceConfig(PROBLEMS, (LAM,), 2000, 8, 200)
    results = pd.read_parquet(small / "results.parquet")
    figure, _ = plotting.convergence_figure(
        summarise(results), bound_curves(config), limits(config), LAM
    )
    assert len(figure.axes) == 2 * len(PROBLEMS)
    rates = read_json(small / "summary.json")["rates"]
    forest, numbers = plotting.slopes_figure(rates, LAM)
    labels = [text.get_text() for text in forest.axes[0].get_yticklabels()]
    assert len(set(labels)) == len(methods(2000))
    assert numbers == rates
