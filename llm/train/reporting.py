"""What a run measures of itself: held-out values, and the log lines of both objectives.

Names, as transformers' trackers show them (`train/...`, `eval/...`); X is dpo or sft:

X_loss, dpo_reward_accuracy, ...    means of what was trained on since the last line
X_grad_norm                         norm of grad f_X before clipping, in steps on X alone
X_steps, X_tokens                   since the start; tokens of the rows drawn, on all ranks, each
                                    prompt once and without padding
time_data, time_forward, ...        shares of the time since the last line (`llm.train.meters`)
eval_X_loss, ...                    the same on held-out rows
eval_kl_reference                   KL(ref || policy) in nats per response (`llm.loss.kl`)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from llm.loss.evaluate import evaluate_objective, held_out_summary
from llm.loss.kl import ReferenceSamples
from llm.loss.objectives import LanguageObjective, Row
from llm.train.steps import ScheduledSteps
from theory.cli import UserError
from theory.tasks import Task

Objectives = Mapping[Task, LanguageObjective]
RowSets = Mapping[Task, Sequence[Row]]


class ReportingTrainer(ScheduledSteps):
    """A Trainer that evaluates, logs and counts per objective; the device is read when it logs."""

    objectives: dict[Task, LanguageObjective]
    pad_token_id: int
    reference_samples: ReferenceSamples | None
    steps_taken: dict[Task, int]
    tokens_seen: dict[Task, int]
    _tokens_drawn: dict[Task, int]

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Held-out values of every objective with data: `eval_dpo_loss`, `eval_sft_loss`, ..."""
        metrics = self.held_out(eval_dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def held_out(self, row_sets: RowSets | None = None) -> dict[str, float]:
        """Values on the held-out rows and the KL to the reference, computed without logging."""
        row_sets = cast(RowSets, self.eval_dataset if row_sets is None else row_sets)
        options = {
            "batch_size": self.args.per_device_eval_batch_size,
            "pad_token_id": self.pad_token_id,
        }
        # Before training the model does not yet run in mixed precision by itself.
        with (
            self.clock.phase("evaluation"),
            self.accelerator.autocast(),
            self.averaged_weights(),
        ):
            values = {
                task: evaluate_objective(self.model, self.objectives[task], rows, **options)
                for task, rows in (row_sets or {}).items()
            }
            summary = held_out_summary(values)
            if self.reference_samples is not None:
                summary |= self.reference_samples.kl(self.model, **options)
        for name, value in summary.items():
            self._check_finite(f"held-out {name}", value)
        return summary

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metered means of each objective; stop on a loss that is not a number."""
        if "loss" in logs:
            logs |= self._since_last_log()
        for name in ("loss", "train_loss"):  # of a log line, and of the whole run at its end
            self._check_finite("loss", logs.get(name, 0.0))
        super().log(logs, start_time)

    def _check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise UserError(
                f"the {name} is {value} at step {self.state.global_step}: lower --learning_rate, "
                "or check the data (training stopped)"
            )

    def _meter(self, task: Task, sums: Mapping[str, tuple[torch.Tensor, int]]) -> None:
        for name, (total, count) in sums.items():
            self.meters.add(f"{task.label}_{name}", total, count)

    def _since_last_log(self) -> dict[str, float]:
        """Means and shares of the time since the last log; steps and tokens since the start."""
        logs = self.meters.drain(self._sum_over_ranks)
        self._count_tokens()
        for name, counts in (("steps", self.steps_taken), ("tokens", self.tokens_seen)):
            logs |= {f"{task.label}_{name}": float(count) for task, count in counts.items()}
        return logs | {f"time_{phase}": share for phase, share in self.clock.shares().items()}

    def _count_tokens(self) -> None:
        """Move what the ranks have drawn into `tokens_seen`, which is the same on all of them."""
        drawn = torch.tensor(list(self._tokens_drawn.values()), device=self.args.device)
        for task, count in zip(
            self._tokens_drawn, self._sum_over_ranks(drawn).tolist(), strict=True
        ):
            self.tokens_seen[task] += count
            self._tokens_drawn[task] = 0
