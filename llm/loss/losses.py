"""The two objectives on a language model, as pure tensor functions (arXiv 2410.15483).

    f_SFT(theta) = mean over response tokens of  -log pi_theta(token | everything before it)
    f_DPO(theta) = mean over pairs of            -log sigmoid(beta * h)
    h = [log pi_theta(y_w|x) - log pi_ref(y_w|x)] - [log pi_theta(y_l|x) - log pi_ref(y_l|x)]

Prompt and padding carry the label -100 and never count. Nothing here knows a model, draws a
random number or keeps state. Log-probabilities are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
CACHE_BYTES = 2**20
"""Logits worked on at once on a CPU, so that they stay in its cache."""
LOSS_TYPES = ("sigmoid", "ipo", "hinge", "robust", "sigmoid_norm")
SMOOTHED_LOSS_TYPES = ("sigmoid", "robust")
LENGTH_NORMALISED_LOSS_TYPES = ("ipo", "sigmoid_norm")


class PreferenceTerms(NamedTuple):
    """Per-pair results, each of shape (B,); the rewards are detached."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def token_logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of every labelled token, log pi(labels[b, t+1] | tokens up to t).

    Equation: log pi(v) = logits[v] - logsumexp(logits), evaluated on labelled positions only.

    Args:
        logits: (B, T, V), any floating type; position t predicts token t+1.
        labels: (B, T) token ids, -100 where a token does not count. The first token of a
            row has no prediction and never counts.

    Returns:
        ``(logps, mask)`` of shape (B, T-1): log-probabilities, 0 where masked, and the boolean
        mask. float32 whatever the type of the logits (float64 stays float64).

    Raises:
        ValueError: if the shapes do not belong together.
    """
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"logits (B,T,V) and labels (B,T) do not match: {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}"
        )
    targets = labels[:, 1:]
    mask = targets != IGNORE_INDEX
    # Choosing the labelled positions first keeps the float32 copy at (response tokens, V) instead
    # of (B, T, V), and keeps whatever the model computed on padding out of value and gradient.
    values = label_logps(logits[:, :-1][mask], targets[mask])
    return values.new_zeros(targets.shape).masked_scatter(mask, values), mask


def label_logps(logits: Tensor, labels: Tensor, *, overwrite: bool = False) -> Tensor:
    """log softmax(logits)[labels] of each row: logits (N, V), labels (N,), result (N,).

    float32 whatever the type of the logits (float64 stays float64): bfloat16 has 8 bits of
    mantissa, so a log-probability near -10 would be off by up to 0.03, and a sum over hundreds of
    tokens by more than the margin h that DPO looks at.

    With `overwrite` the backward pass may leave its gradient in `logits`, if nothing else reads
    them: a second tensor of their size is then never made (on a CPU).
    """
    promoted = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if promoted.device.type == "cpu" and promoted.nbytes > CACHE_BYTES:
        values: Tensor = _LabelLogps.apply(promoted, labels, overwrite)
        return values
    return -F.cross_entropy(promoted, labels, reduction="none")


class _LabelLogps(torch.autograd.Function):
    """log softmax(logits)[label], some rows at a time.

    The gradient of row n is g_n (onehot(label_n) - softmax(logits_n)). A few rows fit into the
    cache; log_softmax of all of them and its backward make three tensors (N, V) of new memory.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, overwrite: bool) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.overwrite = overwrite
        pairs = _in_cache(logits, labels[:, None])
        return torch.cat([part.log_softmax(-1).gather(1, ids)[:, 0] for part, ids in pairs])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, labels = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: this is to be differentiated as well
            chosen = F.one_hot(labels, logits.shape[1])
            return gradient[:, None] * (chosen - logits.softmax(-1)), None, None
        result = logits if ctx.overwrite else torch.empty_like(logits)
        parts = _in_cache(result, logits, labels[:, None], gradient[:, None])
        for out, part, ids, g in parts:
            torch.mul(part.softmax(-1), -g, out=out).scatter_add_(1, ids, g)
        return result, None, None


