"""The frame of the commands: flags, refusals, a sweep with kept parts, files, the printed table.

An `Experiment` says what is run and what follows from the runs; `conduct` does the rest. A command
that is one experiment over problems and weights is a `SweepExperiment`, and `sweep_main` its main.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import pandas as pd
from matplotlib.figure import Figure

from theory.cli import OneLineParser, UserError, check_output_dir, positive_int, unit_float
from theory.compared import algorithm_name
from theory.foreign import is_foreign
from theory.problems import PROBLEMS, make_problem, short_name
from theory.records import save_figure, write_json, write_parquet
from theory.registry import flags_of
from theory.sweep import FINISHED, Batch, discard_parts, run_sweep


class Findings(NamedTuple):
    """What follows from the runs."""

    summary: Any
    """What summary.json holds: the numbers that the experiment is run for."""
    report: str
    """The same as a table to read."""
    figures: Iterable[tuple[str, Figure, dict[str, Any]]]
    """The name of each, and what its JSON sidecar holds of the numbers drawn."""


class Runs:
    """What every experiment has; no dataclass, since a subclass says where its fields stand."""

    num_steps: int
    num_seeds: int

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(self.num_seeds))


@dataclass(frozen=True)
class Experiment(Runs, ABC):
    """The fields of a subclass are everything that determines its results."""

    name: ClassVar[str]

    @abstractmethod
    def batches(self) -> list[Batch]:
        """The work, the dear parts first. Raises ValueError for a configuration without sense."""

    def table(self, results: pd.DataFrame) -> pd.DataFrame:
        """The rows and columns of a sweep's results that are kept, in their order."""
        return results

    @abstractmethod
    def findings(self, results: pd.DataFrame) -> Findings:
        """What follows from the table."""


AnyExperiment = TypeVar("AnyExperiment", bound=Experiment)


def run_experiment(
    experiment: Experiment, jobs: int = 2, parts: Path | None = None
) -> pd.DataFrame:
    """The table of all runs; `parts` keeps finished batches, as in `run_sweep`."""
    return experiment.table(run_sweep(experiment.batches(), jobs=jobs, parts=parts))


def conduct(
    work: Mapping[Path, Experiment], out: Path, command: str, jobs: int, figures: str
) -> None:
    """Run each experiment into its directory, below `out` or `out` itself.

    Writes config.json, results.parquet, summary.json and each figure as .png, .svg and .json. A
    killed run leaves its finished batches and nothing else; the same command goes on from there.
    """
    for experiment in work.values():
        experiment.batches()  # a mistake shows before the work starts
    for directory in work:
        check_output_dir(directory)
    for directory, experiment in work.items():
        parts = directory / FINISHED
        results = run_experiment(experiment, jobs, parts)
        found, config = experiment.findings(results), asdict(experiment)
        write_json(directory / "config.json", config)
        write_parquet(directory / "results.parquet", results)
        write_json(directory / "summary.json", found.summary)
        for name, figure, numbers in found.figures:
            save_figure(figure, directory / name)
            write_json(
                directory / f"{name}.json", {"command": command, "config": config, **numbers}
            )
        print(found.report + "\n")
        discard_parts(parts)
    print(f"wrote config.json, results.parquet, summary.json{figures} to {out}/")


# --- flags

FLAGS = {
    "problems": "problem",
    "lams": "lam",
    "num_steps": "steps",
    "num_seeds": "seeds",
    "algorithms": "algo",
}
"""Fields whose flags have other names than they."""
REFRESH_EVERY: dict[str, dict[str, Any]] = {
    "refresh_every": {
        "type": positive_int,
        "help": "MAXRIGHT: steps between evaluations of both objectives",
    }
}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "algorithms": {"nargs": "+", "type": algorithm_name, "help": "the algorithms to compare"}
}


def command_parser(name: str, description: str) -> OneLineParser:
    """A parser for `python -m theory.NAME`."""
    return OneLineParser(prog=f"python -m theory.{name}", description=description)


def add_problem(parser: OneLineParser, default: Sequence[str] | None, note: str = "") -> None:
    """`--problem`: names of `PROBLEMS` and feature files, checked before any work starts."""
    names = ", ".join(PROBLEMS)
    text = f"any of {names}, files of python -m llm.features (FILE.npz), functions of your own "
    text += f"(package.module:function){note}"
    parser.add_argument("--problem", nargs="+", type=problem_name, default=default, help=text)


def add_out(parser: OneLineParser, name: str) -> None:
    """`--out`: runs/NAME by default, so that a first try overwrites no record under figures/."""
    parser.add_argument("--out", default=f"runs/{name}", help="directory for the results")


def add_jobs(parser: OneLineParser) -> None:
    parser.add_argument("--jobs", type=positive_int, default=2, help="parallel processes")


