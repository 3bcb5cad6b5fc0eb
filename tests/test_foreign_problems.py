"""Problems of a package of somebody else's, and names that are no problem."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from _asserts import assert_one_line_error
from _stranger import importable, write_package

from theory import gap_experiment
from theory.cli import UserError
from theory.command import distinct_problems, problem_name
from theory.foreign import source_digest
from theory.problems import PROBLEMS, make_problem, short_name
from theory.sweep import Batch, run_sweep

SOURCE = """
from dataclasses import dataclass
import numpy as np
from theory.objectives import Constants, StochasticObjective
from theory.problems import Problem

@dataclass(frozen=True, eq=False)
class Spread(StochasticObjective):
    target: float
    dim = 2
    def value(self, theta): return np.sum((theta - self.target) ** 2, axis=-1) / 2
    def gradient(self, theta): return theta - self.target
    def hessian(self, theta): return np.eye(2)
    def constants(self, radius): return Constants(9.0, 1.0, 1.0)
    def stochastic_gradient(self, theta, draws):
        error = theta - self.target - (draws - 0.5)
        return error, np.sum(error**2, axis=1) / 2

def apart(distance=1.0): return Problem("apart", (Spread(distance), Spread(-distance)), 9.0, 1.0)
def needs(distance): return apart(distance)
def fails(): raise KeyError("two\\nlines")
def other(): return 3
number = 3
"""
OWN = "stranger.problems:apart"


@pytest.fixture
def package(tmp_path: Path) -> Iterator[Path]:
    folder = write_package(tmp_path)
    (folder / "problems.py").write_text(SOURCE)
    with importable(tmp_path):
        source_digest.cache_clear()
        yield folder


def batches(**parameters: Any) -> list[Batch]:
    common: dict[str, Any] = {"lams": (0.3, 0.7), "seeds": (0, 1), "num_steps": 50}
    return [
        Batch(OWN, name, **common, parameters=parameters) for name in ("mix", "maxright", "alright")
    ]


def test_a_foreign_problem_is_swept_in_other_processes_and_continued(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = pd.concat([batch.run() for batch in batches(distance=2.0)], ignore_index=True)
    options: dict[str, Any] = {"parts": tmp_path / "parts", "progress": False}
    first = run_sweep(batches(distance=2.0), jobs=2, **options)
    pd.testing.assert_frame_equal(first, alone)
    assert first["mix_gap"].min() >= 0.0
    monkeypatch.setattr(Batch, "run", lambda batch: pytest.fail("it is finished"))
    again = run_sweep(batches(distance=2.0), jobs=1, backend="sequential", **options)
    pd.testing.assert_frame_equal(again, first)


def test_batches_of_another_source_are_not_taken(package: Path) -> None:
    keys = [batch.key for batch in batches()]
    assert [batch.key for batch in batches()] == keys
    (package / "problems.py").write_text(SOURCE.replace("9.0, 1.0)", "8.0, 1.0)"))
    source_digest.cache_clear()  # as a new process would find it
    assert not set(keys) & {batch.key for batch in batches()}


def test_a_foreign_problem_runs_from_the_command_line(package: Path, tmp_path: Path) -> None:
    flags = ["--lam", "0.5", "--steps", "60", "--seeds", "2", "--jobs", "1"]
    gap_experiment.main(["--problem", OWN, *flags, "--out", str(tmp_path / "out")])
    table = pd.read_parquet(tmp_path / "out" / "results.parquet")
    assert set(table["problem"]) == {OWN}
    assert np.all(np.isfinite(table["mix_gap"]))


@pytest.mark.parametrize(
    ("name", "parameters", "mentions"),
    [
        ("rosenbrock", {}, [*PROBLEMS, ".npz", "package.module:function"]),
        ("bernoulli", {"temperature": 1.0}, ["temperature", "p, q, beta, radius"]),
        ("stranger.nowhere:apart", {}, ["stranger.nowhere"]),
        ("stranger.problems:nothing", {}, ["stranger.problems has no 'nothing'"]),
        ("stranger.problems:number", {}, ["is no function"]),
        ("stranger.problems:other", {}, ["returns a int, not a theory.problems.Problem"]),
        ("stranger.problems:fails", {}, ["KeyError", "two"]),
        ("stranger.problems:needs", {}, ["missing a required argument: 'distance'"]),
        (OWN, {"temperature": 1.0}, ["temperature", "distance"]),
        ("stranger.broken:apart", {}, ["ZeroDivisionError"]),
        (":", {}, ["cannot import"]),
    ],
)
def test_a_name_or_parameter_that_makes_no_problem_is_one_line(
    name: str, parameters: dict[str, Any], mentions: list[str], package: Path
) -> None:
    (package / "broken.py").write_text("1 / 0")
    with pytest.raises(ValueError, match=name.split(":")[0] or ":") as error:
        make_problem(name, **parameters)
    assert_one_line_error(str(error.value), *mentions)


def test_figures_and_files_are_named_after_the_function(package: Path) -> None:
    assert problem_name(OWN) == OWN
    names = [OWN, "softmax", "dir.d/my.data.npz"]
    assert [short_name(name) for name in names] == ["apart", "softmax", "my.data"]
    with pytest.raises(UserError, match="same file name"):
        distinct_problems(["stranger.problems:softmax", "softmax"])
