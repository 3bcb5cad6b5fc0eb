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
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import (
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from llm.loss.attention import attention_without_plans, packed_attention
from llm.loss.kl import ReferenceSamples
from llm.loss.objectives import Batch, Row, Terms, move
from llm.loss.packing import split_rows, to_device, tokens_per_forward
from llm.train.callbacks import ProgressBar
from llm.train.identity import STATE_KEY, Identity, check_resume, run_identity
from llm.train.noise import Dropout, EmbeddingNoise
from llm.train.reporting import Objectives, ReportingTrainer, RowSets
from llm.train.streams import open_streams, steps_per_epoch
from llm.train.values import copied_early, share_of_rank, summed_loss
from theory.scheduling import Answers, Scheduler, ScheduleState
from theory.tasks import Task


class JointTrainer(ReportingTrainer):
    """Train one model on two objectives, each step on what `scheduler` says.

    Args:
        model: a causal language model (or a PEFT model around one).
        args: transformers' arguments. `max_steps` counts optimiser steps of both objectives
            together; without it, an epoch is one pass over the longer of the data sets in use.
        scheduler: any of `theory.schedulers`, unbatched (`scheduler.runs == ()`).
        objectives: the objective of each task that the scheduler may select.
        train_rows, eval_rows: tokenised rows per task (see `llm.data`); preference rows carry the
            reference's log-probabilities.
        value_rows: rows per task that a probe of MAXRIGHT reads, the same every time; without them
            it reads the batches of the next step (see `llm.train.values`).
        reference_samples: what the KL to the reference is estimated on (see `llm.loss.kl`).
        batch_sizes: rows (pairs) per device and micro-batch of each task.
        processing_class: the tokenizer; its pad token pads the batches.
        description: what the progress bar calls the run.
        settings: what model and data were set to, in words that a refusal to resume shows.
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
        value_rows: RowSets | None = None,
        reference_samples: ReferenceSamples | None = None,
        batch_sizes: Mapping[Task, int],
        processing_class: Any,
        callbacks: list[TrainerCallback] | None = None,
        description: str = "training",
        settings: Mapping[str, str] | None = None,
    ) -> None:
        if scheduler.runs != ():
            raise ValueError("the trainer takes one run; this scheduler holds a batch of runs")
        self.scheduler, self.objectives = scheduler, dict(objectives)
        self.train_rows, self.batch_sizes = dict(train_rows), dict(batch_sizes)
        self.value_rows, self.reference_samples = dict(value_rows or {}), reference_samples
        self.pad_token_id = int(processing_class.pad_token_id)
        self._settings = dict(settings or {})
        # The losses below are normalised by the whole step's items already: see `compute_loss`.
        super().__init__(
            model=model,
            args=args,
            eval_dataset=cast(Any, eval_rows) or None,
            processing_class=processing_class,
            callbacks=[StepEvents(self), *(callbacks or [])],
        )
        self.model_accepts_loss_kwargs = True
        self.embedding_noise = EmbeddingNoise(self.neftune_noise_alpha)
        self.neftune_noise_alpha = None  # Trainer's own noise knows the length of a batch only
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(ProgressBar(description))
        self.streams = open_streams(self.train_rows, self.batch_sizes, args)
        self.schedule = scheduler.init()
        self.steps_taken = dict.fromkeys(self.streams, 0)
        self.tokens_seen = dict.fromkeys(self.streams, 0)
        self._tokens_drawn = dict.fromkeys(self.streams, 0)  # on this rank, not yet in tokens_seen
        self.probed_at: list[int] = []
        self._observed: Callable[[], NDArray[np.float64]] | None = None
        self._forwarded: dict[Task, tuple[Batch, Terms]] = {}
        self._tokens_per_forward = tokens_per_forward(args)
        self.dropout = Dropout(self.model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `train`; packed batches need their attention in every recomputation."""
        packed = any(objective.packing for objective in self.objectives.values())
        with (
            packed_attention(self.model) if packed else nullcontext(),
            attention_without_plans(),
            self.embedding_noise.on(self.model),
        ):
            try:
                return super().train(*args, **kwargs)
            finally:
                self.dropout.switch(True)

    # ------------------------------------------------------------------- the step: decide and draw

    def get_train_dataloader(self) -> DataLoader:
        """A clock: one tick per micro-batch of an epoch. The samples come from the streams."""
        ticks: Any = range(
            steps_per_epoch(self.streams, self.args) * self.args.gradient_accumulation_steps
        )
        return DataLoader(ticks, collate_fn=list)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """Decide what this optimiser step trains on and draw its micro-batches."""
        for _ in range(num_batches):
            next(epoch_iterator, None)
        self._load_rng_state(self._resumed_from)
        self.clock.switch("data")
        self._restart_at_stage()
        self.step_losses = {}
        # Gradients that a schedule reads come from the step itself: it decides behind them.
        undecided = self.scheduler.reads_gram
        if not undecided:
            self.decide(Answers(lambda: self._probe(num_batches)))
        parts: list[list[list[Batch]]] = [[] for _ in range(num_batches)]
        counts = [0] * len(Task)
        for task in Task if undecided else self.stepped:
            drawn = self._draw(task, num_batches)
            counts[task] = sum(self.objectives[task].items(rows) for rows in drawn)
            for micro_batch, rows in zip(parts, drawn, strict=True):
                micro_batch.append(self._parts(task, rows))
        self._forwarded = {}  # what the probe computed for the objective that lost is dropped here
        items = self._sum_over_ranks(to_device(torch.tensor(counts, dtype=torch.float32), device))
        shared = {"weights": None if undecided else self.step_weights.tolist(), "items": items}
        return [shared | {"parts": _side_by_side(each)} for each in parts], items.sum()

    def _parts(self, task: Task, rows: list[Row]) -> list[Batch]:
        """The forward passes of a micro-batch: what each needs, under the objective's label."""
        if task in self._forwarded:
            batch, terms = self._forwarded[task]
            return [{task.label: batch, f"{task.label} terms": terms}]
        objective = self.objectives[task]
        limit = self._tokens_per_forward if objective.packing else None
        collated = (objective.collate(p, self.pad_token_id) for p in split_rows(rows, limit))
        return [{task.label: move(batch, self.args.device)} for batch in collated]

    def _draw(self, task: Task, num_batches: int) -> list[list[Row]]:
        drawn, stream = self._peek(task, num_batches), self.streams[task]
        self._tokens_drawn[task] += sum(stream.lengths[i] for batch in drawn for i in batch)
        self.steps_taken[task] += 1
        stream.advance(num_batches)
        return self._rows(task, drawn)

    def _peek(self, task: Task, num_batches: int) -> list[list[int]]:
        """The row numbers of the next step's micro-batches."""
        if task not in self.streams:
            raise ValueError(f"the schedule selected {task.label}, but it has no training data")
        return self.streams[task].peek(num_batches)

    def _rows(self, task: Task, batches: list[list[int]]) -> list[list[Row]]:
        rows = self.train_rows[task]
        return [[rows[i] for i in batch] for batch in batches]

    def _probe(self, num_batches: int) -> NDArray[np.float64]:
        """Both losses (2,), by one reduction over the ranks and one read of the device."""
        self.probed_at.append(self.schedule.step)
        with self.clock.phase("probes"):
            # On the batch that it would train on next, a probe does the forward pass of the step.
            reuse = num_batches == 1 and not self.value_rows
            parts = [
                self._forward_ahead(task)
                if reuse
                else summed_loss(
                    self.model,
                    self.objectives[task],
                    self._probed_batches(task, num_batches),
                    self.pad_token_id,
                )
                for task in Task
            ]
            sums, items = self._sum_over_ranks(torch.stack(parts)).double().cpu().unbind(1)
        return (sums / items).numpy()

    def _forward_ahead(self, task: Task) -> torch.Tensor:
        """(loss, items) of the next batch: (2,); its graph is kept in case the step takes it."""
        (rows,) = self._rows(task, self._peek(task, 1))
        objective, model = self.objectives[task], self.model_wrapped
        batch = move(objective.collate(rows, self.pad_token_id), self.args.device)
        model.train()
        with self.compute_loss_context_manager():
            terms = self._terms(task, model, batch)
        self._forwarded[task] = batch, terms
        items = torch.full_like(terms.total, objective.items(rows), requires_grad=False)
        return torch.stack([terms.total.detach(), items]).float()

    def _probed_batches(self, task: Task, num_batches: int) -> list[list[Row]]:
        if not self.value_rows:
            return self._rows(task, self._peek(task, num_batches))
        size, args = self.args.per_device_eval_batch_size, self.args
        return share_of_rank(self.value_rows[task], size, args.process_index, args.world_size)

    # ------------------------------------------------------------------------- the step: the loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The share of one part of a micro-batch in sum_i w_i f_i of the step."""
        self.clock.switch("forward")
        loss: torch.Tensor | None = None
        for task in Task:
            if task.label not in inputs:
                continue
            terms = inputs.pop(f"{task.label} terms", None)
            if terms is None:
                terms = self._terms(task, model, inputs[task.label])
            else:
                self._switch_dropout(task)  # as it was, for what the backward computes again
            share = terms.total / inputs["items"][task]
            self.step_losses[task] = self.step_losses.get(task, 0.0) + share.detach()
            self._meter(task, terms.sums)
            # Data-parallel wrappers average gradients over ranks; the shares are to be summed.
            weighted = share * (inputs["weights"][task] * self.args.world_size)
            loss = weighted if loss is None else loss + weighted
        last = self.accelerator.sync_gradients  # micro-batch of the step
        if last and self.scheduler.reads_losses and not self.value_rows:
            self._observed = copied_early(self.losses_of_step())
        self.clock.switch("backward")
        assert loss is not None  # no schedule leaves a step without an objective
        return loss

    def _terms(self, task: Task, model: torch.nn.Module, batch: Batch) -> Terms:
        """The objective on a batch in training, with the noise that belongs to it."""
        self._switch_dropout(task)
        self.embedding_noise.batch = batch
        return self.objectives[task](model, batch)

    def _switch_dropout(self, task: Task) -> None:
        """One state a step where the backward computes layers again: they find it as it is then."""
        off = task == Task.DPO or (self.args.gradient_checkpointing and len(self.stepped) > 1)
        self.dropout.switch(not (off and getattr(self.args, "disable_dropout", True)))

    def _close_step(self) -> None:
        """After the optimiser step: hand the losses to the scheduler, and meter them."""
        self.clock.switch("other")
        observed, self._observed = self._observed, None
        losses = None if observed is None else observed()
        self.schedule = self.scheduler.observe(self.schedule, losses)
        for task, value in self.step_losses.items():
            # A rank knows its share of the loss; the mean over ranks is to be the whole.
            self._meter(task, {"loss": (value * self.args.world_size, 1)})

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        batches = (part.get(task.label, {}) for part in inputs["parts"] for task in Task)
        tokens = sum(batch["input_ids"].numel() for batch in batches if "input_ids" in batch)
        return self._flops_per_token * tokens

    @cached_property
    def _flops_per_token(self) -> int:
        """transformers' estimate, which walks over all parameters: taken once."""
        return int(super().floating_point_ops({"input_ids": torch.zeros(1, 1)}))

    # ----------------------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        for name, total in self.meters.totals().items():
            self._check_finite(name, total)
        self._count_tokens()
        cast(dict[str, Any], self.state.stateful_callbacks)[STATE_KEY] = self.state_to_json()
        super()._save_checkpoint(model, trial)

    def state_to_json(self) -> dict[str, Any]:
        """Schedule, streams and counters, as plain data."""
        return {
            "schedule": self.schedule.to_json(),
            "consumed": {task.label: stream.consumed for task, stream in self.streams.items()},
            "steps_taken": {task.label: n for task, n in self.steps_taken.items()},
            "tokens_seen": {task.label: n for task, n in self.tokens_seen.items()},
            "probed_at": self.probed_at,
            "step_norms": self.step_norms.to_json(),
            "decisions": self.decisions,
            "identity": self._identity,
        }

    @cached_property
    def _identity(self) -> Identity:
        return run_identity(
            self.args,
            self.model,
            schedule=repr(self.scheduler),
            num_steps=self.num_steps,
            objectives=self.objectives,
            streams=self.streams,
            train_rows=self.train_rows,
            value_rows=self.value_rows,
            settings=self._settings,
        )

    @property
    def probes(self) -> int:
        """How often both losses were evaluated for the schedule."""
        return len(self.probed_at)

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * steps_per_epoch(self.streams, self.args))

    def _check_resume(self, checkpoint: Path | None) -> None:
        mine = self._identity  # taken now: sharding will hide the weights
        if checkpoint is not None:
            force = getattr(self.args, "force_resume", False)
            check_resume(checkpoint, mine, num_steps=self.num_steps, force=force)

    def _restore(self, saved: dict[str, Any]) -> None:
        self.schedule = ScheduleState.from_json(saved["schedule"])
        for task, stream in self.streams.items():
            # A forced resume may find no trace of this objective.
            stream.consumed = saved["consumed"].get(task.label, 0)
            self.steps_taken[task] = saved["steps_taken"].get(task.label, 0)
            self.tokens_seen[task] = saved["tokens_seen"].get(task.label, 0)
        self.probed_at, self.decisions = saved["probed_at"], saved["decisions"]
        self.step_norms.restore(saved["step_norms"])
        if self.scheduler.reads_losses and self.schedule.values is None:
            values = self._probe(self.args.gradient_accumulation_steps)
            self._forwarded = {}  # the step probes anew if its schedule says so
            self.schedule = self.schedule._replace(values=values)


class StepEvents(TrainerCallback):
    """Ties the schedule to Trainer's events; `on_step_end` runs before a checkpoint is saved."""

    def __init__(self, trainer: JointTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.clock.start()
        saved = cast(dict[str, Any], state.stateful_callbacks).get(STATE_KEY)
        if saved is not None:
            self.trainer._restore(saved)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._close_step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._count_tokens()
        self.trainer.clock.stop()


def _side_by_side(parts: list[list[Batch]]) -> list[Batch]:
    """One list for all objectives: their i-th parts go into one forward and backward pass."""
    return [
        {key: value for part in together for key, value in part.items()}
        for together in zip_longest(*parts, fillvalue={})
    ]
