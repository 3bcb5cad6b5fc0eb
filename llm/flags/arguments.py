"""The flags of `llm.run`: which model, which data, and how to train."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from llm.data.chat import NAMES
from llm.data.formats import MEANINGS, parse_columns
from llm.flags.obeyed import check_obeyed, set_aside
from llm.loss.packing import CPU_TOKENS
from llm.train.clipping import CLIPPING
from llm.train.values import DEFAULT_ROWS, SOURCES
from theory.cli import UserError
from theory.registry import resolve
from theory.schedulers import REGISTRY
from theory.tasks import Task

if TYPE_CHECKING:
    Options = dict[str, Any]
else:
    Options = dict | str | None  # what the parser of flags may hand over
DTYPES = ("float32", "bfloat16", "float16", "auto")


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
        metadata={
            "help": "Reference of DPO: 'initial' (the policy before training), 'base' (the model "
            "under its LoRA adapter), or a hub id or directory, e.g. of an earlier run."
        },
    )
    reference_revision: str = field(default="main", metadata={"help": "Its revision on the hub."})
    use_peft: bool = field(
        default=False,
        metadata={"help": "Train LoRA adapters only. A model that is an adapter goes on as one."},
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "QLoRA: NF4 weights (bitsandbytes) under the adapters."}
    )
    lora_r: int = field(default=16, metadata={"help": "LoRA: rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA: scale, as alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "LoRA: dropout."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "LoRA: which modules. Default: peft's for the model."}
    )


@dataclass
class DataArguments:
    """Which rows to train and evaluate on: local files (JSON Lines, JSON, Parquet, CSV), folders of
    them, or hub ids."""

    sft_dataset: list[str] | None = field(
        default=None,
        metadata={"help": "Demonstrations; several with their shares: a.jsonl:0.7 b.parquet:0.3."},
    )
    dpo_dataset: list[str] | None = field(
        default=None, metadata={"help": "Preferences; several as for sft_dataset."}
    )
    sft_eval_dataset: str | None = field(default=None, metadata={"help": "Held-out rows."})
    dpo_eval_dataset: str | None = field(default=None, metadata={"help": "Held-out pairs."})
    sft_dataset_config: str | None = field(
        default=None, metadata={"help": "Which configuration of sft_dataset."}
    )
    dpo_dataset_config: str | None = field(
        default=None, metadata={"help": "Which configuration of dpo_dataset."}
    )
    sft_train_split: str = field(
        default="train", metadata={"help": "Split to train on, as in `datasets`: 'train[:90%%]'."}
    )
    dpo_train_split: str = field(default="train", metadata={"help": "The same, DPO."})
    sft_eval_split: str | None = field(
        default=None,
        metadata={"help": "Split of sft_eval_dataset, or of sft_dataset without one, to hold out."},
    )
    dpo_eval_split: str | None = field(default=None, metadata={"help": "The same, DPO."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the first rows (max_train_rows) without downloading the rest."},
    )
    held_out: float = field(
        default=0.05,
        metadata={"help": "Share of the rows to hold out where no evaluation set is named."},
    )
    sft_columns: str | None = field(
        default=None,
        metadata={
            "help": "What columns mean where their names do not say it: "
            f"prompt=question,completion=answer; NAME= reads none. ({', '.join(MEANINGS)})"
        },
    )
    dpo_columns: str | None = field(default=None, metadata={"help": "The same, DPO."})
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": f"Chat template in place of the tokenizer's: {', '.join(NAMES)}, or a file."
        },
    )
    template_date: str | None = field(
        default=None,
        metadata={"help": "Today in a chat template, YYYY-MM-DD; a resumed run keeps its own."},
    )
    train_on: str = field(
        default="all",
        metadata={
            "help": "Answers of a conversation that SFT trains on: all or last.",
            "choices": ["all", "last"],
        },
    )
    preprocessing_num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes that tokenise. Default: one a core where there are many rows."
        },
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
    max_dropped_share: float = field(
        default=0.1, metadata={"help": "Refuse a data set that loses more of its rows than this."}
    )
    max_truncated_share: float = field(
        default=1.0, metadata={"help": "Refuse a data set with more truncated rows than this."}
    )
    max_leaked_share: float = field(
        default=1.0,
        metadata={"help": "Refuse held-out rows of which more than this are trained on as well."},
    )
    conflict: float = field(
        default=1.0,
        metadata={
            "help": "Embedded corpus: how far preferences contradict demonstrations, 0 to 1."
        },
    )

    def __post_init__(self) -> None:
        for name in ("sft_dataset", "dpo_dataset"):
            value = getattr(self, name)
            setattr(self, name, [value] if isinstance(value, str) else value)

    def columns(self, task: Task) -> dict[str, str]:
        """What `--sft_columns` or `--dpo_columns` says: meaning to column."""
        return parse_columns(getattr(self, f"{task.label}_columns"), f"--{task.label}_columns")


@dataclass
class JointArguments(TrainingArguments):
    """transformers' TrainingArguments and what joint training adds to them."""

    algo: str = field(
        default="alright",
        metadata={
            "help": f"Which schedule: {', '.join(REGISTRY)}, or one of your own, "
            "package.module:Class."
        },
    )
    lam: float | None = field(
        default=None, metadata={"help": "Weight on DPO in [0, 1]: f = lam DPO + (1-lam) SFT. [0.5]"}
    )
    schedule: Options = field(
        default_factory=dict,
        metadata={"help": "Options of the schedule as JSON; each is a flag of its own as well."},
    )
    value_source: str | None = field(
        default=None,
        metadata={
            "help": f"maxright: {' or '.join(SOURCES)}. Losses of the batches of the next "
            "steps, or of rows set aside from the training sets, the same at every probe. [train]"
        },
    )
    value_rows: int | None = field(
        default=None,
        metadata={
            "help": "maxright: rows of each set that --value_source held_out takes. "
            f"[{DEFAULT_ROWS}]"
        },
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
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "No dropout where the preference objective is computed, as in TRL."},
    )
    clipping: str = field(
        default="global",
        metadata={
            "help": "How --max_grad_norm acts: global (all steps by one factor, so that lam keeps "
            "its meaning) or per_step (each by itself, as the paper's code does).",
            "choices": list(CLIPPING),
        },
    )
    kl_rows: int = field(
        default=64,
        metadata={"help": "Samples of the reference on which KL(reference || policy) is measured."},
    )
    sft_per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Rows per device and micro-batch of SFT."}
    )
    dpo_per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Pairs per device and micro-batch of DPO."}
    )
    packing: bool = field(
        default=True,
        metadata={
            "help": "Batches without padding, each prompt once; no sample sees another. A model "
            "that cannot take them gets padded ones."
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Fill a micro-batch with as many rows as fit into this many tokens, instead of "
            "a number of rows. Needs packing."
        },
    )
    max_tokens_per_forward: int | None = field(
        default=None,
        metadata={
            "help": "Take the rows of a micro-batch through the model in parts of at most this "
            "many tokens: less memory, the same gradient. One process, needs packing. "
            f"[{CPU_TOKENS} on a CPU, else all at once]"
        },
    )
    precompute_ref_log_probs: bool = field(
        default=True,
        metadata={"help": "Compute the reference's log-probabilities once, before training."},
    )
    reference_cache: str | None = field(
        default=None,
        metadata={"help": "Where to keep them, e.g. shared by runs. [OUTPUT_DIR/reference]"},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the results of another run in output_dir."}
    )
    force_resume: bool = field(
        default=False,
        metadata={"help": "Resume although the checkpoint belongs to a run with other settings."},
    )
    # Every step reaches every parameter; looking for those it does not reach costs time.
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Data parallel: some parameters get no gradient (mixtures of experts)."},
    )
    # A loss that is not a number must be seen, not averaged away (and the filter costs a sync).
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN losses."})

    def __post_init__(self) -> None:
        self.output_dir = self.output_dir or f"runs/{self.algo.replace(':', '.')}"
        self.schedule = _mapping(self.schedule)
        if self.eval_steps == 0:  # transformers would take logging_steps
            raise UserError("--eval_steps is 0; it must be a positive number of steps")
        given = set_aside(self)
        super().__post_init__()
        check_obeyed(self, given)

    def batch_size(self, task: Task) -> int:
        own = getattr(self, f"{task.label}_per_device_train_batch_size")
        return self.per_device_train_batch_size if own is None else own


def _mapping(value: Any) -> dict[str, Any]:
    """The value of --schedule, as a mapping."""
    try:
        options = json.loads(value) if isinstance(value, str) else value or {}
    except ValueError as error:
        raise UserError(f"--schedule is no JSON: {error}") from error
    if not isinstance(options, dict):
        raise UserError('--schedule takes a mapping, such as {"refresh_every": 5}')
    return dict(options)


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
        return resolve(self.training.algo).trains

    def max_length(self, task: Task) -> int | None:
        return self._own_or_common(task, "max_length")

    def max_train_rows(self, task: Task) -> int | None:
        return self._own_or_common(task, "max_train_rows")

    def _own_or_common(self, task: Task, name: str) -> int | None:
        own = getattr(self.data, f"{task.label}_{name}")
        return getattr(self.data, name) if own is None else own
