"""The optimiser step under a schedule: timed, metered and clipped, with stages that start anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainingArguments
from transformers.optimization import get_scheduler

from llm.train.checkpoints import SafeCheckpoints
from llm.train.clipping import StepNorms
from llm.train.gram import TwoGradients
from llm.train.meters import Clock, Meters
from llm.train.values import copied_early
from theory.cli import UserError
from theory.scheduling import Answers, Probe, Scheduler, ScheduleState
from theory.tasks import Task


class ScheduledSteps(SafeCheckpoints):
    """A Trainer whose steps follow a schedule; a subclass decides, draws and computes the loss.

    Before each step it calls `decide` and clears `step_losses`, where `compute_loss` adds up the
    losses of the step on this rank. A schedule that reads gradients decides in the step itself:
    its micro-batches come without weights.
    """

    scheduler: Scheduler
    schedule: ScheduleState
    model: torch.nn.Module
    optimizer: Any

    def __init__(self, *, args: TrainingArguments, **options: Any) -> None:
        super().__init__(args=args, **options)
        self.clipping = str(getattr(args, "clipping", "global"))
        self.clock, self.meters = Clock(args.device), Meters(args.device)
        self.step_norms = StepNorms(args.device)
        self.step_weights: NDArray[np.float64] = np.zeros(len(Task))
        self.step_losses: dict[Task, torch.Tensor] = {}
        self.decisions: list[list[float]] = []
        self._check_what_the_schedule_needs(args)

    def _check_what_the_schedule_needs(self, args: TrainingArguments) -> None:
        # Where all steps of a stage have the same weights, clipping has nothing to distort.
        clips = self.clipping == "global" and args.max_grad_norm > 0.0
        if clips and self.is_deepspeed_enabled and not self.scheduler.steady:
            raise UserError("DeepSpeed clips each step by itself: pass --clipping per_step")
        if "schedule_free" in str(args.optim).lower() and self.scheduler.has_stages:
            raise UserError("--optim schedule_free_* has no stages that start anew: train two runs")
        if self.scheduler.reads_gram and (self.is_deepspeed_enabled or args.fp16):
            deepspeed = "DeepSpeed keeps the gradients to itself"
            what = deepspeed if self.is_deepspeed_enabled else "--fp16 scales the gradients"
            raise UserError(f"{what}: a schedule that compares the two gradients cannot see them")

    @property
    def stepped(self) -> list[Task]:
        """The objectives of the step."""
        return [task for task in Task if self.step_weights[task] != 0.0]

    # --------------------------------------------------------------------- forward and backward

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """transformers' own for each of the `parts` of a micro-batch; gradients and losses add up.

        `compute_loss` marks where a forward begins and ends.
        """
        self.clock.switch("data")
        if inputs["weights"] is None:
            return self._step_on_both(model, inputs, num_items_in_batch)
        shared = {key: value for key, value in inputs.items() if key != "parts"}
        losses = []
        for part in inputs["parts"]:
            losses.append(super().training_step(model, shared | part, num_items_in_batch))
        self.clock.switch("other")
        return sum(losses[1:], losses[0])

    def _step_on_both(self, model: torch.nn.Module, inputs: dict[str, Any], items: Any) -> Any:
        """Each objective's gradient by itself; behind the last micro-batch the schedule decides."""
        for task in Task:
            own = [{task.label: p[task.label]} for p in inputs["parts"] if task.label in p]
            alone = {"weights": np.eye(len(Task))[task].tolist(), "parts": own}
            with self.gradients.of(task):
                self.training_step(model, inputs | alone, items)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        self.decide(Answers(lambda: copied_early(self.losses_of_step())(), self.gradients.gram))
        self.gradients.combine(self.step_weights.tolist())
        shares = [
            w * self.step_losses[task] for task, w in zip(Task, self.step_weights, strict=True)
        ]
        return torch.stack(shares).sum() * self.args.world_size

    def decide(self, probe: Probe) -> None:
        """Ask the schedule what this step trains on."""
        self.step_weights, self.schedule = self.scheduler.select(self.schedule, probe)
        self.decisions.append(self.step_weights.tolist())

    def losses_of_step(self) -> torch.Tensor:
        """Of all micro-batches and ranks, (2,); NaN for an objective that is not stepped on."""
        unknown = torch.full((), torch.nan, device=self.args.device)
        so_far = torch.stack([self.step_losses.get(task, unknown) for task in Task])
        return self._sum_over_ranks(so_far)

    def _sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, "sum") if self.args.world_size > 1 else values

    @cached_property
    def gradients(self) -> TwoGradients:
        """Where the gradients of a step wait for the schedule."""
        return TwoGradients(self.model.parameters())

    # ------------------------------------------------------------------- gradient norm, clipping

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        """Clip as `llm.train.clipping` says; returns the norm before."""
        self.clock.switch("optimizer")
        deepspeed = self.is_deepspeed_enabled  # it has clipped and stepped by now
        if self.clipping == "per_step" or deepspeed or len(self.stepped) != 1:
            return super()._clip_grad_norm(model)
        norm = self._norm_of_gradient(model)
        reference = self.step_norms.reference(self.stepped[0], norm)
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), self.args.max_grad_norm, reference)
        return norm

    def _norm_of_gradient(self, model: torch.nn.Module) -> torch.Tensor:
        if self.is_fsdp_enabled or self._has_mixed_mesh_grads(model):
            return _plain(super()._get_grad_norm(model))
        # The same without multiplying every gradient by one.
        self.accelerator.unscale_gradients()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """The norm before clipping; that of grad f_i is metered where the step is w_i grad f_i."""
        self.clock.switch("optimizer")
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and len(self.stepped) == 1:
            task = self.stepped[0]
            value = torch.as_tensor(_plain(norm), device=self.args.device)
            self.meters.add_if_finite(f"{task.label}_grad_norm", value / self.step_weights[task])
        return norm

    # --------------------------------------------------------------------- stages of a sequence

    def _restart_at_stage(self) -> None:
        """At the boundary of a sequential schedule, start the optimiser afresh."""
        step = self.schedule.step
        if step > 0 and self.scheduler.stage_start(step) == step:
            getattr(self.optimizer, "optimizer", self.optimizer).state.clear()
            self.step_norms.forget()

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


