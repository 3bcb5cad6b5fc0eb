"""What can be refused of the flags of model and data before either is opened."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llm.data.sources import is_missing_file, parse_source
from llm.flags.arguments import RunConfig
from theory.cli import UserError
from theory.tasks import Task

LORA_FLAGS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
OWN_FLAGS = (
    *("model_revision", "dtype", "attn_implementation", "trust_remote_code"),
    *("use_peft", "load_in_4bit", "held_out", "streaming", "chat_template", "template_date"),
    *("train_on", "preprocessing_num_workers"),
)
"""Flags that say how to load a model and data of one's own."""
OWN_PARTS = ("dataset", "eval_dataset", "dataset_config", "train_split", "eval_split", "columns")
"""The same, with the prefix of an objective."""
REFERENCE_FLAGS = ("reference", "reference_revision", "reference_cache", "precompute_ref_log_probs")
PREFERENCE_FLAGS = (
    *(*REFERENCE_FLAGS, "beta", "loss_type", "label_smoothing"),
    *("kl_rows", "disable_dropout"),
)
SHARES = ("max_dropped_share", "max_truncated_share", "max_leaked_share")


def check_batch_flags(config: RunConfig, explicit: set[str]) -> None:
    training = config.training
    for task in Task:
        if training.batch_size(task) < 1:
            raise UserError(f"the batch size of {task.label} must be at least 1")
    if training.packing and "attn_implementation" in explicit:
        raise UserError(
            "--attn_implementation is not used by packed batches: drop it, or give --packing false"
        )
    for name in ("max_tokens_per_batch", "max_tokens_per_forward"):
        budget = getattr(training, name)
        if budget is not None and budget < 1:
            raise UserError(f"--{name} is {budget}; it must be at least 1")
        if budget is not None and not training.packing:
            raise UserError(f"--{name} is not used with --packing false")
    if training.max_tokens_per_forward and (training.world_size > 1 or training.deepspeed):
        raise UserError("--max_tokens_per_forward is for one process without DeepSpeed")
    if training.max_tokens_per_batch is None:
        return
    sizes = [f"{task.label}_per_device_train_batch_size" for task in Task]
    given = [name for name in ("per_device_train_batch_size", *sizes) if name in explicit]
    if given:
        raise UserError(f"{_flags(given)} is not used with --max_tokens_per_batch")


def check_model_flags(config: RunConfig, explicit: set[str]) -> None:
    model = config.model
    adapter = is_adapter(model.model_name_or_path)
    lora = [name for name in LORA_FLAGS if name in explicit]
    if lora and adapter:
        raise UserError(f"{_flags(lora)}: the adapter {model.model_name_or_path} has its own")
    if lora and not model.use_peft:
        raise UserError(f"{_flags(lora)} is not used without --use_peft true")
    if adapter and "use_peft" in explicit and not model.use_peft:
        raise UserError(
            f"--use_peft false: {model.model_name_or_path} is an adapter; merge it first "
            "(python -m llm.export)"
        )
    if model.lora_r < 1 or not 0.0 <= model.lora_dropout < 1.0:
        raise UserError("--lora_r must be at least 1 and --lora_dropout lie in [0, 1)")
    if model.load_in_4bit and not (model.use_peft or adapter):
        raise UserError("--load_in_4bit trains adapters only: give --use_peft true")
    if model.load_in_4bit and find_spec("bitsandbytes") is None:
        raise UserError("--load_in_4bit needs bitsandbytes: pip install 'joint-sft-dpo[qlora]'")
    if "reference_revision" in explicit and model.reference in ("initial", "base"):
        raise UserError(f"--reference_revision is not used by --reference {model.reference}")


def is_adapter(name: str | None) -> bool:
    """Whether `name` is a directory with a LoRA adapter, such as a run with --use_peft leaves."""
    return name is not None and (Path(name) / "adapter_config.json").is_file()


