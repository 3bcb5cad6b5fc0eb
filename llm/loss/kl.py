"""How far the policy has moved from the reference: KL(ref || pi), in nats per sequence.

Completions y ~ ref are drawn once, before training, and log ref(y|x) is kept. Then

    KL(ref || pi) = E_{y ~ ref} [log ref(y|x) - log pi(y|x)]

is estimated without bias at every evaluation by one forward pass of the policy, with no reference
in memory. The other direction, KL(pi || ref), would need new samples from the policy, and the
reference to score them, at every evaluation. This direction is large where the policy has lost what
the reference does, that is, where it forgets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llm.loss.evaluate import by_length, device_of, evaluating
from llm.loss.forward import response_logps
from llm.loss.objectives import Row, SFTObjective, move


@dataclass(frozen=True)
class ReferenceSamples:
    """Rows with `prompt_ids`, `completion_ids` (y ~ ref) and `ref_logps` = log ref(y|x)."""

    rows: tuple[Row, ...]
    packing: bool = True

    def kl(self, model: torch.nn.Module, *, batch_size: int, pad_token_id: int) -> dict[str, float]:
        """KL(ref || pi) of `model`, nats per sequence; `_se` its standard error; `_per_token`."""
        logps = score(model, self.rows, batch_size, pad_token_id, self.packing)
        ratios = torch.tensor([row["ref_logps"] for row in self.rows]).double() - logps
        tokens = sum(len(row["completion_ids"]) for row in self.rows)
        values = {
            "kl_reference": float(ratios.mean()),
            "kl_reference_per_token": float(ratios.sum()) / tokens,
        }
        if len(ratios) > 1:
            values["kl_reference_se"] = float(ratios.std(correction=1)) / math.sqrt(len(ratios))
        return values


@torch.no_grad()
def score(
    model: torch.nn.Module, rows: Sequence[Row], batch_size: int, pad_token_id: int, packing: bool
) -> torch.Tensor:
    """log pi(y|x) of each row, in the order of the rows: float64 on the host."""
    objective, parts, order = SFTObjective(packing), [], []
    with evaluating(model):
        for chunk in by_length(range(len(rows)), rows, batch_size):
            batch = objective.collate([rows[i] for i in chunk], pad_token_id)
            parts.append(response_logps(model, move(batch, device_of(model))).sums())
            order += list(chunk)
    logps = torch.empty(len(rows), dtype=torch.float64)
    logps[order] = torch.cat(parts).double().cpu()
    return logps
