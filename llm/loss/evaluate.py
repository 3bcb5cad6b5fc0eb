"""Values of an objective on a whole data set, and the reference's log-probabilities.

Both walk over the rows in order of length (little padding) with the model in evaluation mode and
without gradients. Means are over all items of the data set, whatever the batches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from llm.loss.collate import collate_preference
from llm.loss.objectives import LanguageObjective, Row, move, pair_logps
from llm.loss.packing import pack_preference
from theory.tasks import Task


@torch.no_grad()
def evaluate_objective(
    model: torch.nn.Module,
    objective: LanguageObjective,
    rows: Sequence[Row],
    *,
    batch_size: int,
    pad_token_id: int,
) -> dict[str, float]:
    """The loss (mean over items) and the metrics of `objective` on `rows`.

    Keys: `loss`, then the names in `Terms.sums`; nats for losses and log-probabilities.
    """
    sums: dict[str, list[torch.Tensor]] = defaultdict(list)
    counts: dict[str, int] = defaultdict(int)
    with evaluating(model):
        for chunk in by_length(range(len(rows)), rows, batch_size):
            batch_rows = [rows[i] for i in chunk]
            batch = move(objective.collate(batch_rows, pad_token_id), device_of(model))
            terms = objective(model, batch)
            totals = {"loss": (terms.total, objective.items(batch_rows))} | terms.sums
            for name, (total, count) in totals.items():
                sums[name].append(total)
                counts[name] += count
    # The device is read once; the sums over many batches are double precision.
    table = torch.stack([torch.stack(parts) for parts in sums.values()]).cpu().double().sum(1)
    return {name: total / counts[name] for name, total in zip(sums, table.tolist(), strict=True)}


@torch.no_grad()
def with_reference_logps(
    reference: torch.nn.Module,
    rows: Sequence[Row],
    *,
    batch_size: int,
    pad_token_id: int,
    packing: bool = True,
) -> list[Row]:
    """The rows with `ref_chosen_logps` and `ref_rejected_logps`, computed once (nats)."""
    collate = pack_preference if packing else collate_preference
    objective_rows: list[Row] = [dict(row) for row in rows]
    order, logps = list[int](), [torch.zeros(2, 0, device=device_of(reference))]
    with evaluating(reference):
        for chunk in by_length(range(len(rows)), rows, batch_size):
            batch = collate([objective_rows[i] for i in chunk], pad_token_id)
            logps.append(torch.stack(pair_logps(reference, move(batch, device_of(reference)))))
            order += chunk
    # The device is read once: it does not wait for the host between two batches.
    for i, (chosen, rejected) in zip(order, torch.cat(logps, dim=1).T.tolist(), strict=True):
        objective_rows[i] |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return objective_rows


def held_out_summary(metrics: dict[Task, dict[str, float]]) -> dict[str, float]:
    """Flat names: `dpo_loss`, `sft_loss`, `dpo_reward_margin`, `sft_sequence_loss`, ..."""
    return {
        f"{task.label}_{name}": value
        for task, values in metrics.items()
        for name, value in values.items()
    }


def by_length(
    indices: Sequence[int], rows: Sequence[Row], batch_size: int
) -> Iterator[Sequence[int]]:
    """Batches of row numbers in order of their longest sequence."""
    order = sorted(indices, key=lambda i: (row_length(rows[i]), i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def row_length(row: Row) -> int:
    """Tokens of the longest sequence of a row."""
    responses = [len(ids) for key, ids in row.items() if key.endswith("_ids") and key[0] != "p"]
    return len(row["prompt_ids"]) + max(responses)


def device_of(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[Any]:
    """Evaluation mode inside (dropout off), the former mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)
