"""Rows with several trained answers: what a mask selects, and that their loss is their answers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _packing import FLOAT32, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.loss.collate import collate_preference, collate_sft
from llm.loss.forward import response_logps
from llm.loss.objectives import DPOObjective, SFTObjective
from llm.loss.packing import pack_preference, pack_sft

TURNS = [([3, 4, 5], [6, 7]), ([8, 9], [10]), ([11, 12, 13], [14, 15, 16])]
"""(what the user writes, what the assistant answers), in tokens."""


def row_of(turns: list[tuple[list[int], list[int]]], key: str = "completion") -> dict[str, Any]:
    """All turns as one row: the response begins with the first answer."""
    (prompt, ids), mask = turns[0], [1] * len(turns[0][1])
    for user, answer in turns[1:]:
        ids = ids + user + answer
        mask = mask + [0] * len(user) + [1] * len(answer)
    return {"prompt_ids": prompt, f"{key}_ids": ids, f"{key}_mask": mask}


def single_turns() -> list[tuple[list[int], list[int]]]:
    """(everything in front of an answer, the answer), one pair for each."""
    before: list[int] = []
    pairs = []
    for user, answer in TURNS:
        pairs.append((before + user, answer))
        before = before + user + answer
    return pairs


def plain_loss(model: Any, prompt: list[int], answer: list[int]) -> float:
    """The sum over an answer's tokens, from transformers' own loss (their mean)."""
    ids = torch.tensor([prompt + answer])
    labels = torch.tensor([[-100] * len(prompt) + answer])
    return float(model(input_ids=ids, labels=labels).loss) * len(answer)


@pytest.mark.parametrize("packing", [True, False])
@torch.no_grad()
def test_the_loss_of_a_conversation_is_the_sum_over_its_answers(packing: bool) -> None:
    model = make_model().eval()
    objective = SFTObjective(packing=packing)
    rows = [row_of(TURNS), row_of(TURNS[:1])]
    expected = sum(plain_loss(model, *pair) for pair in single_turns())
    expected += plain_loss(model, *TURNS[0])
    total = float(objective(model, objective.collate(rows, 0)).total)
    assert total == pytest.approx(expected, rel=FLOAT32)
    assert objective.items(rows) == 6 + 2


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_packed_and_padded_batches_train_on_the_same_tokens(masks: list[list[bool]]) -> None:
    rows = [
        {
            "prompt_ids": [3, 4],
            "completion_ids": list(range(5, 6 + len(mask))),
            "completion_mask": [1, *map(int, mask)],
        }
        for mask in masks
    ]
    model = make_model().eval()
    packed = response_logps(model, pack_sft(rows))
    padded = response_logps(model, collate_sft(rows, 0))
    assert packed.values.tolist() == pytest.approx(padded.values.tolist(), rel=FLOAT32)
    assert packed.lengths().tolist() == [sum(row["completion_mask"]) for row in rows]


@torch.no_grad()
def test_a_pair_may_hold_turns_of_others_in_its_responses() -> None:
    chosen, rejected = row_of(TURNS, "chosen"), row_of([TURNS[0], ([20, 21], [22])], "rejected")
    row = chosen | rejected | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    model = make_model().eval()
    packed = response_logps(model, pack_preference([row])).sums()
    padded = response_logps(model, collate_preference([row], 0)).sums()
    expected = -sum(plain_loss(model, *pair) for pair in single_turns())
    assert packed.tolist() == pytest.approx(padded.tolist(), rel=FLOAT32)
    assert float(packed[0]) == pytest.approx(expected, rel=FLOAT32)
    assert DPOObjective().items([row]) == 1
