"""The only training loop for language models: transformers' Trainer under a scheduler.

Trainer keeps what it does well (optimiser, precision, devices, sharding, trackers, checkpoints,
progress bar). Once per optimiser step, before any forward, it asks for the micro-batches of the
step: there the scheduler of `theory.schedulers` decides, and only the objectives that it steps on
draw from their streams. A decision holds for all micro-batches of the step, on every rank.

The loss of a step is sum_i w_i f_i over the objectives with w_i > 0, where f_SFT is a mean over the
response tokens and f_DPO over the pairs of the whole step (all micro-batches, all ranks).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import (
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from llm.callbacks import ProgressBar
from llm.checkpoints import SafeCheckpoints
from llm.data import fingerprint_rows
from llm.evaluate import evaluate_objective, held_out_summary
from llm.learning_rate import staged_schedule
from llm.objectives import LanguageObjective, Row
from llm.streams import SampleStream
from theory.cli import UserError
from theory.schedulers import Scheduler, ScheduleState
from theory.tasks import Task

STATE_KEY = "JointTrainer"
"""Where the schedule and the streams stand in a checkpoint's trainer_state.json."""

Objectives = Mapping[Task, LanguageObjective]
RowSets = Mapping[Task, Sequence[Row]]


class JointTrainer(SafeCheckpoints):
    """Train one model on two objectives, each step on what `scheduler` says.

    Args:
        model: a causal language model (or a PEFT model around one).
        args: transformers' arguments. `max_steps` counts optimiser steps of both objectives
            together; without it, an epoch is one pass over the longer of the data sets in use.
        scheduler: any of `theory.schedulers`, unbatched (`scheduler.runs == ()`).
        objectives: the objective of each task that the scheduler may select.
        train_rows, eval_rows: tokenised rows per task (see `llm.data`); preference rows carry the
            reference's log-probabilities.
        batch_sizes: rows (pairs) per device and micro-batch of each task.
        processing_class: the tokenizer; its pad token pads the batches.
        description: what the progress bar calls the run.
    """

    def __init__(
        self,
        *,
        model: Any,
        args: TrainingArguments,
        scheduler: Scheduler,
        objectives: Objectives,
        train_rows: RowSets,
        eval_rows: RowSets | None = None,
        batch_sizes: Mapping[Task, int],
        processing_class: Any,
        callbacks: list[TrainerCallback] | None = None,
        description: str = "training",
    ) -> None:
        if scheduler.runs != ():
            raise ValueError("the trainer takes one run; this scheduler holds a batch of runs")
        self.model: torch.nn.Module
        self.optimizer: Any
        self.scheduler, self.objectives = scheduler, dict(objectives)
        self.train_rows, self.batch_sizes = dict(train_rows), dict(batch_sizes)
        self.pad_token_id = int(processing_class.pad_token_id)
        # The losses below are normalised by the whole step's items already: see `compute_loss`.
        super().__init__(
            model=model,
            args=args,
            eval_dataset=cast(Any, eval_rows) or None,
            processing_class=processing_class,
            callbacks=[_CloseStep(self), *(callbacks or [])],
        )
        self.model_accepts_loss_kwargs = True
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(ProgressBar(description))
        self.streams = {
            task: SampleStream(
                task,
                len(rows),
                self.batch_sizes[task],
                args.data_seed if args.data_seed is not None else args.seed,
                rank=args.process_index,
                world_size=args.world_size,
            )
            for task, rows in self.train_rows.items()
        }
        self.schedule = scheduler.init()
        self.steps_taken = dict.fromkeys(self.streams, 0)
        self.tokens_seen = dict.fromkeys(self.streams, 0)
        self.probes = 0
        self.decisions: list[list[float]] = []
        self._step_losses: dict[Task, torch.Tensor] = {}
        self._meters: dict[str, tuple[torch.Tensor, int]] = {}

    # ------------------------------------------------------------------- the step: decide and draw

    def get_train_dataloader(self) -> DataLoader:
        """A clock: one tick per micro-batch of an epoch. The samples come from the streams."""
        sizes = {task: len(rows) for task, rows in self.train_rows.items()}
        steps = steps_per_epoch(sizes, self.batch_sizes, self.args)
        return DataLoader(range(steps * self.args.gradient_accumulation_steps))  # type: ignore[arg-type]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """Decide what this optimiser step trains on and draw its micro-batches."""
        for _ in range(num_batches):
            next(epoch_iterator, None)
        self._restart_at_stage()
        weights, self.schedule = self.scheduler.select(
            self.schedule, lambda: self._probe(num_batches)
        )
        self.decisions.append(weights.tolist())
        stepped = [task for task in Task if weights[task] != 0.0]
        batches: list[dict[str, Any]] = [{"weights": weights.tolist()} for _ in range(num_batches)]
        counts = torch.zeros(len(Task))
        for task in stepped:
            for batch, rows in zip(batches, self._draw(task, num_batches), strict=True):
                batch[task.label] = self.objectives[task].collate(rows, self.pad_token_id)
                counts[task] += self.objectives[task].items(rows)
        items = self._sum_over_ranks(counts.to(device))
        for batch in batches:
            batch["items"] = items
        self._step_losses = {}
        return batches, items.sum()

    def _draw(self, task: Task, num_batches: int) -> list[list[Row]]:
        batches = self._peek(task, num_batches)
        self.streams[task].advance(num_batches)
        self.steps_taken[task] += 1
        rows = (row for batch in batches for row in batch)
        self.tokens_seen[task] += sum(
            len(ids) for row in rows for key, ids in row.items() if key.endswith("_ids")
        )
        return batches

    def _peek(self, task: Task, num_batches: int) -> list[list[Row]]:
        if task not in self.streams:
            raise ValueError(f"the schedule selected {task.label}, but it has no training data")
        rows = self.train_rows[task]
        return [[rows[i] for i in batch] for batch in self.streams[task].peek(num_batches)]

    @torch.no_grad()
    def _probe(self, num_batches: int) -> NDArray[np.float64]:
        """Both losses (2,) on the batches that the next step of each objective would train on."""
        self.probes += 1
        losses = torch.zeros(2, device=self.args.device)
        items = torch.zeros(2, device=self.args.device)
        for task in Task:
            for rows in self._peek(task, num_batches):
                metrics = evaluate_objective(
                    self.model,
                    self.objectives[task],
                    rows,
                    batch_size=len(rows),
                    pad_token_id=self.pad_token_id,
                )
                count = self.objectives[task].items(rows)
                losses[task] += metrics["loss"] * count
                items[task] += count
        return (self._sum_over_ranks(losses) / self._sum_over_ranks(items)).double().cpu().numpy()

    # ------------------------------------------------------------------------- the step: the loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """This micro-batch's share of sum_i w_i f_i of the step."""
        loss = torch.zeros((), device=self.args.device)
        for task in Task:
            if task.label not in inputs:
                continue
            terms = self.objectives[task](model, inputs[task.label])
            share = terms.total / inputs["items"][task]
            self._step_losses[task] = self._step_losses.get(task, 0.0) + share.detach()
            self._meter(task, terms.sums)
            loss = loss + inputs["weights"][task] * share
        # Data-parallel wrappers average gradients over ranks; the shares are to be summed.
        return loss * self.args.world_size

    def _close_step(self) -> None:
        """After the optimiser step: hand the losses to the scheduler, and meter them."""
        observed = None
        if self.scheduler.reads_losses:
            values = [self._step_losses.get(task, torch.tensor(torch.nan)) for task in Task]
            losses = torch.stack([value.to(self.args.device) for value in values])
            observed = self._sum_over_ranks(losses).double().cpu().numpy()
        self.schedule = self.scheduler.observe(self.schedule, observed)
        for task, value in self._step_losses.items():
            # A rank knows its share of the loss; the mean over ranks is to be the whole.
            self._meter(task, {"loss": (value * self.args.world_size, 1)})

    def _sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, "sum") if self.args.world_size > 1 else values

    # --------------------------------------------------------------------- stages of a sequence

    def _restart_at_stage(self) -> None:
        """At the boundary of a sequential schedule, start the optimiser afresh."""
        step = self.schedule.step
        if step > 0 and self.scheduler.stage_start(step) == step:
            getattr(self.optimizer, "optimizer", self.optimizer).state.clear()

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        """The learning-rate schedule of transformers, run once per stage of the scheduler."""
        starts = sorted({int(self.scheduler.stage_start(t)) for t in range(num_training_steps)})
        if len(starts) < 2:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            self.lr_scheduler = staged_schedule(
                self.args, optimizer or self.optimizer, starts, num_training_steps
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # ------------------------------------------------------------------- evaluation and logging

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Held-out values of every objective with data: `eval_dpo_loss`, `eval_sft_loss`, ..."""
        metrics = self.held_out(eval_dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def held_out(self, row_sets: RowSets | None = None) -> dict[str, float]:
        """Values on the held-out rows, computed without logging."""
        row_sets = cast(RowSets, self.eval_dataset if row_sets is None else row_sets)
        with self.accelerator.autocast():  # before training the model does not yet do so itself
            values = {
                task: evaluate_objective(
                    self.model,
                    self.objectives[task],
                    rows,
                    batch_size=self.args.per_device_eval_batch_size,
                    pad_token_id=self.pad_token_id,
                )
                for task, rows in (row_sets or {}).items()
            }
        summary = held_out_summary(values)
        for name, value in summary.items():
            self._check_finite(f"held-out {name}", value)
        return summary

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metered means of each objective; stop on a loss that is not a number."""
        if "loss" in logs:
            logs |= self._drain_meters()
        for name in ("loss", "train_loss"):  # of a log line, and of the whole run at its end
            self._check_finite("loss", logs.get(name, 0.0))
        super().log(logs, start_time)

    def _check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise UserError(
                f"the {name} is {value} at step {self.state.global_step}: lower --learning_rate, "
                "or check the data (training stopped)"
            )

    def _meter(self, task: Task, sums: Mapping[str, tuple[torch.Tensor, int]]) -> None:
        for name, (total, count) in sums.items():
            key = f"{task.label}_{name}"
            old_total, old_count = self._meters.get(key, (0.0, 0))
            self._meters[key] = (old_total + total, old_count + count)

    def _drain_meters(self) -> dict[str, float]:
        """Means since the last log, over all ranks; the device is read here and only here."""
        means = {}
        for name, (total, count) in self._meters.items():
            pair = torch.tensor([float(total), count], device=self.args.device)
            total_over_ranks, count_over_ranks = self._sum_over_ranks(pair).tolist()
            means[name] = total_over_ranks / count_over_ranks
        self._meters = {}
        counts = {f"{task.label}_steps": float(n) for task, n in self.steps_taken.items()}
        return means | counts

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        batches = (inputs[task.label] for task in Task if task.label in inputs)
        return sum(super(JointTrainer, self).floating_point_ops(batch) for batch in batches)

    # ----------------------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        for name, (total, _) in self._meters.items():
            self._check_finite(name, float(total))
        cast(dict[str, Any], self.state.stateful_callbacks)[STATE_KEY] = self.state_to_json()
        super()._save_checkpoint(model, trial)

    def state_to_json(self) -> dict[str, Any]:
        """Schedule, streams and counters, as plain data."""
        return {
            "schedule": self.schedule.to_json(),
            "consumed": {task.label: stream.consumed for task, stream in self.streams.items()},
            "steps_taken": {task.label: n for task, n in self.steps_taken.items()},
            "tokens_seen": {task.label: n for task, n in self.tokens_seen.items()},
            "probes": self.probes,
            "decisions": self.decisions,
            "identity": self._identity,
        }

    @cached_property
    def _identity(self) -> dict[str, str]:
        """What a checkpoint and the run that continues it must have in common."""
        identity = {"schedule": repr(self.scheduler)}
        for task, stream in self.streams.items():
            identity[f"{task.label} loss"] = repr(self.objectives[task])
            identity[f"{task.label} data"] = fingerprint_rows(self.train_rows[task])
            identity[f"{task.label} order"] = f"seed {stream.seed}"
        return identity

    def _restore(self, saved: dict[str, Any]) -> None:
        for name in sorted(self._identity.keys() | saved["identity"].keys()):
            theirs, mine = (each.get(name) for each in (saved["identity"], self._identity))
            if theirs != mine:
                raise UserError(
                    f"the checkpoint belongs to another run: its {name} is {theirs}, here {mine}"
                )
        self.schedule = ScheduleState.from_json(saved["schedule"])
        for task, stream in self.streams.items():
            stream.consumed = saved["consumed"][task.label]
            self.steps_taken[task] = saved["steps_taken"][task.label]
            self.tokens_seen[task] = saved["tokens_seen"][task.label]
        self.probes, self.decisions = saved["probes"], saved["decisions"]


def steps_per_epoch(
    sizes: Mapping[Task, int], batch_sizes: Mapping[Task, int], args: TrainingArguments
) -> int:
    """Optimiser steps of one pass over the longer of the data sets (longer in steps)."""
    per_step = args.gradient_accumulation_steps * args.world_size
    return max(math.ceil(rows / (batch_sizes[task] * per_step)) for task, rows in sizes.items())


class _CloseStep(TrainerCallback):
    """Ties the schedule to Trainer's events; `on_step_end` runs before a checkpoint is saved."""

    def __init__(self, trainer: JointTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        saved = cast(dict[str, Any], state.stateful_callbacks).get(STATE_KEY)
        if saved is not None:
            self.trainer._restore(saved)
        elif state.global_step > 0:
            raise UserError("the checkpoint was not written by this trainer: it has no schedule")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._close_step()
