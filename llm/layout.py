"""Packed or padded batches: what the flags ask for, and what the model can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llm.data.encode import Encoded
from llm.flags.parse import RunConfig
from llm.loss.evaluate import by_length, evaluating
from llm.loss.forward import packing_problem
from llm.loss.objectives import DPOObjective, SFTObjective, move
from llm.model.reference import mixed_precision
from theory.cli import UserError
from theory.tasks import Task


def takes_packed_batches(
    config: RunConfig,
    policy: Any,
    train: Mapping[Task, Encoded],
    pad_token_id: int,
    say: Callable[[str], None],
) -> bool:
    """Whether to pack: `--packing`, unless the model gives other values then (which is said).

    Raises:
        UserError: if it does, and `--max_tokens_per_batch` needs packing.
    """
    training = config.training
    if not training.packing:
        return False
    task, encoded = next(iter(train.items()))
    chosen = next(iter(by_length(range(len(encoded.rows)), encoded.rows, 2)))
    rows = [encoded.rows[i] for i in chosen]
    kind = DPOObjective if task == Task.DPO else SFTObjective
    policy.to(device=training.device)
    packed, padded = (
        move(kind(packing=packing).collate(rows, pad_token_id), training.device)
        for packing in (True, False)
    )
    with evaluating(policy), mixed_precision(training):
        problem = packing_problem(policy, packed, padded)
    if problem is None:
        return True
    if training.max_tokens_per_batch is not None:
        raise UserError(f"--max_tokens_per_batch needs packing, and this model has none: {problem}")
    say(f"batches are padded, not packed: {problem}")
    return False
