"""The command with all its parts: what it leaves and what reaches whom."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from theory.beyond_experiment import PARTS, main
from theory.records import read_json

NAMES = [kind.name for kinds in PARTS.values() for kind in kinds]
SMALL = ["--steps", "64", "--seeds", "2", "--problem", "bernoulli", "toy2d"]


class Run(NamedTuple):
    out: Path
    printed: str
    progress: str


def run_main(argv: list[str], out: Path) -> Run:
    printed, progress = io.StringIO(), io.StringIO()
    with redirect_stdout(printed), redirect_stderr(progress):
        main([*argv, "--jobs", "1", "--out", str(out)])
    return Run(out, printed.getvalue(), progress.getvalue())


def files(name: str) -> set[str]:
    figure = {f"{name}.{suffix}" for suffix in ("png", "svg", "json")}
    return {"config.json", "results.parquet", "summary.json"} | figure


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_main(SMALL, tmp_path_factory.mktemp("beyond") / "new" / "directory")


def test_all_parts_leave_their_files_and_nothing_else(small: Run) -> None:
    assert {path.name for path in small.out.iterdir()} == set(NAMES)
    for name in NAMES:
        assert {path.name for path in (small.out / name).iterdir()} == files(name)


def test_flags_reach_the_experiments_that_know_them(small: Run) -> None:
    for name in NAMES:
        config = read_json(small.out / name / "config.json")
        assert config["num_steps"] == 64
        assert config["num_seeds"] == 2
        assert config.get("problems", ["bernoulli", "toy2d"]) == ["bernoulli", "toy2d"]


def test_the_report_and_a_progress_bar_are_shown(small: Run) -> None:
    for words in ("switches", "equal compute", "Effective lam", "equalisation", "Stays"):
        assert words in small.printed
    assert small.progress.count("100%") >= len(NAMES)


def test_sidecars_hold_the_command_the_configuration_and_finite_numbers(small: Run) -> None:
    for name in NAMES:
        sidecar = read_json(small.out / name / f"{name}.json")
        assert sidecar["config"] == read_json(small.out / name / "config.json")
        assert sidecar["command"].startswith("python -m theory.beyond_experiment --part switches")
        assert len(sidecar["numbers"]) > 5
        assert all(np.isfinite(row["mean"]) for row in sidecar["numbers"])


def test_one_seed_has_no_interval_and_still_draws(tmp_path: Path) -> None:
    argv = ["--part", "switches", "optimizers", "--steps", "64", "--seeds", "1"]
    run = run_main([*argv, "--problem", "bernoulli"], tmp_path)
    last = read_json(run.out / "switches" / "summary.json")["bernoulli"]["last"]
    assert all(np.isfinite(value["mean"]) and value["low"] is None for value in last)


def test_a_file_in_the_way_of_the_output_is_named(tmp_path: Path) -> None:
    (tmp_path / "switches").write_text("kept")
    with pytest.raises(ValueError, match="switches exists"):
        run_main(["--part", "switches", *SMALL], tmp_path)
    assert (tmp_path / "switches").read_text() == "kept"
