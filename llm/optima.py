"""f_DPO* and f_SFT*: the losses that each objective reaches when it is trained alone.

    python -m llm.optima --max_steps 2400                       # the embedded corpus
    python -m llm.optima --config my_run.yaml --learning_rates 2e-5 5e-5 1e-4
    python -m llm.run    --config my_run.yaml --optima runs/optima/optima.json --algo maxright

The estimate is the lowest held-out loss of runs on one objective from the initial policy, the
paper's way (arXiv 2410.15483, section 6). The command doubles the budget until that loss settles:
every budget is a run of its own with the whole learning-rate schedule in it (the decayed end of a
short run is no point on the way of a long one). It stops when two doublings in a row (one may
be luck) lower the loss by less than `--stationarity` of the whole decrease since the initial
policy, or at --max_steps. `--optima estimate` of llm.run takes one run of the run's own budget
instead. Either is an estimate: a joint run can come out below it, and a gap is then negative.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from llm.flags.arguments import RunConfig
from llm.flags.parse import named_flags, parse
from llm.flags.schedule import VALUE_FLAGS, lam_of, schedule_arguments
from llm.setup import Setup, prepare, total_steps
from llm.single_runs import (
    SingleRun,
    estimate_fingerprint,
    kept_run,
    problem,
    single_run,
)
from theory.cli import (
    OneLineParser,
    UserError,
    positive_float,
    positive_int,
    run_command,
    unit_float,
)
from theory.records import read_json, write_json
from theory.registry import scheduler_options
from theory.tasks import Task
from theory.theorems.bounds import wrong_optimum_bias

PROG = "python -m llm.optima"
Optimum = tuple[float, float]
FILE = "optima.json"
OUTPUT_DIR = "runs/optima"
NOT_USED = {
    *("algo", "schedule", "optima", "resume_from_checkpoint", "force_resume", *VALUE_FLAGS),
    *(f.name for f in fields(schedule_arguments(()))),
}
"""Flags of llm.run that say nothing about a run on one objective (lam: about an error's harm)."""
Say = Callable[[str], None]


# --- for llm.run


def find_optimum(setup: Setup, config: RunConfig, say: Say) -> Optimum | None:
    """(f_DPO*, f_SFT*) as `--optima` says: from a file, estimated, or None."""
    source = config.training.optima
    reads_optima = "optimum" in scheduler_options(config.training.algo)
    if source == "auto":
        needed = config.embedded or reads_optima
        source = "estimate" if needed else "none"
    if source == "none":
        if reads_optima:
            name = config.training.algo
            raise UserError(f"--optima none: {name} compares gaps and needs the optima")
        return None
    if source == "estimate":
        return _estimated(setup, config, say)
    optimum = read_optimum(Path(source))
    _check_problem(Path(source), setup, config)
    return optimum


def read_optimum(path: Path) -> Optimum:
    """Read (f_DPO*, f_SFT*) from an optima.json."""
    try:
        data = read_json(path)
        dpo, sft = float(data["dpo"]), float(data["sft"])
        if not math.isfinite(dpo + sft):
            raise ValueError("a loss is not finite")
    except OSError as error:
        raise UserError(f"--optima {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'--optima {path} must be JSON with two losses: {{"dpo": 0.3, "sft": 1.2}}'
        ) from error
    return dpo, sft


def _check_problem(path: Path, setup: Setup, config: RunConfig) -> None:
    """Refuse the optima of another problem; a file of two bare losses is taken at its word."""
    theirs = read_json(path).get("problem")
    if theirs is None:
        return
    mine = problem(setup, config)
    names = sorted(name for name in mine if mine[name] != theirs.get(name))
    if names:
        raise UserError(
            f"--optima {path} was measured with another {', '.join(names)}; estimate anew with "
            f"{PROG}, or name a file that holds the two losses alone to use them nevertheless"
        )


def _estimated(setup: Setup, config: RunConfig, say: Say) -> Optimum:
    """One run per objective with the budget and the learning rate of the run itself."""
    _check_data(setup)
    path = Path(config.output_dir) / FILE
    key = estimate_fingerprint(setup, config)
    if _fingerprint_in(path) == key:
        say(f"optima: read from {path}")
        return read_optimum(path)
    rate, steps = config.training.learning_rate, total_steps(setup, config)
    runs = {task: single_run(setup, config, task, steps=steps, learning_rate=rate) for task in Task}
    record = _record(setup, config, {task: run.best for task, run in runs.items()})
    if config.training.process_index == 0:
        write_json(path, record | {"estimated_by": "single runs"})
    return runs[Task.DPO].best, runs[Task.SFT].best


def _fingerprint_in(path: Path) -> str | None:
    """Of the estimate in `path`; None for a file that holds no estimate."""
    try:
        data = read_json(path)
    except (OSError, ValueError):
        return None
    return data.get("fingerprint") if isinstance(data, dict) else None


def _record(setup: Setup, config: RunConfig, losses: Mapping[Task, float]) -> dict[str, Any]:
    own = {task.label: losses[task] for task in Task}
    key = estimate_fingerprint(setup, config)
    return own | {"fingerprint": key, "problem": problem(setup, config)}


def _check_data(setup: Setup) -> None:
    missing = [task.label for task in Task if task not in setup.train]
    if missing:
        raise UserError(f"estimating the optima needs {' and '.join(missing)} data as well")


# --- the command


@dataclass(frozen=True)
class Estimate:
    """f* of one objective, and how far from settled it is."""

    loss: float
    steps: int
    """The last budget."""
    learning_rate: float
    """Of the best run."""
    last_improvement: float
    """The larger gain of the last two doublings (nats): the size of the error to expect."""
    relative_improvement: float
    """The same as a share of the whole decrease since the initial policy."""
    stationary: bool
    gradient: float | None
    """|grad f| on training rows after the best run, relative to the initial policy's."""
    runs: tuple[SingleRun, ...]


def main(argv: Sequence[str] | None = None) -> None:
    options, config = _parse(sys.argv[1:] if argv is None else argv)
    say: Say = print if config.training.process_index == 0 else lambda _: None
    setup = prepare(config, say)
    _check_data(setup)
    estimates = {task: settle(setup, config, task, options, say) for task in Task}
    record = _record(setup, config, {task: each.loss for task, each in estimates.items()})
    record["estimated_by"] = "doubled budgets"
    record["stationarity"] = {
        "criterion": "largest share of the whole decrease that the last two doublings brought",
        "tolerance": options.stationarity,
        **{task.label: asdict(each) for task, each in estimates.items()},
    }
    lam = lam_of(config.training)
    errors = {task: each.last_improvement for task, each in estimates.items()}
    record["value_error"] = {"lam": lam, "f_max_bias": value_error_bias(lam, errors)}
    path = Path(config.output_dir) / FILE
    if config.training.process_index == 0:
        write_json(path, record)
    say(report(estimates, lam, record["value_error"]["f_max_bias"]))
    say(f"wrote {path}; use it with --optima {path}")


def settle(
    setup: Setup, config: RunConfig, task: Task, options: argparse.Namespace, say: Say
) -> Estimate:
    """Double the budget until the lowest held-out loss settles, or up to the cap."""
    rates = options.learning_rates or [config.training.learning_rate]
    runs: list[SingleRun] = []
    gains = [math.inf, math.inf]
    tried = budgets(total_steps(setup, config), options.doublings)
    if len(tried) < 3:
        raise UserError(f"--max_steps {tried[-1]} is too few steps to double twice")
    for steps in tried:
        before = min((run.best for run in runs), default=math.inf)
        for rate in rates:
            run, kept = kept_run(setup, config, task, steps, rate, options.gradient_rows)
            runs.append(run)
            say(_line(task, run, kept))
        best = min(runs, key=lambda run: run.best)
        if math.isfinite(before):
            gains.append(before - best.best)
        gain = max(gains[-2:])
        share = gain / (best.start - best.best) if 0.0 < gain < math.inf else gain
        if share < options.stationarity:
            break
    if len(rates) > 1 and best.learning_rate in (min(rates), max(rates)):
        say(f"{task.label}: the best learning rate {best.learning_rate:g} is the grid's last")
    settled = share < options.stationarity
    return Estimate(
        best.best, steps, best.learning_rate, gain, share, settled, best.gradient, tuple(runs)
    )


def budgets(cap: int, doublings: int) -> list[int]:
    """Numbers of steps, each twice the one before, the last one `cap`: [75, 150, 300, 600]."""
    return sorted({math.ceil(cap / 2**halvings) for halvings in range(doublings + 1)})


def value_error_bias(lam: float, errors: Mapping[Task, float]) -> float:
    """What optima that are too high by up to e_i can cost MAXRIGHT in f_Max (T6).

    The largest `bounds.wrong_optimum_bias` over errors in [0, e_DPO] x [0, e_SFT]; it is
    largest where one of the two is exact. Proved for convex objectives.
    """
    corners = ((errors[Task.DPO], 0.0), (0.0, errors[Task.SFT]))
    return max(wrong_optimum_bias(lam, corner) for corner in corners)


def report(estimates: Mapping[Task, Estimate], lam: float, bias: float) -> str:
    """The final table, readable in a terminal."""
    lines = ["", f"{'':<5}{'optimum':>10}{'steps':>8}{'rate':>10}{'last gain':>11}{'share':>8}"]
    for task, each in estimates.items():
        numbers = f"{each.loss:>10.4f}{each.steps:>8}{each.learning_rate:>10.2g}"
        lines.append(
            f"{task.label:<5}{numbers}{each.last_improvement:>11.2g}"
            f"{each.relative_improvement:>8.1%}{'' if each.stationary else '  not settled'}"
        )
    lines.append(
        f"optima too high by the last gains can cost MAXRIGHT {bias:.2g} in f_Max at lam {lam:g} "
        "(T6, theory.theorems.bounds.wrong_optimum_bias, on convex problems)"
    )
    return "\n".join(lines)


def _line(task: Task, run: SingleRun, kept: bool) -> str:
    gradient = "" if run.gradient is None else f", |gradient| {run.gradient:.1%} of the start's"
    return (
        f"{task.label}: {run.steps} steps, learning rate {run.learning_rate:g}: held-out "
        f"{run.best:.4f} (start {run.start:.4f}{gradient}){', kept' if kept else ''}"
    )


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, RunConfig]:
    own = OneLineParser(
        prog=PROG,
        description="Estimate the optimal loss of each objective; takes every flag of llm.run.",
    )
    own.add_argument(
        "--stationarity",
        type=unit_float,
        default=0.01,
        help="settled if twice the steps lower the loss by less than this share of its decrease",
    )
    own.add_argument(
        "--doublings", type=_doublings, default=3, help="from the first budget to --max_steps; >= 2"
    )
    own.add_argument(
        "--learning_rates",
        type=positive_float,
        nargs="+",
        help="try each; default: --learning_rate",
    )
    own.add_argument(
        "--gradient_rows",
        type=_count,
        default=256,
        help="training rows for the gradient's norm, a second measure; 0: none",
    )
    options, rest = own.parse_known_args(argv)
    if unused := sorted(named_flags(rest) & NOT_USED):
        own.error(f"{', '.join(f'--{name}' for name in unused)} says nothing about the optima")
    config = parse(rest, others=own._option_string_actions)
    if config.output_dir == f"runs/{config.training.algo}":  # nothing has named another
        config = replace(config, training=replace(config.training, output_dir=OUTPUT_DIR))
    return options, config


def _doublings(text: str) -> int:
    if positive_int(text) < 2:
        raise argparse.ArgumentTypeError("two doublings are the least that can be judged by")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else positive_int(text)


if __name__ == "__main__":
    run_command(main, PROG)
