"""Which settings of a run count: all but those named here, each with the reason.

One table for resumed runs, kept runs of a comparison, estimates of optima and caches: what a use
may leave out beyond `FREE` is a set of its own. A setting that nobody thought of counts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

Reasons = dict[str, str]
"""Name of a setting -> why it does not count."""


def _free(reason: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, reason)


NOT_PART_OF_A_RUN: Reasons = {
    **_free("where results lie", "output_dir", "overwrite_output_dir", "reference_cache"),
    **_free("how the run is started", "resume_from_checkpoint", "force_resume"),
    **_free("what a terminal shows", "disable_tqdm"),
}
_TASKS = ("sft", "dpo")
_ROWS = (
    *("dataset", "eval_dataset", "dataset_config", "train_split", "eval_split"),
    *("max_train_rows", "max_length", "columns"),
)
FREE: Reasons = {
    **NOT_PART_OF_A_RUN,
    **_free(
        "what is logged",
        *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter"),
        *("log_level", "log_level_replica", "log_on_each_node", "skip_memory_metrics"),
        "include_num_input_tokens_seen",
    ),
    **_free(
        "whom a tracker tells",
        *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id"),
        "trackio_static_space_id",
    ),
    **_free(
        "what is saved",
        *("save_strategy", "save_steps", "save_total_limit", "save_on_each_node"),
        *("save_only_model", "enable_jit_checkpoint"),
    ),
    **_free(
        "where it is published",
        *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"),
        *("hub_always_push", "hub_revision"),
    ),
    **_free("nothing here reads them", "do_train", "do_eval", "do_predict", "label_names"),
    **_free(
        "the loader is a clock: the samples come from the streams",
        *("dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory"),
        *("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_in_order"),
        *("dataloader_multiprocessing_context", "remove_unused_columns", "length_column_name"),
        "train_sampling_strategy",
    ),
    **_free(
        "the rows that it leads to count, token by token",
        *(f"{task}_{name}" for task in _TASKS for name in _ROWS),
        *("streaming", "held_out", "max_train_rows", "max_eval_rows", "max_length"),
        *("truncation_mode", "conflict", "chat_template", "template_date", "train_on"),
    ),
    **_free("how fast rows are read", "preprocessing_num_workers"),
    **_free(
        "it refuses data and changes none",
        *("max_dropped_share", "max_truncated_share", "max_leaked_share"),
    ),
    **_free("the model's weights and configuration count", "model_name_or_path", "model_revision"),
    **_free("the reference's log-probabilities count", "reference", "reference_revision"),
    **_free("the order of the rows counts", "data_seed"),
    **_free("only true can be given", "precompute_ref_log_probs"),
    **_free("a launcher's word", "local_rank", "ddp_timeout"),
}
"""What counts for no use."""

SHARING: Reasons = {
    **_free(
        "the rows of a step count, not how devices and micro-batches share them",
        *("per_device_train_batch_size", "gradient_accumulation_steps"),
        *(f"{task}_per_device_train_batch_size" for task in _TASKS),
        *("max_tokens_per_batch", "max_tokens_per_forward", "fsdp", "fsdp_config", "use_cpu"),
        *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
        *("ddp_static_graph", "ddp_backend"),
    ),
    **_free(
        "the same values, held in less memory",
        *("gradient_checkpointing", "activation_checkpointing", "torch_empty_cache_steps"),
    ),
}
EVALUATION: Reasons = _free(
    "what is evaluated",
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
    *("bf16_full_eval", "fp16_full_eval", "prediction_loss_only", "eval_do_concat_batches"),
    *("eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics"),
    *("batch_eval_metrics", "kl_rows"),
)
SCHEDULE: Reasons = {
    **_free(
        "the scheduler counts, with all its options and the optima that it reads",
        *("algo", "lam", "optima", "schedule"),
    ),
    **_free("the rows that a probe reads count", "value_source", "value_rows"),
}
LENGTH: Reasons = _free("the number of steps counts where it matters", "max_steps") | _free(
    "the same, in passes over the data", "num_train_epochs"
)

RESUME: Reasons = (
    FREE
    | SHARING
    | EVALUATION
    | SCHEDULE
    | LENGTH
    | _free("the losses count, whole", "beta", "loss_type", "label_smoothing", "packing")
)
"""A checkpoint is continued: its weights are to come out the same."""
COMPARISON: Reasons = (
    FREE
    | LENGTH
    | _free("every run holds its own", "algo", "lam", "learning_rate", "optima")
    | _free("the kind of device counts", "use_cpu")
)
"""A kept run of a comparison: its record holds times and evaluations too, so that those count."""
OPTIMA: Reasons = (
    FREE
    | SHARING
    | SCHEDULE
    | LENGTH
    | _free("the KL to the reference is no part of an optimum", "kl_rows")
    | _free("stands beside the estimate", "learning_rate")
    | _free(
        "a run on one objective keeps no checkpoint",
        *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    )
)
"""The lowest held-out loss of a run on one objective; it depends on where it is measured."""
REFERENCE: Reasons = FREE | _free(
    "the reference comes before new adapters",
    *("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
)
"""What a frozen model says of rows (of the settings of its kind, `ModelArguments`)."""

FILES = ("deepspeed",)
"""Settings that may name a file, which counts by its content."""


def counting(*settings: Any, free: Collection[str]) -> dict[str, str]:
    """Every field of the dataclasses `settings` that is not in `free`, as text by its name.

    Nested dictionaries give an entry for each value, as `lr_scheduler_kwargs.num_cycles`; what is
    None gives none.
    """
    values = {each.name: getattr(own, each.name) for own in settings for each in fields(own)}
    return flat({name: _content(name, values[name]) for name in values.keys() - set(free)})


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The leaves of nested settings as text, by dotted names in order; None is left out."""
    return dict(sorted(_leaves(values, prefix)))


def differing(theirs: Mapping[str, str], mine: Mapping[str, str]) -> list[str]:
    """The names that two texts of settings do not have in common, sorted."""
    return sorted(n for n in theirs.keys() | mine.keys() if theirs.get(n) != mine.get(n))


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        leaf = plain(value)
        if isinstance(leaf, Mapping):
            yield from _leaves(leaf, f"{prefix}{name}.")
        elif leaf is not None:
            yield f"{prefix}{name}", str(leaf)


def plain(value: Any) -> Any:
    """Enumerations by their value, sets in order, dataclasses as dictionaries."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if is_dataclass(value):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    return value


def _content(name: str, value: Any) -> Any:
    if name in FILES and isinstance(value, str) and Path(value).is_file():
        return Path(value).read_text(encoding="utf-8")
    return value
