"""Which of transformers' settings this trainer obeys: all that stand here, and no other.

A field of `TrainingArguments` that is not in `OBEYED`, today's or a newer transformers', keeps the
value that transformers gives it; another value is refused by name rather than ignored. What nobody
reads here for a known reason has it in `llm.train.free.FREE`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import MISSING, Field, fields
from typing import Any

from transformers import TrainingArguments

from llm.train.free import FREE, plain
from theory.cli import UserError


def _group(reason: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, reason)


OBEYED: dict[str, str] = {
    **_group("read here: outputs, streams, number of steps", "output_dir", "use_cpu", "seed"),
    **_group("the streams draw by them", "per_device_train_batch_size", "data_seed"),
    **_group("they bound the steps of the clock", "max_steps", "num_train_epochs"),
    **_group("micro-batches of a step", "gradient_accumulation_steps"),
    **_group(
        "Trainer makes the optimiser; other libraries' optimisers are not tried by the tests",
        *("optim", "optim_args", "optim_target_modules", "learning_rate", "weight_decay"),
        *("adam_beta1", "adam_beta2", "adam_epsilon"),
    ),
    **_group(
        "Trainer makes the learning-rate schedule, once per stage",
        *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    ),
    **_group("`llm.train.clipping`", "max_grad_norm"),
    **_group("`llm.train.noise`", "neftune_noise_alpha"),
    **_group("autocast of every forward; float16 needs a GPU to be tried", "bf16", "fp16"),
    **_group("transformers switches it; needs an Ampere GPU to be tried", "tf32"),
    **_group(
        "Trainer tells the model before the first step",
        *("activation_checkpointing", "activation_checkpointing_kwargs"),
        *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
    ),
    **_group(
        "accelerate compiles the model of the step",
        *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    ),
    **_group("Trainer's part of a step; needs a GPU to be tried", "torch_empty_cache_steps"),
    **_group("Trainer seeds and asks torch for it", "full_determinism"),
    **_group(
        "Trainer's log and bar",
        *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter"),
        *("log_level", "disable_tqdm", "skip_memory_metrics"),
    ),
    **_group(
        "Trainer's, between nodes and processes: several are needed to try them",
        *("log_level_replica", "log_on_each_node", "save_on_each_node"),
    ),
    **_group(
        "Trainer hands them to the trackers, which need accounts to be tried",
        *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id"),
        "trackio_static_space_id",
    ),
    **_group(
        "Trainer says when, `evaluate` obeys",
        *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start"),
        "per_device_eval_batch_size",
    ),
    **_group(
        "Trainer says when, `llm.train.checkpoints` writes",
        *("save_strategy", "save_steps", "save_total_limit", "save_only_model"),
        *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    ),
    **_group("`llm.run` looks for the checkpoint", "resume_from_checkpoint"),
    **_group(
        "Trainer uploads what is saved; needs an account to be tried",
        *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"),
        *("hub_always_push", "hub_revision"),
    ),
    **_group(
        "accelerate wraps the model; the recipes are tried with several processes",
        *("fsdp", "fsdp_config", "deepspeed", "ddp_find_unused_parameters", "ddp_backend"),
        *("ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_timeout"),
    ),
    **_group("Trainer's hooks on the model", "debug"),
    **_group("a launcher's word", "local_rank"),
}
"""Name of a field of TrainingArguments -> who obeys it."""

NOT_HERE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "hub_strategy": (
        lambda value: value in ("checkpoint", "all_checkpoints"),
        "a checkpoint is moved to its place while it would be uploaded",
    ),
    "optim": (
        lambda value: "layerwise" in str(plain(value)),
        "it steps inside the backward, before gradients are clipped",
    ),
    "debug": (
        lambda value: "tpu_metrics_debug" in value,
        "evaluation is not Trainer's own",
    ),
}
"""Values of obeyed settings that would not be: which, and why."""

OFF = ("no", "none")
"""Defaults that transformers' parser of flags hands over as False."""


def unobeyed(kind: type[TrainingArguments]) -> dict[str, Field[Any]]:
    """The fields of TrainingArguments that `kind` inherits and nobody here obeys."""
    inherited = {each.name for each in fields(TrainingArguments)}
    return {f.name: f for f in fields(kind) if f.name in inherited - OBEYED.keys()}


def refuse(names: Collection[str]) -> None:
    """Name what would be ignored, if anything would."""
    if names:
        told = ", ".join(f"--{n}{f' ({FREE[n]})' if n in FREE else ''}" for n in sorted(names))
        raise UserError(f"this trainer does not obey {told}: drop it")


def set_aside(arguments: TrainingArguments) -> dict[str, Any]:
    """Before `__post_init__`: put the defaults in place of what is not obeyed; returns the others.

    What transformers then makes of a default, for this device and this launcher, is no wish.
    """
    given: dict[str, Any] = {}
    for name, each in unobeyed(type(arguments)).items():
        value, default = getattr(arguments, name), _default(each)
        if value != default and not (value is False and default in OFF):
            given[name] = value
            setattr(arguments, name, default)
    return given


def check_obeyed(arguments: TrainingArguments, given: dict[str, Any]) -> None:
    """After `__post_init__`: refuse what was `set_aside` and did not come about by itself."""
    refuse([name for name, value in given.items() if getattr(arguments, name) != value])
    for name, (unfit, why) in NOT_HERE.items():
        if unfit(value := getattr(arguments, name)):
            raise UserError(f"this trainer does not obey --{name} {value}: {why}")


def _default(each: Field[Any]) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()
