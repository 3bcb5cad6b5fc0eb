"""The operations that a row is worth, against torch's own count and by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from _tiny import PAD_ID, make_policy
from torch.utils.flop_counter import FlopCounterMode

from llm.benchmark.goodput import Work
from llm.benchmark.rows import Sources, make_rows
from llm.benchmark.shapes import SHAPES
from llm.loss.objectives import DPOObjective, SFTObjective
from theory.tasks import Task

TINY = SHAPES["tiny"]


@pytest.mark.parametrize("task", Task)
def test_the_operation_counts_are_those_of_the_matrix_products(task: Task) -> None:
    """Of a packed forward and backward, as torch counts them; attention is left out of both."""
    rows, objective = (
        make_rows(task, 4, TINY, Sources()),
        DPOObjective() if task == Task.DPO else SFTObjective(),
    )
    torch.manual_seed(0)
    policy = make_policy(max_position_embeddings=TINY.max_length, vocab_size=TINY.vocab_size)
    batch_rows = [row | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in rows]
    batch = objective.collate(batch_rows, PAD_ID)
    with FlopCounterMode(display=False) as counter:
        objective(policy, batch).total.backward()
    products = counter.get_flop_counts()["Global"]
    counted = sum(n for op, n in products.items() if str(op) in ("aten.mm", "aten.addmm"))
    no_attention = replace(Work.of(TINY), layers=0)
    assert counted == sum(map(no_attention.lean, rows))


def test_the_operation_counts_by_hand() -> None:
    """P = 2, C = 3, R = 4; N_b = 100, N_h = 10, L d = 6."""
    work = Work(backbone=100, head=10, layers=2, width=3)
    pair = {"prompt_ids": [1] * 2, "chosen_ids": [1] * 3, "rejected_ids": [1] * 4}
    demonstration = {"prompt_ids": [1] * 2, "completion_ids": [1] * 3}
    assert work.lean(demonstration) == 3 * (200 * 5 + 20 * 3 + 12 * 25)
    assert work.lean(pair) == 3 * (200 * 9 + 20 * 7 + 12 * (25 + 36 - 4))
    assert work.naive(pair) == 4 * (220 * 11 + 12 * (25 + 36))
    lora = replace(work, passes=2)
    assert lora.lean(pair) == pytest.approx(2 / 3 * work.lean(pair), rel=1e-15)
    # Of the prompt only its end predicts a response token, and the end of a response predicts none.
    trimmed = replace(work, last_mlp=7)
    assert work.lean(demonstration) - trimmed.lean(demonstration) == 3 * 14 * 2
    assert work.lean(pair) - trimmed.lean(pair) == 3 * 14 * 3


def test_weights_of_a_large_shape_are_counted_without_being_made() -> None:
    """Llama-3-8B: 8.03 billion parameters, of which the two embeddings have 0.525 each."""
    work = Work.of(SHAPES["llama-3-8b"])
    assert work.head == 128256 * 4096
    assert work.backbone == 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert work.passes == 2
