"""Where a schedule that compares losses (MAXRIGHT) gets them from; as `theory.values`.

train     the batches that the next step of each objective would train on; between two probes the
          loss of the stepped batch renews the value of its objective (`same` in the theory). The
          winner's forward pass is the one of its step, so a probe costs the loser's alone (with
          gradient accumulation both); in training mode. Free of extra data, but noisy,
          and the larger of two noisy values is biased upwards.
held_out  the same rows at every probe, in no training set (`set_aside`) and in no report. Between
          two probes the values stay: a training loss is another mean over other rows, and mixing
          the two would compare unlike things. So a decision holds for `refresh_every` steps.

Held-out values do not flatter an objective that has been seen often, and have no noise from step to
step; the price is `value_rows` forward passes of each objective a probe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm.loss.evaluate import by_length, device_of, evaluating
from llm.loss.objectives import LanguageObjective, Row, move
from theory.cli import UserError
from theory.scheduling import Scheduler
from theory.tasks import Task

SOURCES = ("train", "held_out")
DEFAULT_ROWS = 64


def check_value_options(source: str | None, rows: int | None) -> None:
    """Refuse an unknown `--value_source`, and `--value_rows` that are not used or not positive."""
    if source not in (None, *SOURCES):
        raise UserError(f"--value_source is {source}; it is one of {', '.join(SOURCES)}")
    if rows is not None and source != "held_out":
        raise UserError("--value_rows is not used without --value_source held_out")
    if rows is not None and rows < 1:
        raise UserError(f"--value_rows is {rows}; it must be at least 1")


def set_aside(rows: Sequence[Row], count: int, seed: int, name: str) -> tuple[list[Row], list[Row]]:
    """(rows to train on, `count` rows to probe on): random, the same for the same seed.

    No row that is trained on equals a row that is probed on: copies are left out of both.

    Raises:
        UserError: if nothing is left to train on.
    """
    order = np.random.default_rng([seed, 20250221]).permutation(len(rows))[:count]
    aside = [rows[i] for i in sorted(order.tolist())]
    probed = {_content(row) for row in aside}
    kept = [row for row in rows if _content(row) not in probed]
    if not kept:
        raise UserError(f"--value_rows {count} leaves none of the {len(rows)} {name} rows to train")
    return kept, aside


def split_values(
    arguments: Any, scheduler: Scheduler, train_rows: Mapping[Task, Sequence[Row]]
) -> tuple[dict[Task, Sequence[Row]], dict[Task, Sequence[Row]]]:
    """(rows to train on, rows to probe on) as `--value_source` says; the latter may be none."""
    train, probed = dict(train_rows), dict[Task, Sequence[Row]]()
    if scheduler.probes_losses and getattr(arguments, "value_source", None) == "held_out":
        count = DEFAULT_ROWS if arguments.value_rows is None else arguments.value_rows
        for task, rows in train_rows.items():
            train[task], probed[task] = set_aside(rows, count, arguments.seed, task.label)
    return train, probed


def _content(row: Row) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row[key]) for key in sorted(row) if key.endswith("_ids"))


def share_of_rank(
    rows: Sequence[Row], batch_size: int, rank: int, world_size: int
) -> list[list[Row]]:
    """Batches of this rank's part of the rows; all parts together are the rows."""
    mine = rows[rank::world_size]
    return [[mine[i] for i in batch] for batch in by_length(range(len(mine)), mine, batch_size)]


def copied_early(values: Tensor) -> Callable[[], NDArray[np.float64]]:
    """What reads `values` on the host; it waits for the work before this call, not after it.

    So the losses of a step are known while its backward pass still runs on the device.
    """
    host, copied = values, None
    if values.is_cuda:
        host = torch.empty_like(values, device="cpu", pin_memory=True)
        host.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

    def read() -> NDArray[np.float64]:
        if copied is not None:
            copied.synchronize()
        return host.double().numpy()

    return read


@torch.no_grad()
def summed_loss(
    model: torch.nn.Module,
    objective: LanguageObjective,
    batches: Iterable[Sequence[Row]],
    pad_token_id: int,
) -> Tensor:
    """(sum of the losses, number of items) over the batches: (2,), on the device, not read."""
    device = device_of(model)
    total, items = torch.zeros((), device=device), 0
    with evaluating(model):
        for rows in batches:
            batch = move(objective.collate(rows, pad_token_id), device)
            total = total + objective(model, batch).total
            items += objective.items(rows)
    # torch.full fills on the device, where torch.tensor would wait for a copy.
    return torch.stack([total.float(), torch.full((), float(items), device=device)])
