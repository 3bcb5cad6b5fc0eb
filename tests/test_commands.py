"""What every command of `theory` does: leaves its files, repeats itself, resumes, refuses.

Each runs once, small, in an empty directory and with the default --out; most tests read what it
left. What the numbers must show stands in the tests of the experiments.
"""

from __future__ import annotations

import importlib
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
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
RECORDS = {"config.json", "results.parquet", "summary.json"}


class Command(NamedTuple):
    module: str
    """Below `theory`: a module with `main`."""
    flags: str
    figures: tuple[str, ...]
    folder: str = ""
    """Below --out, where the files are."""
    flags_of_help: tuple[str, ...] = ("--lam", "--refresh_every")
    defaults_of_help: tuple[str, ...] = ("0.1 0.25 0.5 0.75 0.9", "20")

    @property
    def name(self) -> str:
        return self.module.removesuffix(".__main__")

    def main(self, argv: list[str]) -> None:
        importlib.import_module(f"theory.{self.module}").main(argv)

    @property
    def files(self) -> set[str]:
        return RECORDS | {
            f"{name}.{end}" for name in self.figures for end in ("png", "svg", "json")
        }


SWEEPS = {
    command.name: command
    for command in (
        Command(
            "gap_experiment",
            "--problem bernoulli toy2d --lam 0.7 0.3 --steps 20 --seeds 2 --refresh_every 3",
            ("gap",),
            flags_of_help=("--lam", "--refresh_every", "--algo"),
            defaults_of_help=("0.1 0.25 0.5 0.75 0.9", "100000", "sequential mix alright maxright"),
        ),
        Command(
            "convergence_experiment",
            "--problem bernoulli --lam 0.3 --steps 40 --fit_from 4 --seeds 2",
            ("convergence", "slopes"),
            flags_of_help=("--lam", "--fit_from", "--algo"),
            defaults_of_help=("0.5", "1000", "30000", "sequential mix alright maxright"),
        ),
        Command(
            "pareto_experiment",
            "--problem bernoulli quadratic --lam 0.7 0.3 --steps 100 --seeds 2 --refresh_every 3",
            ("front", "overview_bernoulli", "overview_quadratic"),
            flags_of_help=("--lam", "--refresh_every", "--algo"),
            defaults_of_help=("0.1 0.25 0.5 0.75 0.9", "10000", "sequential mix alright maxright"),
        ),
        Command(
            "predictions.__main__",
            "--problem bernoulli --lam 0.7 0.3 --steps 100 --seeds 2 --tolerance 0.02",
            ("predictions",),
            flags_of_help=("--tolerance", "--refresh_every"),
            defaults_of_help=("0.1 0.25 0.5 0.75 0.9", "20000", "0.01"),
        ),
        Command(
            "beyond_experiment",
            "--part switches --problem bernoulli toy2d --lam 0.25 --steps 64 --seeds 2",
            ("switches",),
            "switches",
            flags_of_help=("--part", "--lam"),
            defaults_of_help=("all",),
        ),
    )
}
NAMES = [*SWEEPS, "benchmark"]
EVERY = pytest.mark.parametrize("name", SWEEPS)


class Run(NamedTuple):
    command: Command
    out: Path
    printed: str
    progress: str

    @property
    def folder(self) -> Path:
        return self.out / self.command.folder

    def sidecar(self, figure: str) -> dict[str, Any]:
        return read_json(self.folder / f"{figure}.json")


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run(name: str, flags: str, folder: Path, out: str | None = None) -> Run:
    """The command run in `folder`."""
    command, printed, progress = SWEEPS[name], io.StringIO(), io.StringIO()
    argv = [*shlex.split(flags), *(["--out", out] if out else [])]
    with inside(folder), redirect_stdout(printed), redirect_stderr(progress):
        command.main(argv)
    written = folder / (out or f"runs/{name}")
    return Run(command, written, printed.getvalue(), progress.getvalue())


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    runs: dict[str, Run] = {}

    def once(name: str) -> Run:
        if name not in runs:
            flags = f"{SWEEPS[name].flags} --jobs 1"
            runs[name] = run(name, flags, tmp_path_factory.mktemp(name) / "new")
        return runs[name]

    return once


