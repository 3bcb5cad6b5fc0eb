"""Batches without padding: all rows of a micro-batch in one sequence, each prompt once.

A preference pair is laid out as [prompt chosen][rejected]. The rejected response attends to the
prompt of its pair and to itself, and its positions continue from the prompt: to every token the
sequence looks as if its pair partner and the other rows were not there. So a pair costs P + C + R
tokens instead of the 2 (P + max(C, R)) of two padded rows, and the values are the same.

Prompt sharing: arXiv 2410.20305. What attends to what is in a `PackingPlan`; `attention` obeys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import TrainingArguments

CPU_TOKENS = 1024
"""Tokens of one forward pass on a CPU: enough for full speed, and not more memory than needed."""
Row = Mapping[str, Any]
AnyRow = TypeVar("AnyRow", bound=Row)
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class PackingPlan:
    """The blocks of a packed sequence, in order; attention is causal inside a block.

    Attributes:
        lengths: tokens of each block; they add up to the length of the sequence.
        parents: for each block the number of the block whose first `shared` tokens it sees in
            front of its own, or -1.
        shared: how many of them; 0 without a parent.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    shared: tuple[int, ...]

    def key_indices(self) -> Indices:
        """Positions of the keys of all blocks in turn: the shared prompt, then the block."""
        starts = [0, *accumulate(self.lengths)]
        parts = []
        for i, (length, parent, shared) in enumerate(
            zip(self.lengths, self.parents, self.shared, strict=True)
        ):
            if parent >= 0:
                parts.append(np.arange(starts[parent], starts[parent] + shared))
            parts.append(np.arange(starts[i], starts[i] + length))
        return np.concatenate(parts)

    @property
    def key_lengths(self) -> tuple[int, ...]:
        """Keys that the blocks attend to."""
        return tuple(
            length + shared for length, shared in zip(self.lengths, self.shared, strict=True)
        )


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy that does not hold up the host: from pageable memory it would wait for the GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def row_tokens(row: Row) -> int:
    """Tokens of a row without padding, its prompt once."""
    return sum(len(ids) for key, ids in row.items() if key.endswith("_ids"))


def tokens_per_forward(args: TrainingArguments) -> int | None:
    """Most tokens of one forward pass with gradients; None: a micro-batch at once.

    Ranks run their model in step, so the rows that each of them holds must not decide how often.
    """
    if args.world_size > 1 or args.deepspeed:
        return None
    given: int | None = getattr(args, "max_tokens_per_forward", None)
    return CPU_TOKENS if given is None and args.device.type == "cpu" else given


def trained_tokens(row: Row, response: str) -> int:
    """How many tokens of the response called `response` are trained on."""
    mask = row.get(f"{response}_mask")
    return len(row[f"{response}_ids"]) if mask is None else sum(mask)


def split_rows(rows: Sequence[AnyRow], max_tokens: int | None) -> list[Sequence[AnyRow]]:
    """Consecutive rows in parts of at most `max_tokens` tokens each, or of one longer row."""
    if max_tokens is None:
        return [rows]
    parts: list[list[AnyRow]] = []
    room = 0
    for row in rows:
        tokens = row_tokens(row)
        if tokens > room or not parts:
            parts.append([])
            room = max_tokens
        parts[-1].append(row)
        room -= tokens
    return list(parts)


def pack_sft(rows: Sequence[Row], pad_token_id: int = 0) -> dict[str, Any]:
    """SFT rows as one sequence of shape (1, T); nothing is padded.

    A row with a `completion_mask` trains on the response tokens where it is 1; the others are
    turns of other speakers between two answers.

    `input_ids` and `position_ids` (1, T); for the N trained tokens `targets` (N,), the positions
    `predictors` (N,) whose hidden state predicts them and `owners` (N,), the row they belong to;
    `predicting` (M,), the predictors in order and each once; `plan`, a `PackingPlan`.
    """
    return _pack(rows, ("completion",))


def pack_preference(rows: Sequence[Row], pad_token_id: int = 0) -> dict[str, Any]:
    """Pairs as one sequence of shape (1, T) with every prompt once; nothing is padded.

    As `pack_sft`; `owners` counts the chosen responses 0..B-1 and the rejected ones B..2B-1. If the
    rows carry `ref_chosen_logps` and `ref_rejected_logps` (float), these come along, (B,) float32.
    """
    batch = _pack(rows, ("chosen", "rejected"))
    for key in ("ref_chosen_logps", "ref_rejected_logps"):
        if key in rows[0]:
            batch[key] = torch.tensor([row[key] for row in rows], dtype=torch.float32)
    return batch


def _pack(rows: Sequence[Row], responses: Sequence[str]) -> dict[str, Any]:
    """The first of the `responses` follows its prompt, others refer to it."""
    tokens: list[Any] = []
    positions: list[Indices] = []
    predictors: list[Indices] = []
    targets: list[Any] = []
    owners: list[Indices] = []
    blocks: list[tuple[int, int, int]] = []
    start = 0
    for i, row in enumerate(rows):
        prompt = row["prompt_ids"]
        last_of_prompt, first_block = start + len(prompt) - 1, len(blocks)
        for side, name in enumerate(responses):
            response, trained = row[f"{name}_ids"], _trained(row, name)
            own = [prompt, response] if side == 0 else [response]
            length = sum(map(len, own))
            shared = 0 if side == 0 else len(prompt)
            blocks.append((length, first_block if side else -1, shared))
            tokens += own
            positions.append(np.arange(shared, shared + length))
            # Token t of the response is predicted from the token before it; the first from the
            # end of the prompt, wherever that stands.
            begin = start + length - len(response)
            before = np.arange(begin - 1, start + length - 1)
            before[0] = last_of_prompt
            predictors.append(before[trained])
            targets.append(np.asarray(response)[trained])
            owners.append(np.full(len(targets[-1]), side * len(rows) + i))
            start += length
    by_target = _tensor(predictors)
    return {
        "input_ids": _tensor(tokens)[None],
        "position_ids": _tensor(positions)[None],
        "predictors": by_target,
        "predicting": by_target.unique(),
        "targets": _tensor(targets),
        "owners": _tensor(owners),
        "plan": PackingPlan(*zip(*blocks, strict=True)),
    }


def _trained(row: Row, response: str) -> Any:
    """What selects the trained tokens of a response: everything, where there is no mask."""
    mask = row.get(f"{response}_mask")
    return slice(None) if mask is None else np.asarray(mask, dtype=bool)


def _tensor(parts: Sequence[Any]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))
