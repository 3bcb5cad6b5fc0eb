"""The paper's way of a step, as the baseline: what the authors' code does, on a plain Trainer.

Both objectives' batches are drawn, padded and moved at every step, whatever the step trains on. The
reference is a second model that runs at every DPO step. Logits of all positions go through a
log-softmax over the vocabulary. MAXRIGHT evaluates both objectives without gradients and then runs
the chosen one forward again. (arXiv 2410.15483, section 6
and the code that comes with it; none of that code is here.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer

from llm.loss.collate import collate_preference, collate_sft
from llm.loss.losses import IGNORE_INDEX
from llm.loss.objectives import Batch, Row, move
from llm.train.streams import SampleStream
from theory.scheduling import Answers, Scheduler
from theory.tasks import Task

BETA = 0.1


class PaperTrainer(Trainer):
    """Steps as above. `reference` is frozen; `decisions` and `probes` as in `JointTrainer`."""

    def __init__(
        self,
        *,
        reference: PreTrainedModel,
        scheduler: Scheduler,
        train_rows: Mapping[Task, Sequence[Row]],
        batch_sizes: Mapping[Task, int],
        pad_token_id: int,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.model_accepts_loss_kwargs = False
        self.reference = reference.eval().requires_grad_(False)
        self.scheduler, self.schedule = scheduler, scheduler.init()
        self.train_rows, self.pad_token_id = dict(train_rows), pad_token_id
        self.streams = {
            task: SampleStream(task, len(rows), batch_sizes[task], self.args.seed)
            for task, rows in self.train_rows.items()
        }
        self.decisions: list[list[float]] = []
        self.probes = 0

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(range(self.args.max_steps))  # type: ignore[arg-type]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], None]:
        next(epoch_iterator)
        return [{task.label: self._draw(task, device) for task in self.streams}], None

    def _draw(self, task: Task, device: torch.device) -> Batch:
        (numbers,) = self.streams[task].peek(1)
        self.streams[task].advance(1)
        rows = [self.train_rows[task][i] for i in numbers]
        collate = collate_preference if task == Task.DPO else collate_sft
        return move(collate(rows, self.pad_token_id), device)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        probe = Answers(lambda: self._probe(model, inputs))
        weights, state = self.scheduler.select(self.schedule, probe)
        self.schedule = self.scheduler.observe(state)
        self.decisions.append(weights.tolist())
        stepped = [task for task in Task if weights[task]]
        terms = [weights[task] * self.loss_of(task, model, inputs[task.label]) for task in stepped]
        return torch.stack(terms).sum()

    @torch.no_grad()
    def _probe(self, model: torch.nn.Module, inputs: dict[str, Any]) -> NDArray[np.float64]:
        self.probes += 1
        return np.array([self.loss_of(task, model, inputs[task.label]).item() for task in Task])

    def loss_of(self, task: Task, model: torch.nn.Module, batch: Batch) -> Tensor:
        """f_SFT (mean over tokens) or f_DPO (mean over pairs) of a padded batch."""
        if task == Task.SFT:
            return -all_logps(model, batch).sum() / (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
        policy = all_logps(model, batch).sum(-1)
        with torch.no_grad():
            reference = all_logps(self.reference, batch).sum(-1)
        chosen, rejected = (policy - reference).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def all_logps(model: torch.nn.Module, batch: Batch) -> Tensor:
    """log pi of the labelled tokens, 0 elsewhere: (B, T-1), by way of (B, T-1, V)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["labels"][:, 1:]
    mask = targets != IGNORE_INDEX
    logps = logits[:, :-1].float().log_softmax(-1)
    picked = logps.gather(-1, targets.masked_fill(~mask, 0).unsqueeze(-1)).squeeze(-1)
    return picked * mask


def second_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights once more: of a policy and its reference, neither may change the other."""
    return copy.deepcopy(model)
