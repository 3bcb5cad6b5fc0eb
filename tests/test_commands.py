"""What every command of `theory` does: leaves its files, repeats itself, resumes, refuses.

Each runs once, small, in an empty directory and with the default --out; most tests read what it
left. What the numbers must show stands in the tests of the experiments.
"""

from __future__ import annotations

import importlib
import io
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
from _asserts import assert_one_line_error

from theory.cli import run_command
from theory.records import read_json
from theory.schedulers import REGISTRY
from theory.sweep import FINISHED, Batch

ROOT = Path(__file__).parents[1]


class Command(NamedTuple):
    flags: str
    figures: tuple[str, ...]
    help: str
    """Flags of its own and defaults."""
    folder: str = ""
    """Below --out, where the files are."""

    @property
    def files(self) -> set[str]:
        figures = {f"{name}.{end}" for name in self.figures for end in ("png", "svg", "json")}
        return {"config.json", "results.parquet", "summary.json"} | figures


ON_TWO = "--problem bernoulli quadratic --lam 0.7 0.3 --seeds 2 --refresh_every 3 --steps"
ALL = "--algo sequential mix alright maxright"
SWEEPS = {
    "gap_experiment": Command(f"{ON_TWO} 20", ("gap",), f"--refresh_every {ALL} 100000 20"),
    "convergence_experiment": Command(
        "--problem bernoulli --lam 0.3 --steps 40 --fit_from 4 --seeds 2",
        ("convergence", "slopes"),
        f"--fit_from 1000 30000 {ALL}",
    ),
    "pareto_experiment": Command(
        f"{ON_TWO} 100",
        ("front", "overview_bernoulli", "overview_quadratic"),
        f"--refresh_every 10000 {ALL}",
    ),
    "predictions": Command(
        "--problem bernoulli --lam 0.7 0.3 --steps 100 --seeds 2 --tolerance 0.02",
        ("predictions",),
        "--refresh_every --tolerance 20000 0.01",
    ),
    "beyond_experiment": Command(
        "--part switches --problem bernoulli toy2d --lam 0.25 --steps 64 --seeds 2",
        ("switches",),
        "--part all",
        "switches",
    ),
}
NAMES = [*SWEEPS, "benchmark"]
EVERY = pytest.mark.parametrize("name", SWEEPS)


def main_of(name: str) -> Callable[[list[str]], None]:
    module = f"theory.{name}" + (".__main__" if name == "predictions" else "")
    main: Callable[[list[str]], None] = importlib.import_module(module).main
    return main


class Run(NamedTuple):
    command: Command
    folder: Path
    printed: str
    progress: str

    def said(self) -> str:
        """The command in a sidecar."""
        return str(read_json(self.folder / f"{self.command.figures[0]}.json")["command"])


def run(name: str, flags: str, where: Path, out: str | None = None) -> Run:
    """The command run in the directory `where`."""
    command, printed, progress = SWEEPS[name], io.StringIO(), io.StringIO()
    where.mkdir(exist_ok=True)
    with chdir(where), redirect_stdout(printed), redirect_stderr(progress):
        main_of(name)([*shlex.split(flags), *(["--out", out] if out else [])])
    folder = where / (out or f"runs/{name}") / command.folder
    return Run(command, folder, printed.getvalue(), progress.getvalue())


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    runs: dict[str, Run] = {}

    def once(name: str) -> Run:
        if name not in runs:
            flags = f"{SWEEPS[name].flags} --jobs 1"
            runs[name] = run(name, flags, tmp_path_factory.mktemp(name))
        return runs[name]

    return once