def _in_cache(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors in parts of so many rows that CACHE_BYTES hold those of `logits`."""
    rows = max(1, CACHE_BYTES // (logits.element_size() * max(1, logits.shape[1])))
    return zip(*(each.split(rows) for each in (logits, *others)), strict=True)


def check_preference_options(loss_type: str, beta: float, label_smoothing: float = 0.0) -> None:
    """Refuse a combination of options that means nothing, before anything is loaded.

    Raises:
        ValueError: unknown `loss_type`; `beta` not a positive finite number; `label_smoothing`
            outside [0, 0.5), or above 0 with a loss that would not use it.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type is {loss_type!r}; it must be one of {', '.join(LOSS_TYPES)}")
    if not 0.0 < beta < math.inf:
        raise ValueError(f"beta is {beta}; it must be a positive finite number")
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must lie in [0, 0.5)")
    if label_smoothing > 0.0 and loss_type not in SMOOTHED_LOSS_TYPES:
        raise ValueError(
            f"label_smoothing is {label_smoothing} but loss_type {loss_type!r} does not use it; "
            f"set it to 0 or choose one of {', '.join(SMOOTHED_LOSS_TYPES)}"
        )


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> PreferenceTerms:
    """Preference loss of each pair; its mean over pairs is f_DPO.

    With r_w, r_l the log-ratios log pi(y|x) - log ref(y|x) of chosen and rejected, h = r_w - r_l,
    g = r_w/|y_w| - r_l/|y_l| and eps = `label_smoothing`:

    ============  ==========================================================  ===================
    sigmoid       -(1-eps) log sigmoid(beta h) - eps log sigmoid(-beta h)     arXiv 2305.18290
                  (eps > 0: conservative DPO, Mitchell 2023, "A note on DPO
                  with noisy preferences")
    robust        [-(1-eps) log sigmoid(beta h) + eps log sigmoid(-beta h)]   arXiv 2403.00409
                  / (1 - 2 eps)
    hinge         max(0, 1 - beta h)                                          arXiv 2305.10425
    ipo           (g - 1/(2 beta))^2, averaged over length as TRL 1.x does    arXiv 2310.12036
    sigmoid_norm  -log sigmoid(beta g)                                        arXiv 2411.15124
    ============  ==========================================================  ===================

    Args:
        policy_chosen_logps, policy_rejected_logps: (B,) log pi(y|x), the SUM over the
            response tokens (eq. 7 of arXiv 2305.18290).
        reference_chosen_logps, reference_rejected_logps: (B,) likewise; treated as constants.
        beta: the temperature, > 0.
        loss_type: a row of the table.
        label_smoothing: eps in [0, 0.5), the assumed share of flipped labels.
        chosen_lengths, rejected_lengths: (B,) numbers of response tokens; needed by ipo and
            sigmoid_norm. They are data of the batch, not options, so the other losses accept them.

    Returns:
        `PreferenceTerms`; the rewards are beta * r (unnormalised, for every `loss_type`).

    Raises:
        ValueError: as `check_preference_options`, or if lengths are missing where needed.
    """
    check_preference_options(loss_type, beta, label_smoothing)
    chosen_ratios = policy_chosen_logps - reference_chosen_logps.detach()
    rejected_ratios = policy_rejected_logps - reference_rejected_logps.detach()
    if loss_type in LENGTH_NORMALISED_LOSS_TYPES:
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError(f"loss_type {loss_type!r} needs chosen_lengths and rejected_lengths")
        margin = chosen_ratios / chosen_lengths - rejected_ratios / rejected_lengths
    else:
        margin = chosen_ratios - rejected_ratios
    return PreferenceTerms(
        _margin_loss(margin, loss_type, beta, label_smoothing),
        beta * chosen_ratios.detach(),
        beta * rejected_ratios.detach(),
    )


def _margin_loss(margin: Tensor, loss_type: str, beta: float, eps: float) -> Tensor:
    """The table of `dpo_loss` as a function of the margin (h, or g where lengths divide)."""
    if loss_type == "ipo":
        return (margin - 1.0 / (2.0 * beta)) ** 2
    if loss_type == "hinge":
        return F.relu(1.0 - beta * margin)
    # logsigmoid, never log(sigmoid(.)): the latter is -inf with a NaN gradient for a large margin.
    agree = -F.logsigmoid(beta * margin)
    if eps == 0.0:
        return agree
    flipped = -F.logsigmoid(-beta * margin)
    if loss_type == "robust":
        return ((1.0 - eps) * agree - eps * flipped) / (1.0 - 2.0 * eps)
    return (1.0 - eps) * agree + eps * flipped
