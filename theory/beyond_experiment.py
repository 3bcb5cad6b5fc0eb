"""What goes beyond the paper: switches, equal compute, two mechanisms of failure, optimisers.

    python -m theory.beyond_experiment
    python -m theory.beyond_experiment --part switches --problem toy2d --steps 4096

Parts (each experiment's module states its claims):

switches        block alternation joins ALRIGHT and sequential training  beyond.switches
equal_compute   importance-sampled ALRIGHT, ALRIGHT and Mix at equal compute  beyond.equal_compute
mechanisms      clipping per objective changes lam; noisy, stale values  beyond.clipping,
                lock MAXRIGHT out  beyond.lockout
optimizers      the plateau of sequential training under other optimisers  beyond.plateau

Each experiment writes config.json, results.parquet, summary.json and its figure (.png, .svg, .json)
into a directory of its own under --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from theory.beyond.base import Experiment
from theory.beyond.clipping import Clipping
from theory.beyond.equal_compute import EqualCompute
from theory.beyond.lockout import Lockout
from theory.beyond.plateau import Plateau
from theory.beyond.switches import Switches
from theory.cli import positive_int, run_command, unit_float
from theory.command import (
    add_jobs,
    add_out,
    add_problem,
    command_line,
    command_parser,
    conduct,
    configured,
    distinct_problems,
)

NAME = "beyond_experiment"
PARTS: dict[str, tuple[type[Experiment], ...]] = {
    "switches": (Switches,),
    "equal_compute": (EqualCompute,),
    "mechanisms": (Clipping, Lockout),
    "optimizers": (Plateau,),
}
FLAGS = {"problems": "problem", "lam": "lam", "num_steps": "steps", "num_seeds": "seeds"}
"""Fields of an experiment that the command line may set, and their flags."""


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    out, chosen = Path(arguments.out), list(experiments(arguments))
    figures = f" and the figure of {', '.join(experiment.name for experiment in chosen)}"
    work = {out / experiment.name: experiment for experiment in chosen}
    conduct(work, out, command(arguments), arguments.jobs, figures)


def experiments(arguments: argparse.Namespace) -> Iterator[Experiment]:
    """The chosen experiments: each with its own defaults but for the flags given."""
    for part in arguments.part:
        for kind in PARTS[part]:
            yield configured(kind(), arguments, FLAGS)


def command(arguments: argparse.Namespace) -> str:
    """The command line that reproduces the results."""
    said = {flag: getattr(arguments, flag) for flag in ("part", *FLAGS.values())}
    return command_line(NAME, said, arguments.out)


def parse(argv: list[str] | None) -> argparse.Namespace:
    description = "What goes beyond the paper; see the module's docstring for the parts."
    parser = command_parser(NAME, description)
    add = parser.add_argument
    add("--part", nargs="+", choices=[*PARTS, "all"], default=["all"], help="default: all")
    add_problem(parser, None, " (switches, lockout, optimizers)")
    add("--lam", type=unit_float, help="weight on DPO: switches, clipping, optimizers")
    add("--steps", type=positive_int, help="steps of each run (equal_compute: of Mix)")
    add("--seeds", type=positive_int, help="number of seeds")
    add_out(parser, NAME)
    add_jobs(parser)
    arguments = parser.parse_args(argv)
    named = list(PARTS) if "all" in arguments.part else dict.fromkeys(arguments.part)
    arguments.part = tuple(named)
    if arguments.problem is not None:
        arguments.problem = distinct_problems(arguments.problem)
    for name, flag in FLAGS.items():
        kinds = [kind for part in arguments.part for kind in PARTS[part]]
        used = any(name in {field.name for field in fields(kind)} for kind in kinds)
        if getattr(arguments, flag) is not None and not used:
            parser.error(f"--{flag} is not an option of --part {' '.join(arguments.part)}")
    if arguments.steps is not None and arguments.steps < 64:
        parser.error(f"--steps {arguments.steps} is too few: these experiments need at least 64")
    return arguments


if __name__ == "__main__":
    run_command(main, f"python -m theory.{NAME}")
