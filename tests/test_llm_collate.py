"""llm.loss.collate: padding, masks and labels of both kinds of batch."""

from __future__ import annotations

import torch
from _text import PAD

from llm.loss.collate import collate_preference, collate_sft


def test_collate_sft() -> None:
    rows = [
        {"prompt_ids": [5, 6], "completion_ids": [7, 8, 9]},
        {"prompt_ids": [5], "completion_ids": [PAD]},  # a pad id inside a response still counts
    ]
    batch = collate_sft(rows, PAD)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9], [5, PAD, PAD, PAD, PAD]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
        "labels": [[-100, -100, 7, 8, 9], [-100, PAD, -100, -100, -100]],
    }
    assert all(value.dtype == torch.int64 for value in batch.values())
    wide = collate_sft(rows, PAD, pad_to_multiple_of=4)
    assert wide["input_ids"].shape == (2, 8)
    assert wide["attention_mask"].sum() == 7
    assert (wide["labels"][:, 5:] == -100).all()


def test_collate_preference() -> None:
    rows = [
        {"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [8]},
        {"prompt_ids": [9, 9], "chosen_ids": [3], "rejected_ids": [4, 4]},
    ]
    batch = collate_preference(rows, PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2], [9, 9, 3, 2], [5, 8, 2, 2], [9, 9, 4, 4]]
    assert batch["attention_mask"].sum(-1).tolist() == [3, 3, 2, 4]
    assert batch["labels"].tolist()[3] == [-100, -100, 4, 4]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    logps = [{**row, "ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5} for row in rows]
    batch = collate_preference(logps, PAD, pad_to_multiple_of=8)
    assert batch["input_ids"].shape == (4, 8)
    assert batch["ref_chosen_logps"].tolist() == [-1.5, -1.5]
    assert batch["ref_rejected_logps"].dtype == torch.float32
