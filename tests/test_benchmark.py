"""The benchmark: both sides do the same work, and its numbers are what they say."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from theory.benchmark import (
    ALGORITHMS,
    QUICK,
    SOURCES,
    TOLERANCE,
    BenchmarkConfig,
    largest_difference,
    main,
    simulated,
    summarise,
)
from theory.plain import plain_run
from theory.records import read_json


class Result(NamedTuple):
    out: Path
    printed: str
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Result:
    out = tmp_path_factory.mktemp("benchmark") / "new"
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(io.StringIO()):
        main(["--quick", "--out", str(out)])
    return Result(out, printed.getvalue(), read_json(out / "summary.json"))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_plain_loop_follows_the_path_of_the_simulation(algorithm: str) -> None:
    """All three iterates; far below the tolerance, since no decision falls on a tie."""
    grid = [(0.2, 3), (0.7, 8)]
    trace = simulated(algorithm, grid, 150)
    for run, (lam, seed) in enumerate(grid):
        for iterate, theta in plain_run(algorithm, lam, seed, 150).items():
            np.testing.assert_allclose(trace.theta[iterate][-1, run], theta, rtol=0, atol=TOLERANCE)
            assert np.abs(theta).max() > 0.1  # it went somewhere


def test_two_sides_that_differ_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert largest_difference(QUICK) <= TOLERANCE
    monkeypatch.setattr("theory.plain.uniforms", lambda *_: np.full((1, 1024, 2), 0.5))
    assert largest_difference(QUICK) > 1e-3


def test_the_full_task_is_1800_runs_of_ten_thousand_steps() -> None:
    config = BenchmarkConfig()
    assert len(ALGORITHMS) * len(config.grid) == 1800
    assert config.num_steps == 10_000


def test_ratios_are_taken_round_by_round() -> None:
    times = {name: [1.0, 2.0, 4.0] for name in (*ALGORITHMS, *SOURCES)}
    times |= {f"plain {name}": [30.0, 40.0, 40.0] for name in ALGORITHMS}
    times["lazy"] = [3.0, 2.0, 8.0]
    ratios = summarise(times)
    assert ratios["lazy / fresh values"] == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert ratios["speed-up, mix"] == {"median": 20.0, "low": 10.0, "high": 30.0}
    # MAXRIGHT at exact values is the lazy one: 120 / 6, 160 / 8, 160 / 20.
    assert ratios["speed-up, all"] == {"median": 20.0, "low": 8.0, "high": 20.0}


def test_a_run_leaves_its_files_and_nothing_else(quick: Result) -> None:
    names = {"config.json", "summary.json", "benchmark.png", "benchmark.svg", "benchmark.json"}
    assert {path.name for path in quick.out.iterdir()} == names
    sidecar = read_json(quick.out / "benchmark.json")
    assert sidecar.pop("command") == f"python -m theory.benchmark --quick --out {quick.out}"
    assert sidecar == quick.summary
    assert read_json(quick.out / "config.json") == quick.summary["config"]


def test_the_summary_has_every_case_and_the_table_shows_it(quick: Result) -> None:
    times = quick.summary["nanoseconds_per_step"]
    assert set(times) == {
        *(f"plain {name}" for name in ALGORITHMS),
        *(name for name in ALGORITHMS if name != "maxright"),
        *SOURCES,
    }
    for rounds in times.values():
        assert len(rounds) == QUICK.rounds
        assert min(rounds) > 0.0
    assert 0.0 <= quick.summary["largest_difference"] <= TOLERANCE
    assert 50.0 < quick.summary["peak_mib"] < 1024.0
    for name in quick.summary["ratios"]:
        assert name in quick.printed