def staged_schedule(
    args: TrainingArguments, optimizer: Any, starts: Sequence[int], num_steps: int
) -> LambdaLR:
    """The schedule of `args` once per stage: warm-up and decay as in separate runs.

    `starts` are the first steps of the stages, in order, beginning with 0; the last stage ends
    at `num_steps`.
    """
    ends = [*starts[1:], num_steps]
    factors = [_factor(args, end - start) for start, end in zip(starts, ends, strict=True)]

    def factor(step: int) -> float:
        stage = max(i for i, start in enumerate(starts) if step >= start)
        return factors[stage](step - starts[stage])

    return LambdaLR(optimizer, factor)


def _factor(args: TrainingArguments, num_steps: int) -> Callable[[int], float]:
    """The multiplier of the learning rate along one stage, as transformers defines it."""
    placeholder = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    options: Any = args.lr_scheduler_kwargs
    schedule = get_scheduler(
        args.lr_scheduler_type,
        optimizer=placeholder,
        num_warmup_steps=args.get_warmup_steps(num_steps),
        num_training_steps=num_steps,
        scheduler_specific_kwargs=options,
    )
    if not isinstance(schedule, LambdaLR):
        raise UserError(
            f"--lr_scheduler_type {args.lr_scheduler_type} cannot restart at a stage boundary"
        )
    return schedule.lr_lambdas[0]


def _plain(norm: Any) -> Any:
    """A norm of sharded gradients as one plain tensor."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
