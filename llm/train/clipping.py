"""Gradient clipping that leaves the weights between the objectives alone.

Trainers clip every step by itself. Under a schedule with one objective per step that clips each
objective by itself: where DPO's gradients are ten times larger, only they are shortened, and the
run serves another lam than the lam it was given (measured in `theory.beyond.clipping`).

`global` shortens all steps by one factor,

    c = min(1, max_grad_norm / max(n, n_DPO, n_SFT)),

with n the norm of this step and n_i the running norm of the steps on objective i. So c is the same
for both objectives up to the noise of n, their ratio survives, and no step is longer than
max_grad_norm. A step on objective i is w_i grad f_i (w_i = 1 unless importance sampling or
`scale_steps` weigh it): n_i is the norm of that, since the steps' lengths make up f_Mix.

With one objective there is no ratio to keep, and a step of Mix holds both: these are clipped as
everywhere, c = min(1, max_grad_norm / n). The stages of a sequence are separate runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from theory.tasks import Task

CLIPPING = ("global", "per_step")
RATE = 0.05
"""Weight of a new norm against the running one: a memory of about 20 steps on the objective."""
OUTLIER = 4.0
"""A norm counts as at most this many times the running one: one explosion must not freeze a run."""


class StepNorms:
    """Running norm of the steps on each objective, on the device; 0 before its first step."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(len(Task), device=device)

    def reference(self, task: Task, norm: Tensor) -> Tensor:
        """max(n, n_DPO, n_SFT), or n while only one objective has been stepped on.

        `norm` n, of a step on `task`, enters the running norms first; a scalar, it stays on its
        device. An infinity or NaN (an overflow in float16, a step that the loss scaler skips) does
        not enter.
        """
        xp: Any = torch
        n: Any = norm.detach().to(self.values)  # gradients may be offloaded, or in half precision
        values: Any = self.values
        if values.device.type == "cpu":  # NumPy's scalars cost a fraction of one-element tensors
            xp, n, values = np, n.numpy(), values.numpy()
        old, other = values[task], values[task.other]
        moved = old + RATE * (xp.minimum(n, OUTLIER * old) - old)
        new = xp.where(old > 0.0, moved, n)
        values[task] = xp.where(xp.isfinite(n), new, old)
        longest = xp.maximum(n, values.max())
        return torch.as_tensor(xp.where(other > 0.0, longest, n))

    def forget(self) -> None:
        """Start anew, as at the boundary of two stages."""
        self.values = torch.zeros_like(self.values)

    def to_json(self) -> dict[str, float]:
        return dict(zip((task.label for task in Task), self.values.tolist(), strict=True))

    def restore(self, saved: dict[str, Any]) -> None:
        norms = [float(saved[task.label]) for task in Task]
        self.values = torch.tensor(norms, device=self.values.device)
