"""Batches of tokenised rows (`llm.data.encode`) as right-padded tensors, for both objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llm.loss.losses import IGNORE_INDEX


def collate_sft(
    rows: Sequence[Mapping[str, Any]], pad_token_id: int, *, pad_to_multiple_of: int | None = None
) -> dict[str, Tensor]:
    """A batch of SFT rows, padded on the right: tensors of shape (B, T), int64.

    `input_ids`, `attention_mask` (1 on tokens) and `labels` (-100 on prompt and padding, and on
    response tokens whose `completion_mask` is 0).
    """
    sequences = [(row, "completion") for row in rows]
    return _pad(sequences, pad_token_id, pad_to_multiple_of)


def collate_preference(
    rows: Sequence[Mapping[str, Any]], pad_token_id: int, *, pad_to_multiple_of: int | None = None
) -> dict[str, Tensor]:
    """A batch of pairs, padded on the right: tensors of shape (2B, T), int64.

    Chosen in the first B rows, rejected in the last B; keys as in `collate_sft`. If the rows carry
    `ref_chosen_logps` and `ref_rejected_logps` (float), these come along as (B,) float32.
    """
    sides = ("chosen", "rejected")
    sequences = [(row, side) for side in sides for row in rows]
    batch = _pad(sequences, pad_token_id, pad_to_multiple_of)
    for key in (f"ref_{side}_logps" for side in sides):
        if key in rows[0]:
            batch[key] = torch.tensor([row[key] for row in rows], dtype=torch.float32)
    return batch


def _pad(
    sequences: Sequence[tuple[Mapping[str, Any], str]], pad_token_id: int, multiple: int | None
) -> dict[str, Tensor]:
    """One line for each (row, name of one of its responses)."""
    pairs = [(row["prompt_ids"], row[f"{name}_ids"]) for row, name in sequences]
    width = max(len(prompt) + len(response) for prompt, response in pairs)
    width += -width % (multiple or 1)
    input_ids = torch.full((len(pairs), width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for i, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        input_ids[i, :end] = torch.tensor(prompt + response)
        attention_mask[i, :end] = 1
        row, name = sequences[i]
        mask = torch.tensor(row.get(f"{name}_mask") or [1] * len(response), dtype=torch.bool)
        labels[i, len(prompt) : end][mask] = input_ids[i, len(prompt) : end][mask]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
