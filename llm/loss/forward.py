"""From a batch to the log-probabilities of its response tokens, in one forward pass.

Padded and packed batches give the same numbers. The head (hidden state to vocabulary) runs on the
positions that predict a response token and nowhere else, and, for packed batches, chunk by chunk: a
tensor of (tokens x vocabulary) in float32 never exists for more than `LOGITS_BYTES` at a time. Of
the last layer the prompt is needed as keys and values only: its MLP skips the rest of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llm.loss.attention import PLAN_ARGUMENT, packed_attention, transformers_model
from llm.loss.losses import IGNORE_INDEX, label_logps

LOGITS_BYTES = 2**28
"""Float32 logits held at once. More than this is computed in chunks and again in the backward."""
SCALED_AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Settings of models that change the logits after the head: these get their logits whole."""


@dataclass(frozen=True)
class ResponseLogps:
    """Log-probabilities (N,) of all response tokens of a batch, and whose tokens they are."""

    values: Tensor
    owners: Tensor
    count: int
    """Number of responses; `owners` (N,) lies in [0, count)."""

    def sums(self) -> Tensor:
        """log pi(y|x) of each response: (count,)."""
        return self._by_response(self.values)

    def lengths(self) -> Tensor:
        """Tokens of each response: (count,)."""
        # Not bincount, which makes the host wait for a CUDA device to learn the largest owner.
        return self._by_response(torch.ones_like(self.owners))

    def _by_response(self, of_tokens: Tensor) -> Tensor:
        return of_tokens.new_zeros(self.count).index_add(0, self.owners, of_tokens)


def response_logps(model: torch.nn.Module, batch: Mapping[str, Any]) -> ResponseLogps:
    """log pi(token | prompt, response so far) of the response tokens of a padded or packed batch.

    float32 (float64 for a float64 model) in nats; rows as in `collate` and `packing`. A
    model in training mode is for one backward pass, which may overwrite its logits.
    """
    if "plan" not in batch:
        return _padded(model, batch)
    with packed_attention(model):
        return _packed(model, batch)


def _padded(model: torch.nn.Module, batch: Mapping[str, Any]) -> ResponseLogps:
    output = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    )
    targets = batch["labels"][:, 1:]
    owners, positions = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
    # Indexing copies: these logits are nobody else's.
    logits, labels = output.logits[owners, positions], targets[owners, positions]
    values = label_logps(logits, labels, overwrite=model.training)
    return ResponseLogps(values, owners, len(targets))


def _packed(model: torch.nn.Module, batch: Mapping[str, Any]) -> ResponseLogps:
    targets = batch["targets"]
    inputs = {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "use_cache": False,
        "logits_to_keep": batch["predictors"],
        PLAN_ARGUMENT: batch["plan"],
    }
    inner = transformers_model(model)
    if _head_is_last(model, inner):
        with _scoring(inner, targets), _last_mlp_on(inner, batch["predicting"]):
            values = model(**inputs).logits.reshape(-1)
    else:
        values = label_logps(model(**inputs).logits.squeeze(0), targets)
    count = len(batch["plan"].lengths)
    return ResponseLogps(values, batch["owners"], count)


def _head_is_last(model: torch.nn.Module, inner: Any) -> bool:
    """Whether the logits are the output of the head as it is, in a model that is not compiled."""
    config = inner.config.get_text_config()
    rescaled = any(getattr(config, name, None) is not None for name in SCALED_AFTER_THE_HEAD)
    return not rescaled and not hasattr(model, "_orig_mod") and inner.get_output_embeddings()


@contextmanager
def _scoring(model: Any, targets: Tensor) -> Iterator[None]:
    """Inside, the model's head returns log-probabilities (1, N, 1) of `targets`, not logits.

    So the whole forward stays one call of the (possibly sharded) model, as its wrappers need it.
    """
    head = model.get_output_embeddings()
    logits_of = head.forward

    def forward(hidden: Tensor) -> Tensor:
        vocabulary = model.config.get_text_config().vocab_size
        return _in_chunks(logits_of, hidden, targets, vocabulary, overwrite=model.training)

    with _computing(head, forward):
        yield


@contextmanager
def _last_mlp_on(model: Any, positions: Tensor) -> Iterator[None]:
    """Inside, the MLP of the last layer runs on `positions` (M,) and is 0 elsewhere.

    Nothing reads the last layer at the other positions. Layers without an MLP of that name run
    whole, as do those that compute themselves again in the backward, when this is over.
    """
    layer = last_layer(model)
    mlp = getattr(layer, "mlp", None)
    # transformers' own checkpointing, and torch's, which FSDP's configuration asks for
    recomputed = getattr(layer, "gradient_checkpointing", False)
    if mlp is None or recomputed or hasattr(layer, "_checkpoint_wrapped_module"):
        yield
        return
    whole = mlp.forward

    def forward(hidden: Tensor, *args: Any) -> Any:
        out = None if args else whole(hidden.index_select(1, positions))
        if not isinstance(out, Tensor):  # some mixtures of experts return their routing too
            return whole(hidden, *args)
        return out.new_zeros(hidden.shape).index_copy(1, positions, out)

    with _computing(mlp, forward):
        yield


def last_layer(model: Any) -> Any:
    """Of a transformers model whose backbone holds its layers in one list; else None."""
    for child in model.base_model.children():
        if isinstance(child, torch.nn.ModuleList):
            return child[-1]
    return None


@contextmanager
def _computing(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, `module` computes `forward`; afterwards it is as it was, with wrappers of others."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _in_chunks(
    logits_of: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    vocabulary: int,
    *,
    overwrite: bool,
) -> Tensor:
    def score(part: Tensor, ids: Tensor) -> Tensor:
        # squeeze, since the backward of [0] would fill a tensor of zeros
        return label_logps(logits_of(part).squeeze(0), ids, overwrite=overwrite)

    rows = max(1, LOGITS_BYTES // (4 * vocabulary))
    if len(targets) <= rows:
        return score(hidden, targets).reshape(1, -1, 1)
    parts = [
        checkpoint(score, part, ids, use_reentrant=False)
        for part, ids in zip(hidden.split(rows, dim=1), targets.split(rows), strict=True)
    ]
    return torch.cat(parts).reshape(1, -1, 1)
