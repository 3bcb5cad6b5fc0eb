"""The flags that every sweep command has: problems, weights, length, seeds, output, processes."""

from __future__ import annotations

import argparse
from typing import Any, Protocol

from theory.cli import OneLineParser, UserError, positive_int, unit_float
from theory.plotting.style import short_name
from theory.problems import PROBLEMS, make_problem
from theory.registry import flags_of


class SweepConfig(Protocol):
    """A frozen configuration with the common fields."""

    @property
    def problems(self) -> tuple[str, ...]: ...
    @property
    def lams(self) -> tuple[float, ...]: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def num_seeds(self) -> int: ...


def sweep_parser(name: str, description: str, defaults: SweepConfig) -> OneLineParser:
    """A parser for `python -m theory.NAME` with the common flags; it writes to figures/NAME."""
    parser = OneLineParser(
        prog=f"python -m theory.{name}",
        description=description,
    )
    add = parser.add_argument
    add_problem(parser, list(PROBLEMS))
    add("--lam", nargs="+", type=unit_float, default=list(defaults.lams), help="weights on DPO")
    add("--steps", type=positive_int, default=defaults.num_steps, help="steps of each run")
    add("--seeds", type=positive_int, default=defaults.num_seeds, help="number of seeds")
    add("--out", default=f"figures/{name}", help="directory for the results")
    add("--jobs", type=positive_int, default=2, help="parallel processes")
    return parser


def add_problem(parser: OneLineParser, default: list[str] | None, note: str = "") -> None:
    """`--problem`: names of problems, checked before any work starts."""
    names = ", ".join(PROBLEMS)
    text = f"any of {names}, files of python -m llm.features (FILE.npz), functions of your own "
    text += f"(package.module:function){note}"
    parser.add_argument("--problem", nargs="+", type=problem_name, default=default, help=text)


def problem_name(text: str) -> str:
    """What `make_problem` can build without parameters."""
    try:
        make_problem(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def algorithm_name(text: str) -> str:
    """The name of a built-in schedule, or `package.module:Class` of one that can be imported."""
    try:
        flags_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def distinct_problems(names: list[str]) -> tuple[str, ...]:
    """Each problem once. Figures and files are named after the stem of a feature file."""
    problems = tuple(dict.fromkeys(names))
    if len({short_name(problem) for problem in problems}) < len(problems):
        raise UserError(f"--problem: two of {', '.join(problems)} have the same file name")
    return problems


def add_refresh_every(parser: OneLineParser, default: int) -> None:
    parser.add_argument(
        "--refresh_every",
        type=positive_int,
        default=default,
        help="MAXRIGHT: steps between evaluations of both objectives",
    )


def parse_sweep(
    parser: OneLineParser, argv: list[str] | None, least_steps: int
) -> argparse.Namespace:
    """Parse, and refuse runs shorter than `least_steps`."""
    arguments = parser.parse_args(argv)
    if arguments.steps < least_steps:
        parser.error(f"--steps {arguments.steps} is too few: a run needs at least {least_steps}")
    return arguments


def common_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The common fields of a configuration; a repeated problem or lam counts once."""
    return {
        "problems": distinct_problems(arguments.problem),
        "lams": tuple(dict.fromkeys(arguments.lam)),
        "num_steps": arguments.steps,
        "num_seeds": arguments.seeds,
    }


def command_line(name: str, config: SweepConfig, *own: str) -> str:
    """The command that reproduces the results; `own` names the command's own flags."""
    flags = (
        f"--problem {' '.join(config.problems)} --lam {' '.join(map(str, config.lams))} "
        f"--steps {config.num_steps} --seeds {config.num_seeds}"
    )
    return " ".join(
        [f"python -m theory.{name}", flags, *(f"--{flag} {getattr(config, flag)}" for flag in own)]
    )
