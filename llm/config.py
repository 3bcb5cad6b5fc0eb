"""The command line of `llm.run`: transformers' own flags, TRL's names, and ours.

Values come from, in rising order: the defaults below; the YAML file of `--config` (or, when no
model is named, the embedded recipe `llm/recipes/tiny.yaml`); the command line. A flag, or a key of
a --config file, that the chosen algorithm, loss or data does not use is refused, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from llm.losses import check_preference_options
from theory.cli import OneLineParser, UserError
from theory.schedulers import ORDERS, REGISTRY, make_scheduler, scheduler_options
from theory.tasks import Task

TINY_RECIPE = Path(__file__).parent / "recipes" / "tiny.yaml"
PROG = "python -m llm.run"
DTYPES = ("float32", "bfloat16", "float16", "auto")
SCHEDULE_FLAGS = {"lam": "lam", "refresh_every": "refresh_every", "scale_steps": "scale_steps"}
SCHEDULE_FLAGS |= {"order": "order", "split": "first_steps", "optima": "optimum"}
SCHEDULE_FLAGS |= {"dpo_probability": "dpo_probability", "cycle": "cycle", "value_ema": "value_ema"}
"""Flag of the command line -> option of the schedulers that use it."""
LORA_FLAGS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
MODEL_FLAGS = (
    *("model_revision", "dtype", "attn_implementation", "trust_remote_code"),
    *("use_peft", "held_out"),
)
"""Flags that say how to load a model and data of one's own."""
PREFERENCE_FLAGS = ("reference", "beta", "loss_type", "label_smoothing")
UNSUPPORTED_FLAGS = ("label_smoothing_factor", "auto_find_batch_size")
"""Flags of TrainingArguments that this trainer would not obey."""


@dataclass
class ModelArguments:
    """Which model to train, and the reference of DPO."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or directory. Default: the embedded tiny model."}
    )
    model_revision: str = field(default="main", metadata={"help": "Revision on the hub."})
    dtype: str = field(
        default="float32",
        metadata={"help": f"Type of the weights: {', '.join(DTYPES)}.", "choices": list(DTYPES)},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of transformers: eager, sdpa, ..."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from the hub."})
    reference: str = field(
        default="initial",
        metadata={"help": "Reference of DPO: 'initial' (the policy before training) or a model."},
    )
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters only."})
    lora_r: int = field(default=16, metadata={"help": "LoRA: rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA: scale, as alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "LoRA: dropout."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "LoRA: which modules. Default: peft's for the model."}
    )


@dataclass
class DataArguments:
    """Which rows to train and evaluate on: local JSONL, JSON, Parquet or CSV files, or hub ids."""

    sft_dataset: str | None = field(default=None, metadata={"help": "Demonstrations."})
    dpo_dataset: str | None = field(default=None, metadata={"help": "Preferences."})
    sft_eval_dataset: str | None = field(default=None, metadata={"help": "Held-out rows."})
    dpo_eval_dataset: str | None = field(default=None, metadata={"help": "Held-out pairs."})
    held_out: float = field(
        default=0.05,
        metadata={"help": "Share of the rows to hold out where no evaluation set is named."},
    )
    max_train_rows: int | None = field(
        default=None, metadata={"help": "Read at most this many rows of each training set."}
    )
    sft_max_train_rows: int | None = field(default=None, metadata={"help": "The same, SFT only."})
    dpo_max_train_rows: int | None = field(default=None, metadata={"help": "The same, DPO only."})
    max_eval_rows: int | None = field(
        default=None, metadata={"help": "Read at most this many rows of each evaluation set."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens per sequence; default min(positions, 1024)."}
    )
    sft_max_length: int | None = field(default=None, metadata={"help": "max_length of SFT."})
    dpo_max_length: int | None = field(default=None, metadata={"help": "max_length of DPO."})
    truncation_mode: str = field(
        default="keep_end",
        metadata={
            "help": "Cut the start of the prompt (keep_end) or the end of the whole (keep_start).",
            "choices": ["keep_end", "keep_start"],
        },
    )
    conflict: float = field(
        default=1.0,
        metadata={
            "help": "Embedded corpus: how far preferences contradict demonstrations, 0 to 1."
        },
    )


@dataclass
class JointArguments(TrainingArguments):
    """transformers' TrainingArguments and what joint training adds to them."""

    algo: str = field(
        default="alright",
        metadata={"help": f"Which schedule: {', '.join(REGISTRY)}.", "choices": list(REGISTRY)},
    )
    lam: float | None = field(
        default=None, metadata={"help": "Weight on DPO in [0, 1]: f = lam DPO + (1-lam) SFT. [0.5]"}
    )
    order: str | None = field(
        default=None,
        metadata={"help": f"sequential: {' or '.join(ORDERS)}. [sft_then_dpo]"},
    )
    split: float | None = field(
        default=None, metadata={"help": "sequential: share of the steps in the first stage. [0.5]"}
    )
    refresh_every: int | None = field(
        default=None, metadata={"help": "maxright: steps between two probes of both losses. [10]"}
    )
    scale_steps: bool | None = field(
        default=None, metadata={"help": "maxright: scale the step by its weight. [false]"}
    )
    value_ema: float | None = field(
        default=None, metadata={"help": "maxright: weight of a new loss against the old one. [1]"}
    )
    dpo_probability: float | None = field(
        default=None, metadata={"help": "importance: how often to draw DPO, in (0, 1). [0.5]"}
    )
    cycle: int | None = field(
        default=None, metadata={"help": "alternate: steps of one round of both objectives. [2]"}
    )
    optima: str = field(
        default="auto",
        metadata={
            "help": "Optimal losses for gaps and maxright: a file (optima.json), 'estimate' (train "
            "on each objective alone first), 'none', or 'auto' (estimate if maxright or the "
            "embedded default needs them)."
        },
    )
    beta: float = field(default=0.1, metadata={"help": "Temperature of DPO."})
    loss_type: str = field(
        default="sigmoid", metadata={"help": "sigmoid, ipo, hinge, robust or sigmoid_norm."}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Assumed share of flipped preferences (sigmoid, robust)."}
    )
    sft_per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Rows per device and micro-batch of SFT."}
    )
    dpo_per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Pairs per device and micro-batch of DPO."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the results of another run in output_dir."}
    )
    # A loss that is not a number must be seen, not averaged away (and the filter costs a sync).
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN losses."})

    def __post_init__(self) -> None:
        self.output_dir = self.output_dir or f"runs/{self.algo}"
        super().__post_init__()

    def batch_size(self, task: Task) -> int:
        own = getattr(self, f"{task.label}_per_device_train_batch_size")
        return self.per_device_train_batch_size if own is None else own