def check_data_flags(config: RunConfig, explicit: set[str]) -> None:
    _check_numbers(config)
    if config.embedded:
        own = [f"{task.label}_{part}" for task in Task for part in OWN_PARTS]
        given = [name for name in (*own, *OWN_FLAGS) if name in explicit]
        if given:
            raise UserError(
                f"{_flags(given)}: this needs a model of your own, --model_name_or_path"
            )
        return
    if "conflict" in explicit:
        raise UserError("--conflict belongs to the embedded corpus; drop it or the model's name")
    named = [task for task in Task if _value(config, task, "dataset") is not None]
    for task in config.tasks:
        if task not in named:
            raise UserError(
                f"--algo {config.training.algo} trains on {task.label}: give --{task.label}_dataset"
            )
    for task in Task:
        if task in named:
            _check_sources(config, task)
        else:
            _check_unused(task, explicit)
    if "held_out" in explicit and all(_names_held_out_rows(config, task) for task in named):
        raise UserError("--held_out is not used: rows to hold out are named")


def _check_numbers(config: RunConfig) -> None:
    data = config.data
    if not 0.0 < data.held_out < 1.0:
        raise UserError(f"--held_out is {data.held_out}; it must lie in (0, 1)")
    if data.preprocessing_num_workers is not None and data.preprocessing_num_workers < 1:
        raise UserError("--preprocessing_num_workers must be at least 1")
    _check_date(data.template_date)
    for name in SHARES:
        if not 0.0 <= getattr(data, name) <= 1.0:
            raise UserError(f"--{name} is {getattr(data, name)}; it must lie in [0, 1]")
    rows = [f"{prefix}max_train_rows" for prefix in ("", "sft_", "dpo_")]
    for name in (*rows, "max_eval_rows"):
        limit = getattr(data, name)
        if limit is not None and limit < 1:
            raise UserError(f"--{name} is {limit}; it must be at least 1")


def _check_date(text: str | None) -> None:
    try:
        date.fromisoformat(text or "2000-01-01")
    except ValueError as error:
        raise UserError(f"--template_date is {text}; write it as 2026-01-31") from error


def _check_sources(config: RunConfig, task: Task) -> None:
    """The rows of one objective: files exist, held-out rows are others, a stream has an end."""
    train: list[str] = _value(config, task, "dataset")
    held_out: str | None = _value(config, task, "eval_dataset")
    names = [parse_source(source).name for source in train]
    for part, source in [*(("dataset", name) for name in names), ("eval_dataset", held_out)]:
        if source is not None and is_missing_file(source):
            raise UserError(f"--{task.label}_{part} {source} does not exist")
    config.data.columns(task)
    split = _value(config, task, "eval_split")
    if held_out in (*names, None) and (split or held_out):
        flag = "eval_split" if split else "eval_dataset"
        if (split or "train") == _value(config, task, "train_split"):
            raise UserError(f"--{task.label}_{flag} holds the rows that are trained on")
    if config.data.streaming:
        if config.max_train_rows(task) is None:
            raise UserError(f"--streaming reads the first rows: give --{task.label}_max_train_rows")
        if _names_held_out_rows(config, task) and config.data.max_eval_rows is None:
            raise UserError("--streaming reads the first rows: give --max_eval_rows")


def _names_held_out_rows(config: RunConfig, task: Task) -> bool:
    return any(_value(config, task, part) is not None for part in ("eval_dataset", "eval_split"))


def _check_unused(task: Task, explicit: set[str]) -> None:
    """Without data of `task`, nothing reads the flags that belong to it."""
    own = {name for name in explicit if name.startswith(f"{task.label}_")} - {"dpo_probability"}
    own |= explicit & set(PREFERENCE_FLAGS) if task == Task.DPO else set()
    if own:
        raise UserError(f"{_flags(sorted(own))} is not used without --{task.label}_dataset")


def _value(config: RunConfig, task: Task, part: str) -> Any:
    return getattr(config.data, f"{task.label}_{part}")


def _flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name}" for name in names)
