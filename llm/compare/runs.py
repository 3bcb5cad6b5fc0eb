"""A run of a comparison: what decides it, and the training that turns it into a record."""

from __future__ import annotations

import os
import time
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from llm.flags.arguments import RunConfig
from llm.flags.schedule import options_for
from llm.optima import Optimum
from llm.run import new_trainer
from llm.setup import Setup
from llm.train.trainer import JointTrainer
from theory.cli import UserError
from theory.foreign import is_foreign, source_digest
from theory.records import digest
from theory.registry import resolve, scheduler_options
from theory.tasks import Task

Record = dict[str, Any]
"""Plain data: `run`, `failed` (a reason or null) and what was measured."""


@dataclass(frozen=True)
class Run:
    """One training run; with the problem and the shared settings, its fields decide its result."""

    algorithm: str
    steps: int
    learning_rate: float
    seed: int
    line: str = ""
    """Which variant of the algorithm, such as an order of sequential training."""
    knob: float | None = None
    """lam or the split, as the algorithm has it."""
    optimum: Optimum | None = None
    path: bool = True
    """Whether the held-out losses are measured along the way, not at the end only."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "line", self.line or self.algorithm)

    @property
    def options(self) -> dict[str, Any]:
        """The schedule's options that are the run's own."""
        kind = resolve(self.algorithm)
        own = {} if self.knob is None else {kind.knob: self.knob}
        return kind.lines().get(self.line, {}) | own

    @property
    def label(self) -> str:
        knob = "" if self.knob is None else f"-{self.knob:g}"
        return f"{self.line}{knob}-rate{self.learning_rate:g}-steps{self.steps}-seed{self.seed}"

    def key(self, shared: str) -> str:
        """Names the run, given a fingerprint of everything that the runs share."""
        source = source_digest(self.algorithm) if is_foreign(self.algorithm) else ""
        return digest({"run": asdict(self), "shared": shared, "source": source})[:20]

    def with_seed(self, seed: int) -> Run:
        return replace(self, seed=seed)

    def with_steps(self, steps: int) -> Run:
        return replace(self, steps=steps)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Run:
        optimum = fields["optimum"]
        return cls(**fields | {"optimum": None if optimum is None else tuple(optimum)})


def line_run(algorithm: str, line: str, knob: float | None, optimum: Optimum, **fields: Any) -> Run:
    """A run of one line of an algorithm."""
    reads_optimum = "optimum" in scheduler_options(algorithm)
    own = optimum if reads_optimum else None
    return Run(algorithm, line=line, knob=knob, optimum=own, **fields)


def configure(config: RunConfig, run: Run, folder: Path) -> RunConfig:
    """The shared settings with those of one run."""
    options = options_for(run.algorithm, config.training.schedule) | run.options
    training = replace(
        config.training,
        algo=run.algorithm,
        lam=options.pop("lam", None),
        schedule=options,
        seed=run.seed,
        data_seed=None,
        max_steps=run.steps,
        learning_rate=run.learning_rate,
        eval_strategy=config.training.eval_strategy if run.path else "no",
        do_eval=False,  # transformers derives it from the strategy
        output_dir=str(folder),
        save_strategy="no",
        load_best_model_at_end=False,
        report_to=[],
        disable_tqdm=True,
    )
    return replace(config, training=training)


def train(setup: Setup, config: RunConfig, run: Run, folder: Path, keep_model: bool) -> Record:
    """Train one run; a loss that is not finite makes a record that says so."""
    record: Record = {"run": asdict(run), "failed": None}
    own = configure(config, run, folder)
    # Without a bar of its own, Trainer prints every log line; they are in metrics.jsonl.
    with open(os.devnull, "w") as sink, redirect_stdout(sink):
        trainer = new_trainer(setup, own, run.optimum)
        trainer.remove_callback(PrinterCallback)
        path = PathRecorder(trainer)
        trainer.add_callback(path)
        try:
            path.add(trainer.held_out())
            trainer.train()
            path.close(trainer.held_out)
        except UserError as error:
            return record | {"failed": " ".join(str(error).split())}
        if keep_model:
            trainer.save_model()
    return record | measurements(trainer, path)


def measurements(trainer: JointTrainer, path: PathRecorder) -> Record:
    at_probes = [trainer.decisions[step] for step in trainer.probed_at]
    ends = path.points[-1]
    return {
        "f_dpo": ends["f_dpo"],
        "f_sft": ends["f_sft"],
        "held_out": path.metrics,
        "path": path.points,
        "stage_end": path.stage_end,
        "steps": {task.label: n for task, n in trainer.steps_taken.items()},
        "tokens": {task.label: n for task, n in trainer.tokens_seen.items()},
        "rows": {task.label: stream.consumed for task, stream in trainer.streams.items()},
        "probes": trainer.probes,
        "probe_dpo_wins": sum(weights[Task.DPO] > 0.0 for weights in at_probes),
        "seconds": ends["seconds"],
        "wall_seconds_in": dict(trainer.clock.seconds),
    }


class PathRecorder(TrainerCallback):
    """Held-out losses along a run, with what had been spent by then.

    Evaluates where --eval_steps says and at the boundary of the stages of a sequence. `seconds`
    are those of training, without evaluation; on a CPU what this process has used, since other
    processes share the machine, else by the clock on the wall.
    """

    def __init__(self, trainer: JointTrainer) -> None:
        self.trainer = trainer
        self.points: list[dict[str, float]] = []
        self.stage_end: dict[str, float] | None = None
        self.metrics: dict[str, float] = {}
        last = trainer.num_steps - 1
        self.boundary = int(trainer.scheduler.stage_start(last)) or None
        self._now = time.process_time if trainer.args.device.type == "cpu" else time.perf_counter
        self._begin = self._last = self._now()
        self._evaluating = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begin = self._last = self._now()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last = self._now()
        if state.global_step == self.boundary:
            control.should_evaluate = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        metrics = kwargs["metrics"]
        self.add({name.removeprefix("eval_"): value for name, value in metrics.items()})
        if state.global_step == self.boundary:
            self.stage_end = self.points[-1]
        self._evaluating += self._now() - self._last
        self._last = self._now()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last = self._now()  # Trainer has read the loss: an accelerator has finished

    def close(self, held_out: Any) -> None:
        """Measure the end point, unless the last evaluation was there."""
        if self.points[-1]["step"] < self.trainer.state.global_step:
            self.add(held_out())

    def add(self, metrics: dict[str, float]) -> None:
        trainer = self.trainer
        trainer._count_tokens()
        point: dict[str, float] = {
            "step": trainer.state.global_step,
            "seconds": self._last - self._begin - self._evaluating,
            "probes": trainer.probes,
        }
        for task in Task:
            point[f"f_{task.label}"] = metrics[f"{task.label}_loss"]
            point[f"{task.label}_steps"] = trainer.steps_taken.get(task, 0)
            point[f"{task.label}_tokens"] = trainer.tokens_seen.get(task, 0)
        self.points.append(point)
        self.metrics = dict(metrics)
