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
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from theory.beyond.base import Experiment
from theory.beyond.clipping import Clipping
from theory.beyond.equal_compute import EqualCompute
from theory.beyond.lockout import Lockout
from theory.beyond.plateau import Plateau
from theory.beyond.switches import Switches
from theory.cli import OneLineParser, check_output_dir, positive_int, run_command, unit_float
from theory.command import add_problem, distinct_problems
from theory.records import save_figure, write_json, write_parquet
from theory.sweep import FINISHED, discard_parts, run_sweep

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
    out = Path(arguments.out)
    chosen = list(experiments(arguments))
    work = [experiment.batches() for experiment in chosen]  # a mistake shows before the work starts
    for experiment in chosen:
        check_output_dir(out / experiment.name)
    for experiment, batches in zip(chosen, work, strict=True):
        directory = out / experiment.name
        parts = directory / FINISHED
        results = run_sweep(batches, jobs=arguments.jobs, parts=parts)
        summary = experiment.summary(results)
        figure, numbers = experiment.figure(summary)
        config = asdict(experiment)
        write_json(directory / "config.json", config)
        write_parquet(directory / "results.parquet", results)
        write_json(directory / "summary.json", summary)
        save_figure(figure, directory / experiment.name)
        sidecar = {"command": command(arguments), "config": config, "numbers": numbers}
        write_json(directory / f"{experiment.name}.json", sidecar)
        print(experiment.report(summary) + "\n")
        discard_parts(parts)
    names = ", ".join(experiment.name for experiment in chosen)
    print(f"wrote config.json, results.parquet, summary.json and the figure of {names} to {out}/")


def experiments(arguments: argparse.Namespace) -> Iterator[Experiment]:
    """The chosen experiments: each with its own defaults but for the flags given."""
    for part in arguments.part:
        for kind in PARTS[part]:
            default = kind()  # type: ignore[call-arg]  # every subclass gives its fields defaults
            yield replace(default, **_changes(arguments, kind))


def _changes(arguments: argparse.Namespace, kind: type[Experiment]) -> dict[str, Any]:
    known = {field.name for field in fields(kind)}
    given = {name: getattr(arguments, flag) for name, flag in FLAGS.items() if name in known}
    return {name: value for name, value in given.items() if value is not None}


def command(arguments: argparse.Namespace) -> str:
    """The command line that reproduces the results."""
    line = f"python -m theory.beyond_experiment --part {' '.join(arguments.part)}"
    for flag in FLAGS.values():
        value = getattr(arguments, flag)
        if value is not None:
            values = value if isinstance(value, tuple) else (value,)
            line += f" --{flag} {' '.join(map(str, values))}"
    return line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m theory.beyond_experiment",
        description="What goes beyond the paper; see the module's docstring for the parts.",
    )
    add = parser.add_argument
    add("--part", nargs="+", choices=[*PARTS, "all"], default=["all"], help="default: all")
    add_problem(parser, None, " (switches, lockout, optimizers)")
    add("--lam", type=unit_float, help="weight on DPO: switches, clipping, optimizers")
    add("--steps", type=positive_int, help="steps of each run (equal_compute: of Mix)")
    add("--seeds", type=positive_int, help="number of seeds")
    add("--out", default="figures/beyond_experiment", help="directory for the results")
    add("--jobs", type=positive_int, default=2, help="parallel processes")
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
    run_command(main, "python -m theory.beyond_experiment")
