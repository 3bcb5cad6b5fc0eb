"""The command: what it leaves, that it reproduces, and what it refuses."""

from __future__ import annotations

import io
import shlex
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from _asserts import assert_one_line_error

from theory.beyond_experiment import PARTS, main
from theory.cli import run_command
from theory.records import read_json

NAMES = [kind.name for kinds in PARTS.values() for kind in kinds]
SMALL = ["--steps", "64", "--seeds", "2", "--problem", "bernoulli", "toy2d"]


class Run(NamedTuple):
    out: Path
    printed: str
    progress: str


def run_main(argv: list[str], out: Path, jobs: int = 1) -> Run:
    printed, progress = io.StringIO(), io.StringIO()
    with redirect_stdout(printed), redirect_stderr(progress):
        main([*argv, "--jobs", str(jobs), "--out", str(out)])
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


def test_the_recorded_command_reproduces_every_file_in_parallel(tmp_path: Path) -> None:
    argv = ["--part", "switches", "--steps", "64", "--seeds", "2", "--lam", "0.25"]
    argv += ["--problem", "bernoulli", "toy2d"]
    first = run_main(argv, tmp_path / "first")
    recorded = shlex.split(read_json(first.out / "switches" / "switches.json")["command"])
    assert recorded[:3] == ["python", "-m", "theory.beyond_experiment"]
    second = run_main(recorded[3:], tmp_path / "second", jobs=2)
    for file in files("switches") - {"results.parquet"}:
        one, other = (run.out / "switches" / file for run in (first, second))
        assert one.read_bytes() == other.read_bytes()
    tables = [pd.read_parquet(run.out / "switches" / "results.parquet") for run in (first, second)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_one_seed_has_no_interval_and_still_draws(tmp_path: Path) -> None:
    argv = ["--part", "switches", "optimizers", "--steps", "64", "--seeds", "1"]
    run = run_main([*argv, "--problem", "bernoulli"], tmp_path)
    last = read_json(run.out / "switches" / "summary.json")["bernoulli"]["last"]
    assert all(np.isfinite(value["mean"]) and value["low"] is None for value in last)


@pytest.mark.parametrize(
    ("argv", "mentions"),
    [
        (["--part", "everything"], ("everything", "switches")),
        (["--steps", "10"], ("10", "64")),
        (["--part", "equal_compute", "--lam", "0.3"], ("--lam", "equal_compute")),
        (["--part", "switches", "--lam", "1.5"], ("1.5",)),
        (["--part", "switches", "--lam", "0.37", "--steps", "64"], ("0.37", "64")),
        (["--part", "optimizers", "--lam", "1"], ("lam",)),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    argv: list[str], mentions: tuple[str, ...], tmp_path: Path
) -> None:
    out, printed = tmp_path / "results", io.StringIO()
    with redirect_stderr(printed), pytest.raises(SystemExit) as stopped:
        run_command(lambda: main([*argv, "--out", str(out)]), "beyond")
    assert stopped.value.code
    message = stopped.value.code if isinstance(stopped.value.code, str) else printed.getvalue()
    assert_one_line_error(message.strip(), *mentions)
    assert not out.exists()


def test_a_file_in_the_way_of_the_output_is_named(tmp_path: Path) -> None:
    (tmp_path / "switches").write_text("kept")
    with pytest.raises(ValueError, match="switches exists"):
        run_main(["--part", "switches", *SMALL], tmp_path)
    assert (tmp_path / "switches").read_text() == "kept"
