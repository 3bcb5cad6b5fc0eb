"""llm.loss.losses against hand-computed values, closed forms and invariances."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _tiny import given as given_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.loss import losses
from llm.loss.forward import response_logps
from llm.loss.losses import (
    LENGTH_NORMALISED_LOSS_TYPES,
    LOSS_TYPES,
    SMOOTHED_LOSS_TYPES,
    check_preference_options,
    dpo_loss,
    label_logps,
    token_logps,
)
from llm.loss.objectives import SFTObjective

LENGTHS = {"chosen_lengths": torch.tensor([3.0, 2.0]), "rejected_lengths": torch.tensor([4.0, 5.0])}
floats = st.floats(-50.0, 50.0, allow_nan=False)


def float64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss_at(margin: float, **options: Any) -> float:
    """The loss of one pair whose reference is 0 and whose log-ratios differ by `margin`."""
    zero = float64(0.0)
    lengths = {"chosen_lengths": float64(1.0), "rejected_lengths": float64(1.0)}
    return dpo_loss(float64(margin), zero, zero, zero, **lengths, **options).losses.item()


def sequence_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return response_logps(*given_logits(logits, labels)).sums()


def sft_total(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return SFTObjective()(*given_logits(logits, labels)).total


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def random_batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (3, 6, 7) in float64 and labels with 3, 1 and 0 counted tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 6, 7, generator=generator, dtype=torch.float64) * 3
    labels = torch.full((3, 6), -100)
    labels[0, 2:5] = torch.tensor([1, 6, 0])
    labels[1, 5] = 3
    return logits, labels


# --- log-probabilities


def test_token_logps_by_hand() -> None:
    # softmax(log 1, log 2, log 5) = (1/8, 2/8, 5/8); the last position predicts nothing.
    logits = torch.tensor([[[1.0, 2.0, 5.0]] * 3]).log()
    logps, mask = token_logps(logits, torch.tensor([[0, -100, 1]]))
    assert mask.tolist() == [[False, True]]
    assert logps.tolist() == [[0.0, pytest.approx(math.log(2 / 8), abs=1e-6)]]


def test_position_t_predicts_token_t_plus_1() -> None:
    logits, labels = random_batch()
    logps, mask = token_logps(logits, labels)
    for b, t in mask.nonzero().tolist():
        row = [math.exp(v) for v in logits[b, t].tolist()]
        assert logps[b, t].item() == pytest.approx(math.log(row[labels[b, t + 1]] / sum(row)))
    lengths = response_logps(*given_logits(logits, labels)).lengths()
    assert mask.sum(-1).tolist() == [3, 1, 0] == lengths.tolist()
    assert (logps[~mask] == 0).all()


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the logits of a batch outgrow the cache."""
    monkeypatch.setattr(losses, "CACHE_BYTES", 3 * 4 * 11)


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_label_logps_are_torchs_cross_entropy(dtype: torch.dtype, overwrite: bool) -> None:
    """The values, and their gradient; over several parts, with an impossible token."""
    generator = torch.Generator().manual_seed(0)
    logits = (10.0 * torch.randn(10, 11, generator=generator, dtype=torch.float64)).to(dtype)
    logits[2, 5] = -torch.inf
    labels = torch.randint(0, 5, (10,), generator=generator)
    weights = torch.randn(10, generator=generator, dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    values = label_logps(leaf * 1.0, labels, overwrite=overwrite)
    (gradient,) = torch.autograd.grad(values, leaf, weights.to(values.dtype))
    exact = logits.double().requires_grad_()
    expected = -F.cross_entropy(exact, labels, reduction="none")
    (slope,) = torch.autograd.grad(expected, exact, weights)
    # bfloat16 logits are exact in float32; their gradient is rounded to 8 bits.
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-6)
    rounding = 1e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(gradient.double(), slope, rtol=rounding, atol=1e-6)


