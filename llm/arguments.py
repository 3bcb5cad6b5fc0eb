"""Which model and which data: the flags of `llm.run` that have nothing to do with training."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """Which rows to train and evaluate on: local JSONL, JSON, Parquet or CSV files, or hub ids."""

    sft_dataset: str | None = field(default=None, metadata={"help": "Demonstrations."})
    dpo_dataset: str | None = field(default=None, metadata={"help": "Preferences."})
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
