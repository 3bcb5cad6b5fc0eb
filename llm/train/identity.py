"""What a checkpoint and the run that continues it must have in common.

A resumed run must be the run that was never interrupted. So a checkpoint holds, in words that can
be shown, everything that its weights depend on; the run that continues it is compared entry by
entry. Free to change: what is logged, saved or evaluated, where it is written, and how the rows of
a step are shared among devices and micro-batches (their number per step is what counts). With a
constant learning rate the number of steps is free too; one that decays depends on it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from llm.data.encode import fingerprint_rows
from llm.loss.objectives import LanguageObjective, Row
from llm.train.streams import SampleStream
from theory.cli import UserError
from theory.records import read_json
from theory.tasks import Task

STATE_KEY = "JointTrainer"
"""Where the trainer's own state stands in a checkpoint's trainer_state.json."""

Identity = dict[str, str]
OPTIMISER_SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"),
    *("max_grad_norm", "clipping", "bf16", "fp16", "seed"),
)
"""Settings of TrainingArguments (and ours) that shape every step."""
ENDLESS = ("constant", "constant_with_warmup")
"""Schedules of the learning rate that do not depend on the number of steps."""
ADAPTER_SETTINGS = ("r", "lora_alpha", "lora_dropout", "target_modules")
SAMPLE = 8
"""Entries of each frozen tensor that tell one base model from another."""


def run_identity(
    args: TrainingArguments,
    model: Any,
    *,
    schedule: str,
    num_steps: int,
    objectives: Mapping[Task, LanguageObjective],
    streams: Mapping[Task, SampleStream],
    train_rows: Mapping[Task, Sequence[Row]],
    value_rows: Mapping[Task, Sequence[Row]],
) -> Identity:
    """Everything that the weights of a run depend on, by the name that a refusal shows.

    The arguments as in `JointTrainer`; `schedule` tells its scheduler in words.
    """
    identity = {
        "schedule": schedule,
        "model": describe_model(model),
        **settings(args, OPTIMISER_SETTINGS),
    }
    if not _endless(args):
        identity["number of steps"] = str(num_steps)
    per_step = args.gradient_accumulation_steps * args.world_size
    for task, stream in streams.items():
        rows = train_rows[task]
        identity[f"{task.label} loss"] = repr(objectives[task])
        identity[f"{task.label} data"] = fingerprint_rows(rows)
        identity[f"{task.label} order"] = f"seed {stream.seed}"
        identity[f"{task.label} batch"] = (
            f"{stream.batch_size * per_step} rows a step"
            if stream.max_tokens is None
            else f"{per_step} times {stream.max_tokens} tokens a step"
        )
        if rows and "ref_chosen_logps" in rows[0]:
            identity[f"{task.label} reference"] = reference_of(rows)
    for task, rows in value_rows.items():
        identity[f"{task.label} value rows"] = fingerprint_rows(rows)
    return identity


def check_resume(
    checkpoint: Path, mine: Mapping[str, str], *, force: bool, say: Callable[[str], None] = print
) -> None:
    """Refuse the checkpoint of another run, or with `force` say what differs, a line for each.

    Raises UserError, in one line that names every difference.
    """
    state = read_json(checkpoint / TRAINER_STATE_NAME)["stateful_callbacks"].get(STATE_KEY)
    if state is None:
        raise UserError(f"{checkpoint} was not written by this trainer: it has no schedule")
    saved = state["identity"]
    names = sorted(name for name in saved.keys() | mine.keys() if saved.get(name) != mine.get(name))
    differences = [f"{name} is {saved.get(name)}, here {mine.get(name)}" for name in names]
    if differences and not force:
        raise UserError(
            f"the checkpoint belongs to another run: its {'; its '.join(differences)} "
            "(--force_resume true continues it nevertheless)"
        )
    for difference in differences:
        say(f"--force_resume: the checkpoint's {difference}")


def settings(args: TrainingArguments, names: Iterable[str]) -> Identity:
    """The settings among `names` that `args` has, as text; enumerations by their value."""
    values = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return {name: str(getattr(value, "value", value)) for name, value in values.items()}


def _endless(args: TrainingArguments) -> bool:
    """True if the curve of the learning rate does not depend on the number of steps."""
    kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    return kind in ENDLESS and not 0 < args.warmup_steps < 1


def describe_model(model: Any) -> str:
    """Kind, size, adapter and a digest of a sample of the frozen weights."""
    parameters = list(model.parameters())
    counts = [sum(map(_numel, group)) for group in (parameters, _trainable(parameters))]
    parts = [f"{model.config.model_type} of {counts[0]} parameters, {counts[1]} trained"]
    for name, config in getattr(model, "peft_config", {}).items():
        values = config.to_dict()
        chosen = {key: values.get(key) for key in ADAPTER_SETTINGS}
        if isinstance(chosen["target_modules"], set):
            chosen["target_modules"] = sorted(chosen["target_modules"])
        parts.append(f"adapter {name} {chosen}")
    frozen = [each for each in parameters if not each.requires_grad]
    if frozen and not any(hasattr(each, "full_tensor") for each in frozen):  # sharded: no sample
        parts.append(f"frozen weights {_sampled(frozen)}")
    return ", ".join(parts)


def _sampled(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        chosen = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE]
        digest.update(chosen.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def reference_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Four digits tell references apart and forgive the rounding of another machine."""
    total = math.fsum(row["ref_chosen_logps"] + row["ref_rejected_logps"] for row in rows)
    return f"mean log-probability {total / (2 * len(rows)):.4g}"


def _trainable(parameters: Iterable[Any]) -> list[Any]:
    return [each for each in parameters if each.requires_grad]


def _numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # DeepSpeed empties its shards