@pytest.mark.usefixtures("in_parts")
def test_label_logps_have_second_derivatives() -> None:
    """Hessian products (llm.validate) go through them."""
    logits = torch.randn(4, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 10, 2, 7])
    for overwrite in (False, True):
        values = lambda x, o=overwrite: label_logps(x * 1.0, labels, overwrite=o)  # noqa: E731
        assert torch.autograd.gradgradcheck(values, logits)


@pytest.mark.usefixtures("in_parts")
def test_label_logps_leave_logits_alone_unless_they_may_overwrite_them() -> None:
    for overwrite in (False, True):
        logits = torch.randn(4, 11, requires_grad=True) * 1.0
        before, labels = logits.detach().clone(), torch.tensor([0, 1, 2, 3])
        values = label_logps(logits, labels, overwrite=overwrite)
        torch.testing.assert_close(logits, before, rtol=0, atol=0)
        values.sum().backward(retain_graph=True)
        assert torch.equal(logits.detach(), before) is not overwrite
        if overwrite:  # what was saved is gone, and autograd says so
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                values.sum().backward()


def test_sequence_logps_are_sums_over_response_tokens() -> None:
    logits, labels = random_batch()
    logps, _ = token_logps(logits, labels)
    expected = [logps[0, 1:4].sum().item(), logps[1, 4].item(), 0.0]
    assert sequence_logps(logits, labels).tolist() == pytest.approx(expected)


@given(st.floats(-100, 100), st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_logps_ignore_a_constant_added_to_the_logits(constant: float, seed: int) -> None:
    logits, labels = random_batch(seed)
    torch.testing.assert_close(token_logps(logits + constant, labels), token_logps(logits, labels))


def test_uncounted_positions_reach_neither_value_nor_gradient() -> None:
    logits, labels = random_batch()
    clean = sequence_logps(logits, labels)
    _, mask = token_logps(logits, labels)
    spoilt = logits.clone()
    spoilt[:, :-1][~mask] = math.nan
    spoilt[:, -1] = math.inf
    spoilt.requires_grad_()
    torch.testing.assert_close(sequence_logps(spoilt, labels), clean)
    (gradient,) = torch.autograd.grad(sequence_logps(spoilt, labels).sum(), spoilt)
    assert (gradient[:, :-1][~mask] == 0).all()
    assert (gradient[:, -1] == 0).all()


def test_gradient_of_logps() -> None:
    logits, labels = random_batch()
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_logps(x, labels)[0], logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_logits_give_float32_logps(dtype: torch.dtype) -> None:
    logits, labels = random_batch()
    low = logits.to(dtype)
    logps, _ = token_logps(low, labels)
    assert logps.dtype == torch.float32
    # Rounding the logits is the only loss: the arithmetic after it is exact to float32.
    exact, _ = token_logps(low.double(), labels)
    torch.testing.assert_close(logps.double(), exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(logps.double(), token_logps(logits, labels)[0], atol=0.1, rtol=0)


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="do not match"):
        token_logps(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long))


# --- SFT


def test_sft_losses_by_hand() -> None:
    # Of two tokens the first is the label; 9 is the log of no probability, and does not count.
    logps = torch.tensor([[-1.0, -2.0, 9.0, 9.0], [-4.0, 9.0, 9.0, 9.0]])
    logits = torch.stack([logps, torch.log1p(-logps.exp())], dim=-1)
    labels = torch.tensor([[-100, 0, 0, -100], [-100, 0, -100, -100]])
    terms = SFTObjective()(*given_logits(logits, labels))
    assert terms.total.item() / 3 == pytest.approx(7 / 3)
    total, count = terms.sums["sequence_loss"]
    assert total.item() / count == pytest.approx((3 + 4) / 2)


def test_accumulation_with_the_global_count_is_exact() -> None:
    logits, labels = random_batch()
    logits.requires_grad_()
    whole = sft_total(logits, labels) / 4
    parts = [sft_total(logits[i : i + 1], labels[i : i + 1]) / 4 for i in range(3)]
    torch.testing.assert_close(sum(parts), whole)
    (expected,) = torch.autograd.grad(whole, logits)
    (actual,) = torch.autograd.grad(torch.stack(parts).sum(), logits)
    torch.testing.assert_close(actual, expected)


