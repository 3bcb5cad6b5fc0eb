"""The command line: what is compared, and the run that all comparisons share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llm.flags.arguments import RunConfig
from llm.flags.parse import named_flags
from llm.flags.parse import parse as parse_run
from theory.cli import (
    OneLineParser,
    UserError,
    positive_float,
    positive_int,
    unit_float,
    usable_cores,
)
from theory.compared import algorithm_name
from theory.registry import flags_of, resolve
from theory.schedulers import ORDERS
from theory.tasks import Task

PROG = "python -m llm.compare"
RECIPE = Path(__file__).parents[1] / "recipes" / "compare.yaml"
"""The problem when neither a model nor a --config is named."""
ALGORITHMS = ("sequential", "mix", "alright", "maxright")
BUDGETS = ("steps", "compute")
RUNS = "runs"
"""Folder below --out for what is kept of every run."""
EVEN = 0.5
"""The lam and the split of the tuning, and the split whose cost is the budget of compute."""
RATE_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
FIRST_TUNING_SEED = 10_000
MOST_DEFAULT_JOBS = 8
SET_HERE = {
    **dict.fromkeys(
        ("algo", "schedule", "order", "lam", "split", "learning_rate"), "every run has its own"
    ),
    **dict.fromkeys(("data_seed",), "--seeds says how many orders of the samples to draw"),
    **dict.fromkeys(("output_dir", "overwrite_output_dir"), "give --out"),
    **dict.fromkeys(
        (
            *("resume_from_checkpoint", "force_resume", "save_strategy", "save_steps"),
            *("save_total_limit", "load_best_model_at_end", "metric_for_best_model"),
        ),
        "finished runs are kept and others start again; --keep_models true keeps the models",
    ),
    **dict.fromkeys(("report_to", "push_to_hub"), "the runs of a comparison are not tracked"),
}
"""Flags of llm.run that a comparison decides itself, and why."""


@dataclass(frozen=True)
class CompareConfig:
    """One validated comparison. `run` holds what the runs share, `argv` the flags it came from."""

    algos: tuple[str, ...]
    orders: tuple[str, ...]
    lams: tuple[float, ...]
    splits: tuple[float, ...]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    least_progress: float
    budgets: tuple[str, ...]
    jobs: int
    keep_models: bool
    out: Path
    argv: tuple[str, ...]
    run: RunConfig

    @cached_property
    def algorithm_of(self) -> dict[str, str]:
        """What is compared, by line: the orders of sequential training, the joint schedules."""
        return {
            line: algo
            for algo in self.algos
            for line in resolve(algo).lines()
            if line in self.orders or line not in ORDERS
        }

    @property
    def lines(self) -> tuple[str, ...]:
        return tuple(self.algorithm_of)

    def knobs(self, line: str) -> tuple[float | None, ...]:
        """The splits or the values of lam of a line; one None if it has neither."""
        kind = resolve(self.algorithm_of[line])
        values = {"lam": self.lams, "split": self.splits}.get(kind.knob, ())
        return values if values and kind.knob in flags_of(kind) else (None,)

    def even_knob(self, line: str) -> float | None:
        """The lam or split of the tuning."""
        return None if self.knobs(line) == (None,) else EVEN

    def to_json(self) -> dict[str, Any]:
        hidden = ("run", "argv", "out", "jobs")  # machine's own; the command says what was asked
        own = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in hidden
        }
        return own | {"model": asdict(self.run.model), "data": asdict(self.run.data)}


def parse(argv: Sequence[str]) -> CompareConfig:
    """Read our own flags; the rest is for llm.run, which checks it."""
    parser = _parser()
    own, rest = parser.parse_known_args(argv)
    run_argv = _run_argv(own, rest)
    run = parse_run(run_argv, own.algos, parser._option_string_actions)
    _check_run(run)
    rates = own.learning_rates or [run.training.learning_rate * f for f in RATE_FACTORS]
    return CompareConfig(
        algos=_distinct(own.algos),
        orders=_distinct(own.orders),
        lams=_distinct(sorted(own.lams)),
        splits=_distinct(sorted(own.splits)),
        seeds=tuple(range(own.seeds)),
        tuning_seeds=tuple(range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + own.tuning_seeds)),
        learning_rates=_distinct(sorted(float(f"{rate:.6g}") for rate in rates)),
        least_progress=own.least_progress,
        budgets=_distinct(own.budgets),
        jobs=own.jobs or default_jobs(run),
        keep_models=own.keep_models,
        out=Path(own.out),
        argv=tuple(run_argv),
        run=run,
    )


def devices(run: RunConfig) -> list[str]:
    """The CUDA devices that the runs may use, by the names CUDA_VISIBLE_DEVICES takes."""
    if run.training.use_cpu or not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


def default_jobs(run: RunConfig) -> int:
    return len(devices(run)) or min(usable_cores(), MOST_DEFAULT_JOBS)


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog=PROG,
        description="Compare schedules on one problem; also takes the flags of llm.run.",
    )
    add = parser.add_argument
    add(
        *("--algos", "--algo"),
        nargs="+",
        type=algorithm_name,
        default=list(ALGORITHMS),
        help="schedules of llm.run, or of your own: package.module:Class",
    )
    add("--orders", nargs="+", choices=list(ORDERS), default=list(ORDERS), help="of sequential")
    add("--lams", nargs="+", type=_inner, default=[0.25, 0.5, 0.75], help="weights on DPO")
    add(
        "--splits",
        nargs="+",
        type=_inner,
        default=[0.25, 0.5, 0.75],
        help="sequential: share of the steps in the first stage",
    )
    add("--seeds", type=positive_int, default=3, help="runs of each setting")
    add("--tuning_seeds", type=positive_int, default=1, help="runs of each setting in the tuning")
    add(
        "--learning_rates",
        nargs="+",
        type=positive_float,
        help="the tuning's grid; default: the shared run's rate times 0.1, 0.3, 1, 3, 10",
    )
    add(
        "--least_progress",
        type=unit_float,
        default=0.8,
        help="of the way to f* that a rate must take each objective alone; 0: any rate may win",
    )
    add("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS), help="equal in what")
    add("--jobs", type=positive_int, help="processes; default: one per CUDA device, else per core")
    add("--keep_models", type=_boolean, default=False, help="save the model of every run")
    add("--out", default="runs/compare", help="directory for the results")
    return parser


def _run_argv(own: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    """The shared run's flags."""
    named = named_flags(rest)
    for name in sorted(named & SET_HERE.keys() - {"learning_rate"}):
        raise UserError(f"--{name} is set by the comparison: {SET_HERE[name]}")
    if "learning_rate" in named and own.learning_rates:
        raise UserError("--learning_rate is not used with --learning_rates")
    recipe = [] if named & {"config", "model_name_or_path"} else ["--config", str(RECIPE)]
    shared = ["--algo", own.algos[0], "--output_dir", str(Path(own.out) / RUNS / "shared")]
    return [*recipe, *rest, *shared]


def _check_run(run: RunConfig) -> None:
    training = run.training
    if training.optima == "none":
        raise UserError("--optima none: a comparison reports gaps and needs the optima")
    if training.world_size > 1:
        raise UserError("a comparison starts its own processes: run it without a launcher")
    for name in ("lam", "order", "split"):
        if name in training.schedule or (name == "lam" and training.lam is not None):
            raise UserError(f"{name} in the --config file: every run of a comparison has its own")
    if run.tasks != tuple(Task):
        raise UserError("a comparison needs demonstrations and preferences")


def check_jobs(config: CompareConfig) -> list[str]:
    """The devices to use, one per process; none on a CPU."""
    found = devices(config.run)
    if found and config.jobs > len(found):
        raise UserError(
            f"--jobs {config.jobs}: there are {len(found)} devices, and each takes one process"
        )
    return found[: config.jobs]


def _distinct(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


def _inner(text: str) -> float:
    """A number strictly between 0 and 1: at the ends there is one objective."""
    value = unit_float(text)
    if value in (0.0, 1.0):
        raise argparse.ArgumentTypeError(f"{text} leaves one objective out; give it in (0, 1)")
    return value


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return text.lower() == "true"