def assert_same_files(first: Path, second: Path, names: set[str]) -> None:
    for name in names - {"results.parquet"}:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    tables = [pd.read_parquet(folder / "results.parquet") for folder in (first, second)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


# --- what a run leaves and shows


@EVERY
def test_a_run_leaves_its_files_under_runs_and_nothing_else(
    name: str, ran: Callable[[str], Run]
) -> None:
    done = ran(name)
    assert {path.name for path in done.folder.iterdir()} == done.command.files
    found = {path for path in done.out.parents[1].rglob("*") if path.is_file()}
    assert {path.parent for path in found} == {done.folder}


@EVERY
def test_a_run_shows_its_table_its_progress_and_where_the_files_are(
    name: str, ran: Callable[[str], Run]
) -> None:
    done = ran(name)
    *table, blank, last = done.printed.splitlines()
    assert blank == ""
    assert last.startswith("wrote config.json, results.parquet, summary.json")
    assert last.endswith(f"to runs/{name}/")
    assert any(table)
    assert "100%" in done.progress.split("\r")[-1]


@EVERY
def test_a_sidecar_holds_the_configuration_and_the_command(
    name: str, ran: Callable[[str], Run]
) -> None:
    done = ran(name)
    config = read_json(done.folder / "config.json")
    for figure in done.command.figures:
        sidecar = done.sidecar(figure)
        assert sidecar["config"] == config
        assert sidecar["command"].startswith(f"python -m theory.{name} --")
        assert "--out" not in sidecar["command"]
        assert len(sidecar) > 2  # the numbers drawn


@EVERY
def test_the_recorded_command_reproduces_every_file_in_parallel(
    name: str, ran: Callable[[str], Run], tmp_path: Path
) -> None:
    done = ran(name)
    recorded = done.sidecar(done.command.figures[0])["command"]
    flags = recorded.removeprefix(f"python -m theory.{name} ")
    again = run(name, f"{flags} --jobs 2", tmp_path)
    assert_same_files(done.folder, again.folder, done.command.files)


@EVERY
def test_a_killed_run_leaves_its_parts_alone_and_resumes_to_the_same_bits(
    name: str, ran: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says where it wrote to, if that is another place than the usual one."""
    whole, run_batch, done = ran(name), Batch.run, []
    flags = f"{whole.command.flags} --jobs 1"

    def run_until(batch: Batch, count: int) -> pd.DataFrame:
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(batch.key)
        return run_batch(batch)

    monkeypatch.setattr(Batch, "run", lambda batch: run_until(batch, 3))
    with pytest.raises(KeyboardInterrupt):
        run(name, flags, tmp_path, "figures/mine")
    folder = tmp_path / "figures" / "mine" / whole.command.folder
    assert {path.name for path in folder.iterdir()} == {FINISHED}
    kept = {path.stem for path in (folder / FINISHED).iterdir()}
    # The batch that was finished last may not have reached the disk when the next one failed.
    assert 2 <= len(kept) <= 3
    done.clear()
    monkeypatch.setattr(Batch, "run", lambda batch: run_until(batch, -1))
    resumed = run(name, flags, tmp_path, "figures/mine")
    assert kept.isdisjoint(done)
    assert {path.name for path in folder.iterdir()} == whole.command.files
    said = [r.sidecar(whole.command.figures[0])["command"] for r in (whole, resumed)]
    assert said[1] == f"{said[0]} --out figures/mine"
    sidecars = {f"{figure}.json" for figure in whole.command.figures}
    assert_same_files(whole.folder, folder, whole.command.files - sidecars)


@EVERY
def test_a_failing_run_writes_no_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(batch: Batch) -> pd.DataFrame:
        raise OSError(f"no memory for {batch.problem}")

    monkeypatch.setattr(Batch, "run", fail)
    with pytest.raises(OSError, match="no memory"):
        run(name, f"{SWEEPS[name].flags} --jobs 1", tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@EVERY
def test_a_single_seed_has_no_interval_replaces_the_files_and_keeps_the_users(
    name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "out" / SWEEPS[name].folder
    (folder / "parts").mkdir(parents=True)
    (folder / "mine.txt").write_text("kept")
    (folder / "config.json").write_text("old")
    done = run(name, f"{SWEEPS[name].flags} --seeds 1 --jobs 1", tmp_path, "out")
    assert {p.name for p in folder.iterdir()} == done.command.files | {"mine.txt", "parts"}
    assert read_json(folder / "config.json")["num_seeds"] == 1
    assert "Infinity" not in (folder / "summary.json").read_text()


# --- other algorithms


@pytest.mark.parametrize("name", ["gap_experiment", "convergence_experiment", "pareto_experiment"])
@pytest.mark.parametrize("algorithms", ["mix sft dpo mix", "maxright", "sequential"])
def test_algo_replaces_the_algorithms(name: str, algorithms: str, tmp_path: Path) -> None:
    flags = f"{SWEEPS[name].flags} --problem toy2d --jobs 1 --algo {algorithms}"
    done = run(name, flags, tmp_path)
    chosen = list(dict.fromkeys(algorithms.split()))
    figure = done.command.figures[0]
    assert read_json(done.folder / "config.json")["algorithms"] == chosen
    assert f"--algo {' '.join(chosen)}" in done.sidecar(figure)["command"]
    drawn = {row["line"] for row in done.sidecar(figure)["panels"]}
    lines = {"dpo_then_sft", "sft_then_dpo"} if "sequential" in chosen else set(chosen)
    if name == "convergence_experiment" and chosen == ["maxright"]:
        lines = {line for line in drawn if line.startswith(("stale", "same", "fresh", "exact"))}
    assert {line for line in drawn if line != "front" and not line.startswith("bound")} == lines


# --- mistakes


def refused(name: str, argv: list[str], folder: Path) -> tuple[Any, str]:
    """Exit code and the line, of a call as from a shell."""
    module = {command.name: command.module for command in SWEEPS.values()}.get(name, name)
    main = importlib.import_module(f"theory.{module}").main
    printed, error = io.StringIO(), io.StringIO()
    with (
        inside(folder),
        redirect_stdout(printed),
        redirect_stderr(error),
        pytest.raises(SystemExit) as stopped,
    ):
        run_command(lambda: main(argv), name)
    assert printed.getvalue() == ""
    code = stopped.value.code
    return (1, code) if isinstance(code, str) else (code, error.getvalue().removesuffix("\n"))


COMMON = {
    "--problem cubic": ["--problem", "'cubic'", "bernoulli", "softmax"],
    "--lam 1.5": ["--lam", "1.5", "[0, 1]"],
    "--lam nan": ["--lam", "nan", "[0, 1]"],
    "--steps 1e4": ["--steps", "1e4", "positive integer"],
    "--steps 5": ["--steps", "5", "at least"],
    "--seeds 0": ["--seeds", "positive integer"],
    "--jobs -1": ["--jobs"],
    "--lambda 0.5": ["unrecognized arguments: --lambda"],
    "--step 3": ["unrecognized arguments: --step"],  # not guessed: its meaning might change
}
UNKNOWN = ["--algo", "'newton'", *REGISTRY]
OWN = {
    "gap_experiment": {
        "--refresh_every 0": ["--refresh_every", "positive integer"],
        "--algo mix newton": UNKNOWN,
        "--algo nowhere:Nobody": ["--algo", "cannot import nowhere"],
    },
    "convergence_experiment": {
        "--steps 500": ["500", "at least 10000"],
        "--algo newton": UNKNOWN,
    },
    "pareto_experiment": {
        "--steps 50": ["at least 100"],
        "--algo theory.tasks:Task": ["--algo", "no subclass"],
    },
    "predictions": {"--tolerance 2": ["--tolerance", "[0, 1]"], "--algo mix": ["--algo"]},
    "beyond_experiment": {
        "--part everything": ["everything", "switches"],
        "--part equal_compute --lam 0.3": ["--lam", "equal_compute"],
    },
    "benchmark": {
        "--rounds 0": ["--rounds", "positive integer"],
        "--steps x": ["--steps"],
        "--nonsense": ["--nonsense"],
    },
}
SENSELESS = {
    "--part switches --lam 0.37 --steps 64": ["0.37", "64"],
    "--part optimizers --lam 1": ["lam"],
}
"""Of the last command but one: seen by the experiment and not by the parser."""
BAD = [
    *((name, 2, flags, words) for name in SWEEPS for flags, words in COMMON.items()),
    *((name, 2, flags, words) for name in OWN for flags, words in OWN[name].items()),
    *(("beyond_experiment", 1, flags, words) for flags, words in SENSELESS.items()),
]


@pytest.mark.parametrize(("name", "code", "flags", "mentions"), BAD)
def test_a_mistake_is_one_line_and_leaves_nothing(
    name: str, code: int, flags: str, mentions: list[str], tmp_path: Path
) -> None:
    found, line = refused(name, flags.split(), tmp_path)
    assert found == code
    assert_one_line_error(line, *mentions)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_file_in_the_way_of_the_output_is_refused_before_the_work(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("kept")
    code, line = refused(name, ["--out", "file"], tmp_path)
    assert code == 1
    assert_one_line_error(line, "--out", "file")
    assert (tmp_path / "file").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@EVERY
def test_help_shows_every_flag_and_default(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        SWEEPS[name].main(["--help"])
    assert info.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    common = ("--problem", "--steps", "--seeds", "--out", "--jobs", f"runs/{name}")
    for words in (*common, *SWEEPS[name].flags_of_help, *SWEEPS[name].defaults_of_help):
        assert words in text


@pytest.mark.parametrize("name", NAMES)
def test_python_m_runs_the_command(name: str) -> None:
    """In a process of its own: the exit code and that a mistake is the only output."""
    argv = [sys.executable, "-m", f"theory.{name}", "--seeds", "none"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"python -m theory.{name}: error: argument --seeds: ")
    assert done.stderr.count("\n") == 1
