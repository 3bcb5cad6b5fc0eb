"""What the contenders of the benchmark share: arguments, tokenizer, rows, and what is built."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer

from llm.benchmark.plan import Job
from llm.benchmark.shapes import EOS, Batches, Shape
from llm.loss.objectives import Row
from theory.tasks import Task

RowSets = dict[Task, list[Row]]


@dataclass(frozen=True)
class Built:
    """A trainer ready to train, the steps of its rounds, and what was measured on the way."""

    trainer: Trainer
    steps: int
    notes: dict[str, Any]


def shape_of(job: Job) -> Shape:
    """The shape as the job tells it: through JSON, which knows neither tuples nor classes."""
    fields = job.shape | {"lora_targets": tuple(job.shape["lora_targets"])}
    return Shape(**fields | {key: Batches(**job.shape[key]) for key in ("alone", "joint")})


def common_arguments(job: Job, steps: int | None = None) -> dict[str, Any]:
    """transformers' arguments, the same for every contender; nothing is logged or saved."""
    total = (steps or job.steps) * (job.rounds + 1)
    checkpointing = {"gradient_checkpointing": True} if shape_of(job).checkpointing else {}
    return {
        "output_dir": job.folder,
        "max_steps": total,
        "logging_steps": total + 1,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": job.device == "cpu",
        "bf16": job.device == "cuda",
        "dataloader_pin_memory": job.device == "cuda",
        "seed": 0,
        **checkpointing,
    }


def tasks_of(job: Job) -> list[Task]:
    return [Task[job.algo.upper()]] if job.algo in ("sft", "dpo") else list(Task)


def tokenizer_for(shape: Shape) -> PreTrainedTokenizerFast:
    """Trainers want a tokenizer; all they read here is the id that pads."""
    raw = Tokenizer(models.WordLevel({"<eos>": EOS, "<unk>": shape.vocab_size - 1}, "<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")


def compact(rows: list[Row]) -> list[Row]:
    """As `llm.data.encode` holds them: ids in arrays."""
    return [{key: array("i", ids) for key, ids in row.items()} for row in rows]