def problem_name(text: str) -> str:
    """What `make_problem` can build without parameters."""
    try:
        make_problem(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def distinct_problems(names: Sequence[str]) -> tuple[str, ...]:
    """Each problem once. Figures and files are named after the stem of a feature file."""
    problems = tuple(dict.fromkeys(names))
    if len({short_name(problem) for problem in problems}) < len(problems):
        raise UserError(f"--problem: two of {', '.join(problems)} have the same file name")
    return problems


def command_line(name: str, flags: Mapping[str, Any], out: str) -> str:
    """The command that reproduces the results: of flags that are not None, --out if not runs/NAME.

    A tuple holds a flag's several words; the empty one belongs to a switch.
    """
    words = ["python", "-m", f"theory.{name}"]
    for flag, value in {**flags, "out": None if out == f"runs/{name}" else out}.items():
        if value is not None:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{flag}", *map(str, values)]
    return shlex.join(words)


def configured(
    default: AnyExperiment, arguments: argparse.Namespace, flags: Mapping[str, str]
) -> AnyExperiment:
    """The experiment with the fields that the command line sets; `flags` maps fields to flags."""
    known = {field.name for field in fields(default)}
    given = {name: getattr(arguments, flag) for name, flag in flags.items() if name in known}
    return replace(default, **{name: v for name, v in given.items() if v is not None})


# --- a command that is one sweep over problems and weights


class Grid(Runs):
    """What each such sweep has besides."""

    problems: tuple[str, ...]
    lams: tuple[float, ...]


@dataclass(frozen=True)
class SweepExperiment(Grid, Experiment):
    """What `python -m theory.NAME` runs into runs/NAME. Every field has a default."""

    about: ClassVar[str]
    """What the help says."""
    figure_files: ClassVar[str]
    """The figures, as the last line of the output names them."""
    own_flags: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Fields with a flag besides the four common ones, and what argparse is told of it."""
    rising_lams: ClassVar[bool] = False
    """Whether the weights are sorted, whatever order they are given in."""
    least_steps: ClassVar[int] = 10

    @classmethod
    def refusal(cls, arguments: argparse.Namespace) -> str | None:
        """What is wrong with flags that are right one by one."""
        if arguments.steps < cls.least_steps:
            return f"--steps {arguments.steps} is too few: a run needs at least {cls.least_steps}"
        return None

    @classmethod
    def flags(cls) -> dict[str, str]:
        """Field to flag, the common ones first."""
        common = ("problems", "lams", "num_steps", "num_seeds")
        return {name: FLAGS.get(name, name) for name in (*common, *cls.own_flags)}

    def command(self, out: str) -> str:
        """The command line that reproduces the results; the usual algorithms are not said."""
        said = {name: getattr(self, name) for name in self.flags()}
        if said.get("algorithms") == getattr(type(self)(), "algorithms", None):
            said.pop("algorithms", None)
        flags = {self.flags()[name]: value for name, value in said.items()}
        return command_line(self.name, flags | dict(getattr(self, "options", ())), out)


def sweep_main(kind: type[SweepExperiment], argv: list[str] | None) -> None:
    """The main of a command that is one experiment."""
    arguments = parse_sweep(kind, sys.argv[1:] if argv is None else argv)
    flags = kind.flags() | {"options": "options"}
    experiment, out = configured(kind(), arguments, flags), Path(arguments.out)
    command = experiment.command(arguments.out)
    conduct({out: experiment}, out, command, arguments.jobs, kind.figure_files)


def parse_sweep(kind: type[SweepExperiment], argv: list[str]) -> argparse.Namespace:
    """Parse and refuse; what is named twice counts once."""
    parser = _sweep_parser(kind)
    foreign = _add_foreign_options(parser, argv) if "algorithms" in kind.own_flags else []
    arguments = parser.parse_args(argv)
    given = {name: getattr(arguments, name) for name in foreign}
    arguments.options = tuple((n, value) for n, value in given.items() if value is not None)
    refusal = kind.refusal(arguments)
    if refusal:
        parser.error(refusal)
    for flag, value in vars(arguments).items():
        if isinstance(value, list):
            setattr(arguments, flag, tuple(dict.fromkeys(value)))
    arguments.problem = distinct_problems(arguments.problem)
    if kind.rising_lams:
        arguments.lam = tuple(sorted(arguments.lam))
    return arguments


def _add_foreign_options(parser: OneLineParser, argv: list[str]) -> list[str]:
    """Flags for the options of algorithms that --algo takes from elsewhere; their names."""
    known = {action.dest for action in parser._actions}
    first = OneLineParser(prog=parser.prog, add_help=False)
    first.add_argument("--algo", nargs="+", type=algorithm_name, default=())
    found = first.parse_known_args(argv)[0].algo
    flags = {f.name: f for name in found if is_foreign(name) for f in flags_of(name).values()}
    if taken := (flags.keys() & known) - {"lam", "refresh_every"}:
        parser.error(f"--algo: its option {min(taken)} is another flag already: rename it")
    own = [flag for name, flag in flags.items() if name not in known]
    for flag in own:
        kind = _truth if flag.kind is bool else flag.kind
        parser.add_argument(f"--{flag.name}", type=kind, help=flag.help or None)
    return [flag.name for flag in own]


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return text.lower() == "true"


def _sweep_parser(kind: type[SweepExperiment]) -> OneLineParser:
    defaults = kind()
    parser = command_parser(kind.name, kind.about)
    add = parser.add_argument
    add_problem(parser, tuple(PROBLEMS))
    add("--lam", nargs="+", type=unit_float, default=defaults.lams, help="weights on DPO")
    add("--steps", type=positive_int, default=defaults.num_steps, help="steps of each run")
    add("--seeds", type=positive_int, default=defaults.num_seeds, help="number of seeds")
    add_out(parser, kind.name)
    add_jobs(parser)
    for name, options in kind.own_flags.items():
        add(f"--{FLAGS.get(name, name)}", default=getattr(defaults, name), **options)
    return parser
