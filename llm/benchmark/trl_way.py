"""TRL's trainers as they come, on rows that are tokenised already.

The defaults of DPOConfig and SFTConfig stay, but for what would make the comparison another one:
the arguments that every contender gets; activation checkpointing, which TRL switches on by default
and which would slow it (off wherever it is off for the others); and the maximum length, since the
rows are cut already. On CUDA flash-attention 2 serves the packed rows where it is installed.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from llm.benchmark.paper_way import second_copy
from llm.benchmark.plan import Job
from llm.benchmark.shapes import build_model
from llm.benchmark.shared import Built, RowSets, common_arguments, shape_of, tokenizer_for
from llm.loss.losses import IGNORE_INDEX
from llm.loss.objectives import Row
from theory.tasks import Task


class TokenisedDPOTrainer(DPOTrainer):
    """Takes rows of ids: TRL's own preparation starts from text."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


def trl_arguments(job: Job, steps: int | None = None) -> dict[str, Any]:
    checkpointing = shape_of(job).checkpointing
    return common_arguments(job, steps) | {"gradient_checkpointing": checkpointing}


def build(job: Job, rows: RowSets, pacing: TrainerCallback) -> Built:
    return (_build_dpo if job.algo == "dpo" else _build_sft)(job, rows, pacing)


def _build_dpo(job: Job, rows: RowSets, pacing: TrainerCallback) -> Built:
    shape, precomputed = shape_of(job), job.side == "trl_precomputed"
    model = build_model(shape, torch.device(job.device))
    live = not precomputed and not shape.lora_rank  # with adapters TRL switches them off instead
    arguments = trl_arguments(job)
    arguments |= {"per_device_train_batch_size": job.dpo_batch, "max_length": None}
    trainer = TokenisedDPOTrainer(
        model=model,
        ref_model=second_copy(model) if live else None,
        args=DPOConfig(**arguments, precompute_ref_log_probs=precomputed),
        train_dataset=Dataset.from_list(rows[Task.DPO]),
        processing_class=tokenizer_for(shape),
        peft_config=shape.lora(),
        callbacks=[pacing],
    )
    return Built(trainer, job.steps, {})


def _build_sft(job: Job, rows: RowSets, pacing: TrainerCallback) -> Built:
    """Packed: one sequence a step, of about as many tokens as a padded batch has."""
    shape, packed = shape_of(job), job.side == "trl_packed"
    data = Dataset.from_list([_labelled(row) for row in rows[Task.SFT]])
    lengths = [len(ids) for ids in data["input_ids"]]
    length = max(*lengths, math.ceil(sum(lengths) / len(lengths) * job.sft_batch))
    options: dict[str, Any] = {"max_length": None}
    if packed:
        options = {"packing": True, "max_length": length}
    options["per_device_train_batch_size"] = 1 if packed else job.sft_batch

    def trainer(steps: int) -> SFTTrainer:
        fast = packed and job.device == "cuda" and find_spec("flash_attn") is not None
        attention = "flash_attention_2" if fast else "sdpa"
        return SFTTrainer(
            model=build_model(shape, torch.device(job.device), attention),
            args=SFTConfig(**trl_arguments(job, steps), **options),
            train_dataset=data,
            processing_class=tokenizer_for(shape),
            peft_config=shape.lora(),
            callbacks=[pacing],
        )

    made = trainer(job.steps)
    if packed:  # only now it is known how many sequences the rows fill
        steps = len(cast(Dataset, made.train_dataset))
        made.args.max_steps = steps * (job.rounds + 1)
        return Built(made, steps, {"packed_length": length, "sequences": steps})
    return Built(made, job.steps, {})


def _labelled(row: Row) -> Row:
    prompt, completion = row["prompt_ids"], row["completion_ids"]
    return {
        "input_ids": [*prompt, *completion],
        "labels": [IGNORE_INDEX] * len(prompt) + list(completion),
    }
