"""Learning-rate schedules that start anew at the stages of a sequential schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments
from transformers.optimization import get_scheduler

from theory.cli import UserError


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
