"""Which runs there are, stage by stage: what a later stage trains depends on the earlier ones."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any, Protocol

from llm.compare.cost import CostModel, measured_costs
from llm.compare.runs import Record, Run, line_run
from llm.compare.settings import EVEN, CompareConfig
from llm.data.checks import LEAKED
from llm.optima import Optimum, find_optimum
from llm.setup import Setup, total_steps
from theory.cli import UserError
from theory.costs import cost_per_step
from theory.metrics import max_value, mix_value
from theory.registry import typical_scheduler
from theory.tasks import Task


class Runner(Protocol):
    def run(self, stage: str, runs: Sequence[Run]) -> list[Record]:
        """The records of the runs, in their order."""
        ...


HELD_OUT, TRAINED = "held-out", "training"


@dataclass(frozen=True)
class Experiment:
    """Everything that was measured. A record of `runs` may serve several budgets."""

    optimum: Optimum
    steps: int
    singles: tuple[Record, ...]
    """Runs on one objective; none if the optima were read from a file."""
    progress: dict[float, float]
    """How far each learning rate trains an objective alone; see `progress_of`."""
    tuning: tuple[Record, ...]
    rates: dict[str, float]
    """The learning rate of each line."""
    runs: dict[str, tuple[Record, ...]]
    """Per budget."""
    costs: CostModel
    measured_on: str = HELD_OUT
    """The rows that the losses are of."""


def run_experiment(config: CompareConfig, setup: Setup, pool: Runner) -> Experiment:
    steps = total_steps(setup, config.run)
    singles, optimum = find_optima(config, setup, pool, steps)
    progress = progress_of(singles, optimum)
    tuning = run_tuning(config, pool, steps, optimum)
    rates = choose_rates(config, tuning, progress)
    by_steps = pool.run("equal steps", _comparison(config, rates, optimum, steps))
    costs = measured_costs(config.run, setup, [r for r in by_steps if not r["failed"]])
    runs = {"steps": tuple(by_steps)}
    if "compute" in config.budgets:
        planned = equal_compute(by_steps, costs, steps, config.run.training.schedule)
        runs["compute"] = tuple(pool.run("equal compute", planned))
    if "steps" not in config.budgets:
        del runs["steps"]
    rows = measured_on(setup)
    return Experiment(optimum, steps, singles, progress, tuning, rates, runs, costs, rows)


def measured_on(setup: Setup) -> str:
    """HELD_OUT, or TRAINED where all that is evaluated is trained on, as the theory has it."""
    reports = [encoded.report for encoded in setup.held_out.values()]
    trained = all(report.notes.get(LEAKED, 0) == report.kept for report in reports)
    return TRAINED if trained else HELD_OUT


def find_optima(
    config: CompareConfig, setup: Setup, pool: Runner, steps: int
) -> tuple[tuple[Record, ...], Optimum]:
    """f* of both objectives: from a file, or the lowest held-out loss of runs on one alone."""
    if config.run.training.optima not in ("auto", "estimate"):
        optimum = find_optimum(setup, config.run, print)
        assert optimum is not None  # 'none' is refused before
        return (), optimum
    runs = [
        Run(task.label, steps, rate, seed)
        for task, rate, seed in product(Task, config.learning_rates, config.tuning_seeds)
    ]
    records = pool.run("optima", runs)
    dpo, sft = (_lowest(records, task) for task in Task)
    if not math.isfinite(dpo + sft):
        raise UserError("a run on one objective diverged at every learning rate: lower them")
    return tuple(records), (dpo, sft)


def _lowest(records: Iterable[Record], task: Task) -> float:
    """The lowest loss of `task` along the finished runs on it."""
    finished = [record for record in _of(records, task.label) if not record["failed"]]
    losses = (point[f"f_{task.label}"] for record in finished for point in record["path"])
    return min(losses, default=math.inf)


def progress_of(singles: Sequence[Record], optimum: Optimum) -> dict[float, float]:
    """Per learning rate, the share of the way from the initial policy to f* that a run on one
    objective goes: the mean over seeds, of the objective with the smaller one."""
    shares: dict[float, dict[str, list[float]]] = {}
    for record in singles:
        run = Run.from_json(record["run"])
        name, best = f"f_{run.algorithm}", optimum[Task[run.algorithm.upper()]]
        share = 0.0
        if not record["failed"]:
            losses = [point[name] for point in record["path"]]
            way = losses[0] - best  # 0 if no run improves on the initial policy
            share = (losses[0] - min(losses)) / way if way > 0.0 else 1.0
        shares.setdefault(run.learning_rate, {}).setdefault(run.algorithm, []).append(share)
    return {rate: min(fmean(each) for each in own.values()) for rate, own in shares.items()}


def run_tuning(
    config: CompareConfig, pool: Runner, steps: int, optimum: Optimum
) -> tuple[Record, ...]:
    """Every line at every learning rate; nothing if there is one rate only."""
    if len(config.learning_rates) == 1:
        return ()
    grid = product(config.lines, config.learning_rates, config.tuning_seeds)
    runs = [
        line_run(
            *(config.algorithm_of[line], line, config.even_knob(line), optimum),
            steps=steps,
            learning_rate=rate,
            seed=seed,
            path=False,
        )
        for line, rate, seed in grid
    ]
    return tuple(pool.run("tuning", runs))


def choose_rates(
    config: CompareConfig, tuning: Sequence[Record], progress: Mapping[float, float]
) -> dict[str, float]:
    """The learning rate of each line: the lowest mean f_Mix(1/2) among the rates that train.

    Under a strong conflict f_Mix of sequential training is best where the second stage hardly
    moves. So a rate counts only if it takes each objective, alone, `least_progress` of the way to
    f*; the same for every line. If no rate does, all count.
    """
    if not tuning:
        return dict.fromkeys(config.lines, config.learning_rates[0])
    trains = {rate for rate, share in progress.items() if share >= config.least_progress}
    return {line: _best_rate(line, tuned_values(tuning, line), trains) for line in config.lines}


def tuned_values(tuning: Iterable[Record], line: str) -> dict[float, float]:
    """Mean f_Mix(1/2) of a line per learning rate."""
    values: dict[float, list[float]] = {}
    for record in _of(tuning, line):
        values.setdefault(record["run"]["learning_rate"], []).append(tuning_value(record))
    return {rate: fmean(each) for rate, each in values.items()}


def _best_rate(line: str, values: Mapping[float, float], trains: Collection[float]) -> float:
    allowed = [rate for rate in values if rate in trains] or list(values)
    best = min(allowed, key=lambda rate: values[rate])
    if not math.isfinite(values[best]):
        raise UserError(f"{line} diverged at every learning rate: lower --learning_rates")
    return best


def tuning_value(record: Record) -> float:
    """f_Mix(1/2) of the end point; infinite for a run that failed."""
    if record["failed"]:
        return math.inf
    return float(mix_value([record["f_dpo"], record["f_sft"]], EVEN))


def tuning_max_value(record: Record, optimum: Optimum) -> float:
    """f_Max(1/2) of the end point, what MAXRIGHT is made for: reported next to f_Mix."""
    if record["failed"]:
        return math.inf
    return float(max_value([record["f_dpo"], record["f_sft"]], optimum, EVEN))


def _comparison(
    config: CompareConfig, rates: dict[str, float], optimum: Optimum, steps: int
) -> list[Run]:
    return [
        line_run(
            *(config.algorithm_of[line], line, knob, optimum),
            steps=steps,
            learning_rate=rates[line],
            seed=seed,
        )
        for line in config.lines
        for knob, seed in product(config.knobs(line), config.seeds)
    ]


def equal_compute(
    records: Iterable[Record], costs: CostModel, steps: int, shared: Mapping[str, Any]
) -> list[Run]:
    """The same runs with as many steps as sequential training's compute buys each setting.

    The budget is `steps` steps, half of them on each objective. A setting's cost per step is that
    of `theory.costs`; where it needs the share of DPO steps, that is the mean over the seeds.
    """
    budget = steps * 0.5 * (costs.step(Task.DPO) + costs.step(Task.SFT))
    settings: dict[Run, list[Record]] = {}
    for record in records:
        settings.setdefault(Run.from_json(record["run"]).with_seed(0), []).append(record)
    runs = []
    for setting, group in settings.items():
        finished = [record for record in group if not record["failed"]]
        if not finished:
            continue  # its cost is unknown
        per_step = cost_per_step(
            typical_scheduler(setting.algorithm, {**shared, **setting.options}),
            costs=costs.costs,
            p_dpo=fmean(record["steps"]["dpo"] / setting.steps for record in finished),
            reuse_probe=costs.reuse,
        )
        own = setting.with_steps(max(round(budget / per_step), 1))
        runs += [own.with_seed(record["run"]["seed"]) for record in group]
    return runs


def _of(records: Iterable[Record], line: str) -> list[Record]:
    return [record for record in records if Run.from_json(record["run"]).line == line]
