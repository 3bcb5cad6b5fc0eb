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

    `input_ids`, `attention_mask` (1 on tokens) and `labels` (-100 on prompt and padding).
    """
    return _pad(
        [(row["prompt_ids"], row["completion_ids"]) for row in rows],
        pad_token_id,
        pad_to_multiple_of,
    )


def collate_preference(
    rows: Sequence[Mapping[str, Any]], pad_token_id: int, *, pad_to_multiple_of: int | None = None
) -> dict[str, Tensor]:
    """A batch of pairs, padded on the right: tensors of shape (2B, T), int64.

    Chosen in the first B rows, rejected in the last B; keys as in `collate_sft`. If the rows carry
    `ref_chosen_logps` and `ref_rejected_logps` (float), these come along as (B,) float32.
    """
    sides = ("chosen", "rejected")
    pairs = [(row["prompt_ids"], row[f"{side}_ids"]) for side in sides for row in rows]
    batch = _pad(pairs, pad_token_id, pad_to_multiple_of)
    for key in (f"ref_{side}_logps" for side in sides):
        if key in rows[0]:
            batch[key] = torch.tensor([row[key] for row in rows], dtype=torch.float32)
    return batch


def _pad(
    pairs: Sequence[tuple[list[int], list[int]]], pad_token_id: int, multiple: int | None
) -> dict[str, Tensor]:
    width = max(len(prompt) + len(response) for prompt, response in pairs)
    width += -width % (multiple or 1)
    input_ids = torch.full((len(pairs), width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for i, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        input_ids[i, :end] = torch.tensor(prompt + response)
        attention_mask[i, :end] = 1
        labels[i, len(prompt) : end] = input_ids[i, len(prompt) : end]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