@dataclass(frozen=True)
class RunConfig:
    """One validated command line."""

    model: ModelArguments
    data: DataArguments
    training: JointArguments

    @property
    def embedded(self) -> bool:
        return self.model.model_name_or_path is None

    @property
    def output_dir(self) -> str:
        return str(self.training.output_dir)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The objectives that the algorithm trains on."""
        if self.training.algo in (task.label for task in Task):
            return (Task[self.training.algo.upper()],)
        return tuple(Task)

    def max_length(self, task: Task) -> int | None:
        return self._own_or_common(task, "max_length")

    def max_train_rows(self, task: Task) -> int | None:
        return self._own_or_common(task, "max_train_rows")

    def _own_or_common(self, task: Task, name: str) -> int | None:
        own = getattr(self.data, f"{task.label}_{name}")
        return getattr(self.data, name) if own is None else own


def parse(argv: Sequence[str]) -> RunConfig:
    """Read the command line (and its YAML file) into a validated configuration."""
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, JointArguments),  # type: ignore[arg-type]
        prog=PROG,
        description="Train one language model on demonstrations and preferences at once.",
        allow_abbrev=False,
    )
    parser.error = OneLineParser.error.__get__(parser)  # type: ignore[method-assign]
    parser.add_argument("--config", help="YAML file with values for any of these flags.")
    recipe = _recipe(argv)
    known = {action.dest for action in parser._actions} - {"config", "help"}
    defaults = _as_flags(recipe, known)
    model, data, training, rest = parser.parse_args_into_dataclasses(
        [*defaults, *argv], look_for_args_file=False
    )
    del rest  # the namespace that holds --config
    config = RunConfig(model, data, training)
    _check(config, explicit=_named(argv if recipe == TINY_RECIPE else [*defaults, *argv]))
    return config


def _named(tokens: Sequence[str]) -> set[str]:
    """The names of the flags among `tokens`; `--refresh-every` is `refresh_every`."""
    return {t.split("=")[0][2:].replace("-", "_") for t in tokens if t.startswith("--")}


def _recipe(argv: Sequence[str]) -> Path | None:
    """The YAML file to start from: --config, or the embedded recipe if no model is named."""
    for i, token in enumerate(argv):
        if token == "--config" and i + 1 < len(argv):
            return Path(argv[i + 1])
        if token.startswith("--config="):
            return Path(token.removeprefix("--config="))
    return None if "model_name_or_path" in _named(argv) else TINY_RECIPE


def _as_flags(recipe: Path | None, known: set[str]) -> list[str]:
    """A YAML mapping as command-line tokens, so that the same parser checks both."""
    if recipe is None:
        return []
    try:
        values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {recipe}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {recipe} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {recipe} must hold a mapping of flags to values")
    unknown = sorted(set(map(str, values)) - known)
    if unknown:
        raise UserError(f"--config {recipe} has unknown keys: {', '.join(unknown)}")
    tokens: list[str] = []
    for key, value in values.items():
        if value is not None:
            items = value if isinstance(value, list) else [value]
            texts = (json.dumps(i) if isinstance(i, dict) else str(i) for i in items)
            tokens += [f"--{key}", *texts]
    return tokens


def _check(config: RunConfig, explicit: set[str]) -> None:
    """Everything that can be refused before a model or a data set is opened."""
    training = config.training
    used = scheduler_options(training.algo)
    for flag, option in SCHEDULE_FLAGS.items():
        if flag in explicit and option not in used and flag != "optima":
            takes = [f for f, o in SCHEDULE_FLAGS.items() if o in used]
            raise UserError(
                f"--{flag} is not used by --algo {training.algo} "
                f"(it takes: {', '.join(f'--{t}' for t in takes) or 'no schedule flags'})"
            )
    for name, value in (("split", training.split), ("conflict", config.data.conflict)):
        if value is not None and not 0.0 <= value <= 1.0:
            raise UserError(f"--{name} is {value}; it must lie in [0, 1]")
    # The scheduler checks its own options; the optimum is known only later.
    make_scheduler(training.algo, **schedule_options(training, 1, optimum=(0.0, 0.0)))
    for name in UNSUPPORTED_FLAGS:
        if getattr(training, name):
            raise UserError(f"--{name} is not supported by this trainer")
    if training.load_best_model_at_end or training.save_strategy == SaveStrategy.BEST:
        _check_best_metric(training)
    if not 0.0 < config.data.held_out < 1.0:
        raise UserError(f"--held_out is {config.data.held_out}; it must lie in (0, 1)")
    for task in Task:
        if training.batch_size(task) < 1:
            raise UserError(f"the batch size of {task.label} must be at least 1")
    unused = [f"--{name}" for name in LORA_FLAGS if name in explicit and not config.model.use_peft]
    if unused:
        raise UserError(f"{', '.join(unused)} is not used without --use_peft true")
    if config.model.lora_r < 1 or not 0.0 <= config.model.lora_dropout < 1.0:
        raise UserError("--lora_r must be at least 1 and --lora_dropout lie in [0, 1)")
    rows = [f"{prefix}max_train_rows" for prefix in ("", "sft_", "dpo_")]
    for name in (*rows, "max_eval_rows"):
        limit = getattr(config.data, name)
        if limit is not None and limit < 1:
            raise UserError(f"--{name} is {limit}; it must be at least 1")
    check_preference_options(training.loss_type, training.beta, training.label_smoothing)
    _check_data_flags(config, explicit)


def _check_best_metric(training: JointArguments) -> None:
    name = (training.metric_for_best_model or "").removeprefix("eval_")
    if name.split("_")[0] not in (task.label for task in Task):
        raise UserError(
            "the best model needs --metric_for_best_model dpo_loss, sft_loss or another metric of "
            f"one objective; it is {training.metric_for_best_model}"
        )


def _check_data_flags(config: RunConfig, explicit: set[str]) -> None:
    data = config.data
    if config.embedded:
        given = [name for name in (*_dataset_flags(), *MODEL_FLAGS) if name in explicit]
        if given:
            flags = ", ".join(f"--{name}" for name in given)
            raise UserError(f"{flags}: this needs a model of your own, --model_name_or_path")
        return
    if "conflict" in explicit:
        raise UserError("--conflict belongs to the embedded corpus; drop it or the model's name")
    for task in config.tasks:
        if getattr(data, f"{task.label}_dataset") is None:
            raise UserError(
                f"--algo {config.training.algo} trains on {task.label}: give --{task.label}_dataset"
            )
    for task in Task:
        if getattr(data, f"{task.label}_dataset") is None:
            _check_unused(task, explicit)
        elif getattr(data, f"{task.label}_dataset") == getattr(data, f"{task.label}_eval_dataset"):
            raise UserError(f"--{task.label}_eval_dataset holds the rows that are trained on")
    for name in _dataset_flags():
        source = getattr(data, name)
        if source is not None and Path(source).suffix and not Path(source).exists():
            raise UserError(f"--{name} {source} does not exist")


def _check_unused(task: Task, explicit: set[str]) -> None:
    """Without data of `task`, nothing reads the flags that belong to it."""
    own = {name for name in explicit if name.startswith(f"{task.label}_")} - {"dpo_probability"}
    own |= explicit & set(PREFERENCE_FLAGS) if task == Task.DPO else set()
    if own:
        flags = ", ".join(f"--{name}" for name in sorted(own))
        raise UserError(f"{flags} is not used without --{task.label}_dataset")


def _dataset_flags() -> list[str]:
    return [f"{task.label}{part}_dataset" for task in Task for part in ("", "_eval")]


def schedule_options(training: JointArguments, num_steps: int, **extra: Any) -> dict[str, Any]:
    """The options of the chosen scheduler, defaults filled in."""
    values = {
        "lam": 0.5 if training.lam is None else training.lam,
        "seed": training.seed,
        "order": training.order or "sft_then_dpo",
        "first_steps": round((0.5 if training.split is None else training.split) * num_steps),
        "refresh_every": 10 if training.refresh_every is None else training.refresh_every,
        "scale_steps": bool(training.scale_steps),
        "value_ema": 1.0 if training.value_ema is None else training.value_ema,
        "dpo_probability": 0.5 if training.dpo_probability is None else training.dpo_probability,
        "cycle": 2 if training.cycle is None else training.cycle,
        **extra,
    }
    used = scheduler_options(training.algo)
    return {name: value for name, value in values.items() if name in used}
