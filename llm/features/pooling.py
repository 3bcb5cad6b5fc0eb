"""One pass of the frozen model over sequences: pooled hidden states and log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from llm.loss.collate import collate_sft
from llm.loss.evaluate import by_length, device_of, evaluating, row_length
from llm.loss.forward import LOGITS_BYTES
from llm.loss.losses import IGNORE_INDEX, token_logps
from llm.loss.objectives import Row, move
from theory.cli import UserError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Pooled:
    """What N responses are to a model."""

    hidden: Array
    """(N, width): the mean of the last hidden state over the tokens of the response."""
    logps: Array
    """(N,): log pi(y|x), the sum over the tokens of the response, nats."""
    lengths: NDArray[np.int64]
    """(N,): tokens of the response."""


@torch.no_grad()
def pool(
    model: Any, rows: Sequence[Row], *, batch_size: int, pad_token_id: int, name: str
) -> Pooled:
    """Pool rows of `prompt_ids` and `completion_ids`, in the order of the rows.

    An empty prompt is allowed: everything is response then, and its first token has no
    log-probability. Batches hold at most `batch_size` rows and `LOGITS_BYTES` of float32 logits.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    order: list[int] = []
    vocabulary = model.config.get_text_config().vocab_size
    tokens = max(1, LOGITS_BYTES // (4 * vocabulary))
    # The bar appears only if the work takes more than a second.
    with evaluating(model), tqdm(total=len(rows), desc=name, delay=1, leave=False) as bar:
        for chunk in _batches(rows, batch_size, tokens):
            batch = collate_sft([rows[i] for i in chunk], pad_token_id)
            parts.append(_pool(model, move(batch, device_of(model))))
            order += chunk
            bar.update(len(chunk))
    back = np.argsort(order)
    if not all(bool(part[0].isfinite().all()) for part in parts):
        raise UserError("the hidden states of the model are not all finite: try another --dtype")
    return Pooled(*(torch.cat(part).cpu().numpy()[back] for part in zip(*parts, strict=True)))


def _pool(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        output_hidden_states=True,
        use_cache=False,
    )
    mask = batch["labels"] != IGNORE_INDEX
    lengths = mask.sum(dim=1)
    # masked_fill: whatever the model computed on padding must not spread as 0 * NaN.
    hidden = output.hidden_states[-1].double().masked_fill(~mask[..., None], 0.0).sum(dim=1)
    logps = token_logps(output.logits, batch["labels"])[0].double().sum(dim=1)
    return hidden / lengths[:, None], logps, lengths


def _batches(rows: Sequence[Row], batch_size: int, tokens: int) -> Iterator[list[int]]:
    """Row numbers in order of length; a batch has at most `tokens` tokens, padding included."""
    chunk: list[int] = []
    for (i,) in by_length(range(len(rows)), rows, 1):
        full = len(chunk) == batch_size or (len(chunk) + 1) * row_length(rows[i]) > tokens
        if chunk and full:
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk
