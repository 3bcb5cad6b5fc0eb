"""What is random in a forward pass of the training, for each objective as it should be.

Dropout belongs to demonstrations. A preference is a difference of two log-probabilities from those
of a reference without dropout: with it, a policy does not start at log 2 against itself. So it is
off where the preference objective is computed (`--disable_dropout`, TRL's name and default).

NEFTune (arXiv 2310.05914) adds to each embedding uniform noise of alpha / sqrt(L H), with L the
length of the row and H the width. Here L is that of the token's own row, whatever is packed or
padded beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

RANDOM = ("drop", "jitter")
"""Parts of the names under which models keep the rates of what is random in training."""


class Dropout:
    """All rates of dropout (and of a router's jitter) in a model, to be switched as one."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.on = True
        self.rates = [
            (module, name, value)
            for module in model.modules()
            for name, value in vars(module).items()
            if isinstance(value, float) and value > 0.0 and _is_rate(module, name)
        ]

    def switch(self, on: bool) -> None:
        if on != self.on:
            for module, name, value in self.rates:
                setattr(module, name, value if on else 0.0)
        self.on = on


def _is_rate(module: torch.nn.Module, name: str) -> bool:
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return name == "p"
    return any(part in name for part in RANDOM)


class EmbeddingNoise:
    """NEFTune with the strength `alpha`; `batch` is what the model sees next."""

    def __init__(self, alpha: float | None) -> None:
        self.alpha = alpha
        self.batch: Mapping[str, Any] = {}

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Inside, the embeddings of `model` are noisy in training mode."""
        if self.alpha is None:
            yield
            return
        handle = model.get_input_embeddings().register_forward_hook(self._add)
        try:
            yield
        finally:
            handle.remove()

    def _add(self, module: torch.nn.Module, _: Any, output: Tensor) -> Tensor:
        if not module.training or self.alpha is None:
            return output
        lengths = row_lengths(self.batch).to(output.device)
        scale = self.alpha / (lengths * output.shape[-1]).sqrt()[..., None]
        return output + (scale * (2.0 * torch.rand_like(output) - 1.0)).to(output.dtype)


def row_lengths(batch: Mapping[str, Any]) -> Tensor:
    """For each token of a batch (B, T) the length of its row: (B, T) packed, (B, 1) padded."""
    if "plan" not in batch:
        lengths: Tensor = batch["attention_mask"].sum(1, keepdim=True)
        return lengths
    plan = batch["plan"]
    own, whole = (torch.tensor(lengths) for lengths in (plan.lengths, plan.key_lengths))
    return whole.repeat_interleave(own)[None]
