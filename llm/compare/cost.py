"""What a run cost, counted in forward passes of one SFT step (`theory.costs`).

A forward pass costs its tokens, a backward pass twice as much (LoRA: as much, since the frozen
weights get no gradient); log-probabilities of the reference are computed before training and cost
nothing here. Attention's quadratic part and padding are left out: on one batch shape they change
both objectives alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from llm.compare.runs import Record
from llm.flags.arguments import RunConfig
from llm.flags.checks import is_adapter
from llm.loss.packing import row_tokens
from llm.setup import Setup
from llm.train.values import DEFAULT_ROWS
from theory.costs import Costs
from theory.tasks import Task


@dataclass(frozen=True)
class CostModel:
    """`costs` per step and probe; `reuse`: a probe's winner trains on the probe's forward pass."""

    costs: Costs
    reuse: bool
    pair: float
    """Forward pass of a DPO step, in those of an SFT step."""

    def step(self, task: Task) -> float:
        return self.costs.dpo if task == Task.DPO else self.costs.sft

    def total(self, record: Record) -> float:
        """Cost of a finished run from its own counts of steps, probes and probes' winners."""
        steps = sum(n * self.step(Task[label.upper()]) for label, n in record["steps"].items())
        wins = record["probe_dpo_wins"]
        saved = wins * self.pair + (record["probes"] - wins) if self.reuse else 0.0
        return float(steps + record["probes"] * self.costs.probe - saved)

    def to_json(self) -> dict[str, Any]:
        own = {"sft_step": self.costs.sft, "dpo_step": self.costs.dpo, "probe": self.costs.probe}
        return own | {"probe_is_reused": self.reuse, "unit": "forward pass of one SFT step"}


def measured_costs(config: RunConfig, setup: Setup, records: Sequence[Record]) -> CostModel:
    """From the tokens that runs trained on: `records` together step on both objectives."""
    training = config.training
    backward = 1.0 if config.model.use_peft or is_adapter(config.model.model_name_or_path) else 2.0
    tokens = {task: _per_step(records, "tokens", task) for task in Task}
    pair = tokens[Task.DPO] / tokens[Task.SFT] * _repeated_prompts(setup)
    sft_probe, dpo_probe = 1.0, pair
    reads_batch = training.value_source in (None, "train")
    if not reads_batch:
        rows = training.value_rows or DEFAULT_ROWS
        sft_probe = rows / _per_step(records, "rows", Task.SFT)
        dpo_probe = pair * rows / _per_step(records, "rows", Task.DPO)
    costs = Costs(
        sft=1.0 + backward,
        dpo=pair * (1.0 + backward),
        probe=sft_probe + dpo_probe,
        sft_forward=sft_probe,
    )
    return CostModel(costs, reads_batch and training.gradient_accumulation_steps == 1, pair)


def _per_step(records: Sequence[Record], name: str, task: Task) -> float:
    """Tokens or rows of a step on `task`, over all runs."""
    total = sum(record[name].get(task.label, 0) for record in records)
    return total / sum(record["steps"].get(task.label, 0) for record in records)


def _repeated_prompts(setup: Setup) -> float:
    """Tokens of the pairs as they are computed, per token counted: the count has prompts once."""
    if setup.objectives[Task.DPO].packing:
        return 1.0
    rows = setup.train[Task.DPO].rows
    once = fmean(row_tokens(row) for row in rows)
    return (once + fmean(len(row["prompt_ids"]) for row in rows)) / once
