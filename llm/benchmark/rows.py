"""The token ids that all contenders train on: real rows, or generated ones of like lengths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llm.benchmark.shapes import EOS, SEED, Shape
from llm.data.encode import encode_preference, encode_sft
from llm.data.sources import load_rows
from llm.loss.objectives import Row
from theory.cli import UserError
from theory.tasks import Task

ENCODERS = {Task.DPO: encode_preference, Task.SFT: encode_sft}
KEYS = {
    Task.DPO: ("prompt_ids", "chosen_ids", "rejected_ids"),
    Task.SFT: ("prompt_ids", "completion_ids"),
}
LENGTHS = {
    "dpo prompt_ids": (94, 0.86),
    "dpo chosen_ids": (35, 0.85),
    "dpo rejected_ids": (39, 0.85),
    "sft prompt_ids": (16, 0.5),
    "sft completion_ids": (40, 0.85),
}
"""(median, sigma) of log-normal lengths in tokens: those of hh-rlhf's pairs (prompts of 136 tokens
on average, 386 at the 95th percentile; responses of 50 and 56) and of Alpaca (18 and 57)."""


@dataclass(frozen=True)
class Sources:
    """Data set of each objective (None: generated rows) and the tokenizer of the real ones."""

    sft: str | None = None
    dpo: str | None = None
    tokenizer: str | None = None


def make_rows(task: Task, count: int, shape: Shape, sources: Sources) -> list[Row]:
    """`count` rows of lists of ids below the vocabulary, at most `shape.max_length` long."""
    source = getattr(sources, task.label)
    if source is None:
        return _generated(task, count, shape)
    tokenizer = load_tokenizer(sources.tokenizer)
    raw = load_rows(source, limit=4 * count)
    encoded = ENCODERS[task](
        raw, tokenizer, max_length=shape.max_length, name=f"{task.label}_dataset"
    )
    if len(encoded.rows) < count:
        raise UserError(f"--{task.label}_dataset has {len(encoded.rows)} usable rows of {count}")
    rows = encoded.rows[:count]
    return [{key: [i % shape.vocab_size for i in row[key]] for key in KEYS[task]} for row in rows]


def load_tokenizer(source: str | None) -> Any:
    """A directory or hub id, or a bare tokenizer.json."""
    if source is None:
        raise UserError("--tokenizer is needed for --sft_dataset and --dpo_dataset")
    try:
        if not Path(source).is_file():
            return AutoTokenizer.from_pretrained(source)
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=source)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer {source}: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        specials = [t for t in tokenizer.added_tokens_decoder.values() if t.special]
        if not specials:
            raise UserError(f"--tokenizer {source} has no special token to end a response with")
        tokenizer.eos_token = specials[0]
    return tokenizer


def _generated(task: Task, count: int, shape: Shape) -> list[Row]:
    rng = np.random.default_rng([SEED, task, count])
    rows = []
    for _ in range(count):
        row = {}
        for key in KEYS[task]:
            median, sigma = LENGTHS[f"{task.label} {key}"]
            limit = shape.max_length // 2
            length = int(np.clip(rng.lognormal(np.log(median), sigma), 2, limit))
            row[key] = rng.integers(1, shape.vocab_size, length).tolist()
            if key != "prompt_ids":
                row[key][-1] = EOS
        rows.append(row)
    return rows


def equal_rows(count: int, shape: Shape) -> dict[Task, list[Row]]:
    """Rows of one length: what a batch costs does not depend on which rows it holds."""
    rng = np.random.default_rng([SEED, count])
    rows = rng.integers(1, shape.vocab_size, (count, 24)).tolist()
    return {Task.SFT: [{"prompt_ids": row[:8], "completion_ids": row[8:]} for row in rows]}


def tokens_of(row: Row) -> int:
    """Logical tokens: both sequences of a pair count their prompt."""
    prompt = len(row["prompt_ids"])
    return sum(prompt + len(ids) for key, ids in row.items() if key != "prompt_ids")


def describe_rows(rows: list[Row]) -> dict[str, Any]:
    return {
        "rows": len(rows),
        "mean_tokens": {key: float(np.mean([len(row[key]) for row in rows])) for key in rows[0]},
    }
