"""The two objectives bound to a model: batches in, sums of losses out.

The counterpart of `theory.objectives` for language models. An objective returns sums over its items
(response tokens for SFT, pairs for DPO), so that micro-batches, ranks and evaluation batches add
up exactly; the caller divides by the number of items of the whole step or data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from llm.loss.collate import collate_preference, collate_sft
from llm.loss.forward import response_logps
from llm.loss.losses import check_preference_options, dpo_loss
from llm.loss.packing import pack_preference, pack_sft, to_device, trained_tokens
from theory.tasks import Task

Batch = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Terms:
    """Sums over one batch: `total` carries the gradient, everything in `sums` is detached.

    `sums` maps a metric to (sum, count): its mean over batches is sum of sums / sum of counts.
    """

    total: Tensor
    sums: dict[str, tuple[Tensor, int]] = field(default_factory=dict)


class LanguageObjective(Protocol):
    """What the trainer, the probe and the evaluation need of an objective."""

    @property
    def task(self) -> Task: ...

    @property
    def packing(self) -> bool:
        """Whether its batches are packed (`llm.loss.packing`)."""
        ...

    def collate(self, rows: Sequence[Row], pad_token_id: int) -> Batch: ...

    def items(self, rows: Sequence[Row]) -> int:
        """Number of items that the loss is a mean over, from the rows alone."""
        ...

    def __call__(self, model: torch.nn.Module, batch: Batch) -> Terms: ...


@dataclass(frozen=True)
class SFTObjective:
    """f_SFT: items are trained response tokens; `sequence_loss` is the mean over examples (theory).

    `packing` chooses packed batches (`llm.loss.packing`) over padded ones; the values are the same.
    """

    packing: bool = True
    task: Task = Task.SFT

    def collate(self, rows: Sequence[Row], pad_token_id: int) -> Batch:
        return (pack_sft if self.packing else collate_sft)(rows, pad_token_id)

    def items(self, rows: Sequence[Row]) -> int:
        return sum(trained_tokens(row, "completion") for row in rows)

    def __call__(self, model: torch.nn.Module, batch: Batch) -> Terms:
        logps = response_logps(model, batch)
        total = -logps.values.sum()
        return Terms(total, {"sequence_loss": (total.detach(), logps.count)})


@dataclass(frozen=True)
class DPOObjective:
    """f_DPO with precomputed reference log-probabilities in the rows: items are pairs.

    `packing` as in `SFTObjective`.
    """

    beta: float = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    packing: bool = True
    task: Task = Task.DPO

    def __post_init__(self) -> None:
        check_preference_options(self.loss_type, self.beta, self.label_smoothing)

    def collate(self, rows: Sequence[Row], pad_token_id: int) -> Batch:
        return (pack_preference if self.packing else collate_preference)(rows, pad_token_id)

    def items(self, rows: Sequence[Row]) -> int:
        return len(rows)

    def __call__(self, model: torch.nn.Module, batch: Batch) -> Terms:
        logps = response_logps(model, batch)
        chosen, rejected = logps.sums().chunk(2)
        chosen_lengths, rejected_lengths = logps.lengths().chunk(2)
        terms = dpo_loss(
            chosen,
            rejected,
            batch["ref_chosen_logps"],
            batch["ref_rejected_logps"],
            beta=self.beta,
            loss_type=self.loss_type,
            label_smoothing=self.label_smoothing,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
        )
        margins = terms.chosen_rewards - terms.rejected_rewards
        metrics = {
            # A tie is half right: 0.5 where the policy is still its own reference.
            "reward_accuracy": 0.5 * (margins.sign() + 1.0),
            "reward_margin": margins,
            "chosen_logps": chosen.detach(),
            "rejected_logps": rejected.detach(),
        }
        sums = {name: (values.sum(), len(values)) for name, values in metrics.items()}
        return Terms(terms.losses.sum(), sums)


def pair_logps(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """log pi(y_w|x) and log pi(y_l|x) of each pair: two tensors of shape (B,)."""
    chosen, rejected = response_logps(model, batch).sums().chunk(2)
    return chosen, rejected


def move(batch: Batch, device: torch.device) -> Batch:
    """The tensors of a batch on `device`; the rest of it as it is."""
    return {
        name: to_device(value, device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
