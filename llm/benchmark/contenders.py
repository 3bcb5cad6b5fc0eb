"""The trainers of the benchmark. Each is built inside its own process, from a `Job` and rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from llm.benchmark.device import now
from llm.benchmark.paper_way import PaperTrainer, second_copy
from llm.benchmark.plan import Job
from llm.benchmark.shapes import EOS, SHAPES, build_model, with_adapters
from llm.benchmark.shared import (
    Built,
    RowSets,
    common_arguments,
    compact,
    shape_of,
    tasks_of,
    tokenizer_for,
)
from llm.loss.collate import collate_sft
from llm.loss.evaluate import with_reference_logps
from llm.loss.objectives import DPOObjective, LanguageObjective, SFTObjective
from llm.train.trainer import JointTrainer
from theory.schedulers import Alright, Maxright, Mix, Sequential, Single
from theory.scheduling import Probe, Scheduler, ScheduleState
from theory.tasks import Task

LAM = 0.5
BLOCK = 10
ALL_IN_ONE = Task.SFT
"""The objective of the overhead suite: batches like a plain Trainer's, on both streams."""


class _Forced(Scheduler):
    """Decides (and probes) as its base class does, then takes the objectives in turn.

    So every contender has the same mix of steps: half of each in any round. The turn changes in
    every other block of ten, so that each objective wins half of MAXRIGHT(10)'s probes.
    """

    def select(self, state: ScheduleState, probe: Probe) -> tuple[Any, ScheduleState]:
        _, state = super().select(state, probe)
        dpo = (state.step + state.step // BLOCK) % 2 == 0
        return np.array([float(dpo), float(not dpo)]), state


class ForcedAlright(_Forced, Alright):
    pass


class ForcedMaxright(_Forced, Maxright):
    pass


def builder(side: str) -> Callable[[Job, RowSets, TrainerCallback], Built]:
    """What builds the contenders of a side. Asking for it imports what it needs."""
    if side.startswith("trl"):
        from llm.benchmark import trl_way

        return trl_way.build
    return {"paper": build_paper, "trainer": build_plain}.get(side, build_ours)


def scheduler_of(job: Job) -> Scheduler:
    name, _, period = job.algo.partition("-")
    if name in ("sft", "dpo"):
        return Single(Task[name.upper()])
    if name == "sequential":
        return Sequential(job.total_steps // 2, "dpo_then_sft")
    if name == "mix":
        return Mix(LAM)
    if name == "maxright":
        return ForcedMaxright(LAM, (0.0, 0.0), refresh_every=int(period))
    return ForcedAlright(LAM)


# ------------------------------------------------------------------------------------------- ours


def build_ours(job: Job, rows: RowSets, pacing: TrainerCallback) -> Built:
    """`JointTrainer`, with the reference's log-probabilities computed once, before training."""
    if job.algo == "fixed":
        return build_fixed(job, rows, pacing)
    shape, packing, tasks = shape_of(job), job.side == "ours", tasks_of(job)
    model = build_model(shape, torch.device(job.device))
    train_rows, notes = {task: compact(rows[task]) for task in tasks}, {}
    if Task.DPO in tasks:
        pairs = train_rows[Task.DPO]
        options: dict[str, Any] = {
            "batch_size": job.dpo_batch,
            "pad_token_id": EOS,
            "packing": packing,
        }
        # What a device does once is not the speed of the cache.
        with_reference_logps(model, pairs[: job.dpo_batch], **options)
        begin = now(model.device)
        train_rows[Task.DPO] = with_reference_logps(model, pairs, **options)
        notes["cache_seconds"] = now(model.device) - begin
    objectives: dict[Task, LanguageObjective] = {
        Task.DPO: DPOObjective(packing=packing),
        Task.SFT: SFTObjective(packing=packing),
    }
    trainer = _joint_trainer(job, with_adapters(model, shape), objectives, train_rows, pacing)
    return Built(trainer, job.steps, notes)


def _joint_trainer(
    job: Job,
    model: Any,
    objectives: Mapping[Task, LanguageObjective],
    rows: RowSets,
    pacing: TrainerCallback,
) -> JointTrainer:
    return JointTrainer(
        model=model,
        args=TrainingArguments(**common_arguments(job), logging_nan_inf_filter=False),
        scheduler=scheduler_of(job),
        objectives={task: objectives[task] for task in rows},
        train_rows=rows,
        batch_sizes={task: job.batch_sizes[task] for task in rows},
        processing_class=tokenizer_for(shape_of(job)),
        callbacks=[pacing],
    )


# -------------------------------------------------------------------------------- the paper's way


def build_paper(job: Job, rows: RowSets, pacing: TrainerCallback) -> Built:
    shape = shape_of(job)
    model = build_model(shape, torch.device(job.device))
    trainer = PaperTrainer(
        model=with_adapters(second_copy(model), shape),
        reference=model,
        args=TrainingArguments(**common_arguments(job)),
        scheduler=scheduler_of(job),
        train_rows={task: rows[task] for task in tasks_of(job)},
        batch_sizes=job.batch_sizes,
        pad_token_id=EOS,
        callbacks=[pacing],
    )
    return Built(trainer, job.steps, {})


# --------------------------------------------------------------------- the fixed cost of a step


def build_fixed(job: Job, rows: RowSets, pacing: TrainerCallback) -> Built:
    """ALRIGHT on a model of a few thousand parameters; both streams hold the same kind of row."""
    model = build_model(SHAPES["tiny"], torch.device(job.device))
    objectives: dict[Task, LanguageObjective] = {
        task: SFTObjective(packing=False, task=task) for task in Task
    }
    same = {task: compact(rows[ALL_IN_ONE]) for task in Task}
    return Built(_joint_trainer(job, model, objectives, same, pacing), job.steps, {})


def build_plain(job: Job, rows: RowSets, pacing: TrainerCallback) -> Built:
    """transformers' own Trainer and loss on the same batches."""
    arguments = common_arguments(job) | {"remove_unused_columns": False}
    trainer = Trainer(
        model=build_model(SHAPES["tiny"], torch.device(job.device)),
        args=TrainingArguments(**arguments, per_device_train_batch_size=job.sft_batch),
        train_dataset=compact(rows[ALL_IN_ONE]),
        data_collator=lambda chosen: collate_sft(chosen, EOS),
        callbacks=[pacing],
    )
    return Built(trainer, job.steps, {})