def assert_same_files(first: Path, second: Path, names: set[str]) -> None:
    for name in names - {"results.parquet"}:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    tables = [pd.read_parquet(folder / "results.parquet") for folder in (first, second)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


# --- what a run leaves and shows


@EVERY
def test_a_run_leaves_its_files_under_runs_and_shows_its_table(
    name: str, ran: Callable[[str], Run]
) -> None:
    done = ran(name)
    top = done.folder.parents[1 + bool(done.command.folder)]
    assert files_in(top) == {done.folder / file for file in done.command.files}
    *table, blank, last = done.printed.splitlines()
    assert any(table)
    assert blank == ""
    assert last.startswith("wrote config.json, results.parquet, summary.json")
    assert last.endswith(f"to runs/{name}/")
    assert "100%" in done.progress.split("\r")[-1]
    config = read_json(done.folder / "config.json")
    for figure in done.command.figures:
        sidecar = read_json(done.folder / f"{figure}.json")
        assert (sidecar.pop("config"), sidecar.pop("command")) == (config, done.said())
        assert sidecar  # the numbers drawn


@EVERY
def test_the_recorded_command_reproduces_every_file_in_parallel(
    name: str, ran: Callable[[str], Run], tmp_path: Path
) -> None:
    done = ran(name)
    flags = done.said().removeprefix(f"python -m theory.{name} ")
    again = run(name, f"{flags} --jobs 2", tmp_path)
    assert_same_files(done.folder, again.folder, done.command.files)


@EVERY
def test_a_killed_run_leaves_its_parts_alone_and_resumes_to_the_same_bits(
    name: str, ran: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says where it wrote to, if that is another place than the usual one."""
    whole, run_batch, done = ran(name), Batch.run, []
    flags = f"{whole.command.flags} --jobs 1"
    folder = tmp_path / "figures" / "mine" / whole.command.folder

    def run_until(batch: Batch, count: int) -> pd.DataFrame:
        if len(done) == count:
            raise OSError("killed")
        done.append(batch.key)
        return run_batch(batch)

    for count in (0, 3):
        monkeypatch.setattr(Batch, "run", lambda batch, count=count: run_until(batch, count))
        with pytest.raises(OSError, match="killed"):
            run(name, flags, tmp_path, "figures/mine")
        assert {path.parent for path in files_in(tmp_path)} <= {folder / FINISHED}
    kept = {path.stem for path in (folder / FINISHED).iterdir()}
    # The batch that was finished last may not have reached the disk when the next one failed.
    assert 2 <= len(kept) <= 3
    done.clear()
    monkeypatch.setattr(Batch, "run", lambda batch: run_until(batch, -1))
    resumed = run(name, flags, tmp_path, "figures/mine")
    assert kept.isdisjoint(done)
    assert files_in(tmp_path) == {folder / file for file in whole.command.files}
    assert resumed.said() == f"{whole.said()} --out figures/mine"
    sidecars = {f"{figure}.json" for figure in whole.command.figures}
    assert_same_files(whole.folder, folder, whole.command.files - sidecars)


@EVERY
def test_a_single_seed_will_do_and_the_users_own_files_survive(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "out" / SWEEPS[name].folder
    (folder / "parts").mkdir(parents=True)
    for file in ("mine.txt", "config.json"):
        (folder / file).write_text("old")
    done = run(name, f"{SWEEPS[name].flags} --seeds 1 --jobs 1", tmp_path, "out")
    assert {p.name for p in folder.iterdir()} == done.command.files | {"mine.txt", "parts"}
    assert (folder / "mine.txt").read_text() == "old"
    assert read_json(folder / "config.json")["num_seeds"] == 1


@pytest.mark.parametrize("name", ["gap_experiment", "convergence_experiment", "pareto_experiment"])
@pytest.mark.parametrize("algorithms", ["mix sft dpo mix", "maxright", "sequential"])
def test_algo_replaces_the_algorithms(name: str, algorithms: str, tmp_path: Path) -> None:
    flags = f"{SWEEPS[name].flags} --problem toy2d --jobs 1 --algo {algorithms}"
    done = run(name, flags, tmp_path)
    chosen = list(dict.fromkeys(algorithms.split()))
    assert read_json(done.folder / "config.json")["algorithms"] == chosen
    assert f"--algo {' '.join(chosen)}" in done.said()
    panels = read_json(done.folder / f"{done.command.figures[0]}.json")["panels"]
    # MAXRIGHT's lines of the convergence experiment are named after its values.
    drawn = {"maxright" if row["metric"] == "max_gap" else row["line"] for row in panels
             if name == "convergence_experiment" and "mean" in row}  # fmt: skip
    drawn = drawn or {row["line"] for row in panels} - {"front"}
    sequential = {"dpo_then_sft", "sft_then_dpo"}
    assert drawn == (sequential if "sequential" in chosen else set(chosen))


# --- mistakes


def refused(name: str, argv: list[str], where: Path) -> tuple[Any, str]:
    """Exit code and the line, of a call as from a shell."""
    main, prog = main_of(name), f"python -m theory.{name}"
    out, error = io.StringIO(), io.StringIO()
    with chdir(where), redirect_stdout(out), redirect_stderr(error), pytest.raises(SystemExit) as e:
        run_command(lambda: main(argv), prog)
    code, line = (1, e.value.code) if isinstance(e.value.code, str) else (2, error.getvalue())
    assert out.getvalue() == ""
    assert code == 1 or (e.value.code == 2 and line.endswith(" (see --help)\n"))
    assert line.startswith(f"{prog}: error: ")
    return code, line.removesuffix("\n")


COMMON = {
    "--problem cubic": ["--problem", "'cubic'", "bernoulli", "softmax"],
    "--lam 1.5": ["--lam", "1.5 is not a number in [0, 1]"],
    "--lam nan": ["--lam", "nan is not a number in [0, 1]"],
    "--steps 1e4": ["--steps", "1e4 is not a positive integer"],
    "--steps 5": ["--steps", "5", "at least"],
    "--seeds 0": ["--seeds", "0 is not a positive integer"],
    "--seeds": ["--seeds", "expected one argument"],
    "--jobs -1": ["--jobs"],
    "--lambda 0.5": ["unrecognized arguments: --lambda"],
    "--step 3": ["unrecognized arguments: --step"],  # not guessed: its meaning might change
}
UNKNOWN = ["--algo", "'newton'", *REGISTRY]
OWN = {
    "gap_experiment --refresh_every 0": ["--refresh_every", "positive integer"],
    "gap_experiment --algo mix newton": UNKNOWN,
    "gap_experiment --algo nowhere:Nobody": ["--algo", "cannot import nowhere"],
    "convergence_experiment --steps 500": ["500", "at least 10000"],
    "convergence_experiment --algo newton": UNKNOWN,
    "pareto_experiment --steps 50": ["at least 100"],
    "pareto_experiment --algo theory.tasks:Task": ["--algo", "no subclass"],
    "predictions --tolerance 2": ["--tolerance", "[0, 1]"],
    "predictions --algo mix": ["--algo"],
    "beyond_experiment --part everything": ["everything", "switches"],
    "beyond_experiment --part equal_compute --lam 0.3": ["--lam", "equal_compute"],
    "benchmark --rounds 0": ["--rounds", "positive integer"],
    "benchmark --steps x": ["--steps"],
    "benchmark --nonsense": ["--nonsense"],
}
SENSELESS = {
    "beyond_experiment --part switches --lam 0.37 --steps 64": ["0.37", "64"],
    "beyond_experiment --part optimizers --lam 1": ["lam"],
    **{f"{name} --out file": ["--out file exists"] for name in NAMES if name[:6] != "beyond"},
    "beyond_experiment --part switches --out file": ["--out file"],
}
"""Flags that are right one by one, to the parser."""
BAD = [
    *((2, f"{name} {flags}", words) for name in SWEEPS for flags, words in COMMON.items()),
    *((2, line, words) for line, words in OWN.items()),
    *((1, line, words) for line, words in SENSELESS.items()),
]


@pytest.mark.parametrize(("code", "line", "mentions"), BAD)
def test_a_mistake_is_one_line_before_the_work_and_leaves_nothing(
    code: int, line: str, mentions: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("kept")
    name, *argv = line.split()
    found, message = refused(name, argv, tmp_path)
    assert found == code
    assert_one_line_error(message, *mentions)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


@EVERY
def test_help_shows_every_flag_and_default(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main_of(name)(["--help"])
    text = capsys.readouterr().out.split()
    own = SWEEPS[name].help.split()
    for word in ("--problem", "--lam", "--steps", "--seeds", "--out", f"runs/{name})", *own):
        assert {word, f"{word})"} & set(text), word


@pytest.mark.parametrize("name", NAMES)
def test_python_m_runs_the_command(name: str) -> None:
    argv = [sys.executable, "-m", f"theory.{name}", "--seeds", "none"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"python -m theory.{name}: error: argument --seeds: ")