def test_sft_loss_without_tokens_is_zero_not_nan() -> None:
    assert sft_total(torch.zeros(1, 3, 4), torch.full((1, 3), -100)).item() == 0.0


# --- DPO


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, -log_sigmoid(0.2)),
        ({"label_smoothing": 0.1}, -0.9 * log_sigmoid(0.2) - 0.1 * log_sigmoid(-0.2)),
        ({"loss_type": "hinge"}, 0.8),
        ({"loss_type": "ipo"}, (2.0 - 5.0) ** 2),
        ({"loss_type": "robust"}, -log_sigmoid(0.2)),
        (
            {"loss_type": "robust", "label_smoothing": 0.1},
            (-0.9 * log_sigmoid(0.2) + 0.1 * log_sigmoid(-0.2)) / 0.8,
        ),
        ({"loss_type": "sigmoid_norm"}, -log_sigmoid(0.2)),
    ],
)
def test_loss_of_a_margin_of_two_by_hand(options: dict[str, Any], expected: float) -> None:
    assert loss_at(2.0, beta=0.1, **options) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("eps", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", ["sigmoid", "robust"])
def test_loss_is_log_2_and_rewards_0_where_policy_is_reference(loss_type: str, eps: float) -> None:
    same = float64(-12.0, -3.0), float64(-7.0, -30.0)
    terms = dpo_loss(*same, *same, beta=0.7, loss_type=loss_type, label_smoothing=eps)
    assert terms.losses.tolist() == pytest.approx([math.log(2)] * 2)
    assert terms.chosen_rewards.tolist() == terms.rejected_rewards.tolist() == [0.0, 0.0]


def test_rewards_are_scaled_log_ratios_without_gradient() -> None:
    policy = float64(-10.0).requires_grad_()
    terms = dpo_loss(policy, float64(-20.0), float64(-13.0), float64(-18.0), beta=0.1)
    assert terms.chosen_rewards.item() == pytest.approx(0.3)
    assert terms.rejected_rewards.item() == pytest.approx(-0.2)
    assert terms.losses.item() == pytest.approx(-log_sigmoid(0.5))
    assert terms.losses.requires_grad
    assert not terms.chosen_rewards.requires_grad


@pytest.mark.parametrize("loss_type", LENGTH_NORMALISED_LOSS_TYPES)
def test_lengths_divide_the_log_ratios(loss_type: str) -> None:
    zero = float64(0.0, 0.0)
    terms = dpo_loss(
        float64(6.0, 8.0), float64(4.0, -5.0), zero, zero, beta=0.5, loss_type=loss_type, **LENGTHS
    )
    margins = [6 / 3 - 4 / 4, 8 / 2 + 5 / 5]
    by_hand = {
        "ipo": [(m - 1.0) ** 2 for m in margins],
        "sigmoid_norm": [-log_sigmoid(0.5 * m) for m in margins],
    }
    assert terms.losses.tolist() == pytest.approx(by_hand[loss_type])
    assert terms.chosen_rewards.tolist() == pytest.approx([3.0, 4.0])


@given(margin=floats, beta=st.floats(0.01, 5.0))
@settings(max_examples=50, deadline=None)
def test_gradient_is_minus_beta_sigmoid_of_minus_beta_h(margin: float, beta: float) -> None:
    chosen, rejected = float64(margin).requires_grad_(), float64(0.0).requires_grad_()
    zero = float64(0.0)
    dpo_loss(chosen, rejected, zero, zero, beta=beta).losses.sum().backward()
    expected = -beta / (1.0 + math.exp(beta * margin)) if beta * margin < 700 else 0.0
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(expected, rel=1e-9, abs=1e-300)
    assert rejected.grad.item() == -chosen.grad.item()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradients_agree_with_differences(loss_type: str) -> None:
    # Margins keep beta * h away from 1, the kink of hinge.
    inputs = (float64(-3.0, -9.0).requires_grad_(), float64(-5.0, -1.0).requires_grad_())
    eps = 0.2 if loss_type in SMOOTHED_LOSS_TYPES else 0.0

    def losses(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        reference = float64(-4.0, -4.0)
        options = {"beta": 0.3, "loss_type": loss_type, "label_smoothing": eps, **LENGTHS}
        return dpo_loss(chosen, rejected, reference, reference, **options).losses

    assert torch.autograd.gradcheck(losses, inputs)


def test_reference_gets_no_gradient() -> None:
    policy, reference = float64(-3.0).requires_grad_(), float64(-4.0).requires_grad_()
    dpo_loss(policy, policy * 2, reference, reference * 2, beta=0.1).losses.sum().backward()
    assert policy.grad is not None
    assert reference.grad is None


@given(margin=floats, beta=st.floats(0.01, 5.0), eps=st.floats(0.0, 0.45))
@settings(max_examples=50, deadline=None)
def test_swapping_the_pair_obeys_the_identities(margin: float, beta: float, eps: float) -> None:
    # -log s(x) + log s(-x) = -x, so a swap changes each loss by a known linear term.
    slopes = {"sigmoid": 1 - 2 * eps, "robust": 1 / (1 - 2 * eps)}
    for loss_type, slope in slopes.items():
        options = {"beta": beta, "label_smoothing": eps, "loss_type": loss_type}
        change = loss_at(margin, **options) - loss_at(-margin, **options)
        assert change == pytest.approx(-slope * beta * margin, rel=1e-9, abs=1e-9)


@given(margin=floats, eps=st.floats(0.0, 0.45))
@settings(max_examples=50, deadline=None)
def test_robust_loss_is_unbiased_under_label_flips(margin: float, eps: float) -> None:
    # The property that defines it (arXiv 2403.00409): averaged over flips, the noiseless loss.
    robust = {"beta": 0.5, "label_smoothing": eps, "loss_type": "robust"}
    noisy = (1 - eps) * loss_at(margin, **robust) + eps * loss_at(-margin, **robust)
    assert noisy == pytest.approx(loss_at(margin, beta=0.5), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extreme_margins_stay_finite(sign: float) -> None:
    margin = torch.tensor([sign * 1e5]).requires_grad_()
    zero = torch.zeros(1)
    losses = dpo_loss(margin, zero, zero, zero, beta=1.0, label_smoothing=0.1).losses
    losses.sum().backward()
    assert margin.grad is not None
    assert torch.isfinite(losses).all()
    assert torch.isfinite(margin.grad).all()


# --- options


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"loss_type": "kto"}, "loss_type"),
        ({"beta": 0.0}, "beta"),
        ({"beta": -0.1}, "beta"),
        ({"beta": math.nan}, "beta"),
        ({"beta": math.inf}, "beta"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"label_smoothing": math.nan}, "label_smoothing"),
        *(({"loss_type": t, "label_smoothing": 0.1}, t) for t in ("ipo", "hinge", "sigmoid_norm")),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], word: str) -> None:
    options = {"loss_type": "sigmoid", "beta": 0.1, **options}
    with pytest.raises(ValueError, match=word) as refusal:
        check_preference_options(**options)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match=word):
        loss_at(1.0, **options)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_valid_options_pass(loss_type: str) -> None:
    check_preference_options(loss_type, 0.1)
    if loss_type in SMOOTHED_LOSS_TYPES:
        check_preference_options(loss_type, 0.1, 0.49)


@pytest.mark.parametrize("loss_type", LENGTH_NORMALISED_LOSS_TYPES)
def test_missing_lengths_are_refused(loss_type: str) -> None:
    zero = torch.zeros(2)
    with pytest.raises(ValueError, match="chosen_lengths"):
        dpo_loss(zero, zero, zero, zero, beta=0.1, loss_type=loss_type)
