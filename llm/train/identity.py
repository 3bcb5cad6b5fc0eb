"""What a checkpoint and the run that continues it must have in common.

A resumed run must be the run that was never interrupted. So a checkpoint holds, in words that can
be shown, everything that its weights depend on; the run that continues it is compared entry by
entry. Every setting counts but those that `llm.train.free` names, with the reason. With a constant
learning rate the number of steps is free too; one that decays depends on it.
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
from llm.train.free import RESUME, counting, differing, flat, plain
from llm.train.streams import SampleStream
from theory.cli import UserError
from theory.records import read_json
from theory.tasks import Task

STATE_KEY = "JointTrainer"
"""Where the trainer's own state stands in a checkpoint's trainer_state.json."""

Identity = dict[str, str]
NOT_SET = "not set"
ENDLESS = ("constant", "constant_with_warmup")
"""Schedules of the learning rate that do not depend on the number of steps."""
PLACES = (
    *("_name_or_path", "base_model_name_or_path", "revision", "inference_mode"),
    *("transformers_version", "peft_version"),
)
"""Of the configurations of models and adapters: where they lie and who wrote them."""
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
    settings: Mapping[str, str],
) -> Identity:
    """Everything that the weights of a run depend on, by the name that a refusal shows.

    The arguments as in `JointTrainer`; `schedule` tells its scheduler in words.
    """
    identity = {
        "schedule": schedule,
        **describe_model(model),
        **settings,
        **counting(args, free=RESUME),
    }
    if not _endless(args):
        identity["number of steps"] = str(num_steps)
    for task, stream in streams.items():
        rows = train_rows[task]
        identity[f"{task.label} loss"] = repr(objectives[task])
        identity[f"{task.label} data"] = fingerprint_rows(rows)
        identity[f"{task.label} order"] = f"seed {stream.seed}"
        identity[f"{task.label} batch"] = rows_of_step(args, stream.batch_size)
        if rows and "ref_chosen_logps" in rows[0]:
            identity[f"{task.label} reference"] = reference_of(rows)
    for task, rows in value_rows.items():
        identity[f"{task.label} value rows"] = fingerprint_rows(rows)
    return identity


def rows_of_step(args: TrainingArguments, batch_size: int) -> str:
    """What a step of one objective draws, over all its micro-batches and ranks."""
    per_step = args.gradient_accumulation_steps * args.world_size
    max_tokens = getattr(args, "max_tokens_per_batch", None)
    if max_tokens is None:
        return f"{batch_size * per_step} rows a step"
    return f"{per_step} times {max_tokens} tokens a step"


def check_resume(
    checkpoint: Path,
    mine: Mapping[str, str],
    *,
    num_steps: int,
    force: bool,
    say: Callable[[str], None] = print,
) -> None:
    """Refuse the checkpoint of another run, or with `force` say what differs, a line for each.

    Raises UserError, in one line that names every difference; also, forced or not, for a
    checkpoint that lies beyond the `num_steps` of the run.
    """
    state = read_json(checkpoint / TRAINER_STATE_NAME)
    own = state["stateful_callbacks"].get(STATE_KEY)
    if own is None:
        raise UserError(f"{checkpoint} was not written by this trainer: it has no schedule")
    saved = own["identity"]
    differences = [
        f"{name} is {saved.get(name, NOT_SET)}, here {mine.get(name, NOT_SET)}"
        for name in differing(saved, mine)
    ]
    if differences and not force:
        raise UserError(
            f"the checkpoint belongs to another run: its {'; its '.join(differences)} "
            "(--force_resume true continues it nevertheless)"
        )
    if state["global_step"] > num_steps:
        raise UserError(
            f"{checkpoint} is of step {state['global_step']}, beyond the {num_steps} steps of this "
            "run: name an older one, or raise --max_steps"
        )
    for difference in differences:
        say(f"--force_resume: the checkpoint's {difference}")


def _endless(args: TrainingArguments) -> bool:
    """True if the curve of the learning rate does not depend on the number of steps."""
    kind = plain(args.lr_scheduler_type)
    return kind in ENDLESS and not 0 < args.warmup_steps < 1


def describe_model(model: Any) -> Identity:
    """Kind and size, configuration, adapters, and a digest of a sample of the frozen weights.

    The trained weights are the checkpoint's.
    """
    parameters = list(model.parameters())
    counts = [sum(map(_numel, group)) for group in (parameters, _trainable(parameters))]
    size = f"{model.config.model_type} of {counts[0]} parameters, {counts[1]} trained"
    described = {"model": size, **flat(configurations(model), "model ")}
    frozen = [each for each in parameters if not each.requires_grad]
    if frozen and not any(hasattr(each, "full_tensor") for each in frozen):  # sharded: no sample
        described["frozen weights"] = _sampled(frozen)
    return described


def configurations(model: Any, *, base_only: bool = False) -> dict[str, Any]:
    """What turns the same weights into another function: the configurations, whole.

    `base_only` leaves out those of adapters.
    """
    adapters = {} if base_only else getattr(model, "peft_config", {})
    whole = {"config": model.config, **{f"adapter {name}": own for name, own in adapters.items()}}
    found = {
        name: {key: value for key, value in own.to_dict().items() if key not in PLACES}
        for name, own in whole.items()
    }
    found["config"]["attention"] = model.config._attn_implementation
    return found


def _sampled(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        chosen = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE]
        digest.update(chosen.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def reference_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Four digits tell references apart and forgive the rounding of another machine."""
    keys = ("ref_chosen_logps", "ref_rejected_logps")
    means = [math.fsum(row[key] for row in rows) / len(rows) for key in keys]
    return "mean log-probabilities {:.4g} and {:.4g}".format(*means)


def _trainable(parameters: Iterable[Any]) -> list[Any]:
    return [each for each in parameters if each.requires_grad]


def _numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # DeepSpeed empties its shards
