"""llm.loss.objectives and llm.loss.evaluate: sums that add up, values that no batching changes."""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any

import pytest
import torch
from _tiny import OBJECTIVES, PAD_ID, eval_rows, make_policy, train_rows

from llm.loss.collate import collate_preference, collate_sft
from llm.loss.evaluate import (
    by_length,
    evaluate_objective,
    evaluating,
    held_out_summary,
    row_length,
    with_reference_logps,
)
from llm.loss.losses import LOSS_TYPES, dpo_loss
from llm.loss.losses import token_logps as token_logps_of
from llm.loss.objectives import DPOObjective, SFTObjective, pair_logps
from theory.tasks import Task

# Float32 sums of at most 17 rows: values of order 1 agree to a few of its 1.2e-7.
FLOAT32 = 1e-6
# Sums of log-probabilities of order 40 in batches of other shapes.
BATCHING = 1e-5


def padded_logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """By transformers alone: nothing is packed, nothing left out of the head."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def evaluate(task: Task, model: Any, rows: list[Any], batch_size: int = 4) -> dict[str, float]:
    return evaluate_objective(
        model, OBJECTIVES[task], rows, batch_size=batch_size, pad_token_id=PAD_ID
    )


# --- objectives


def test_sft_total_over_items_is_the_pure_loss() -> None:
    model, rows = make_policy(), train_rows()[Task.SFT]
    objective = SFTObjective()
    terms = objective(model, objective.collate(rows, PAD_ID))
    batch = collate_sft(rows, PAD_ID)
    logps, mask = token_logps_of(padded_logits(model, batch), batch["labels"])
    assert objective.items(rows) == int(mask.sum())
    torch.testing.assert_close(terms.total / objective.items(rows), -logps.sum() / mask.sum())
    total, count = terms.sums["sequence_loss"]
    torch.testing.assert_close(total / count, -logps.detach().sum(-1).mean())


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_dpo_total_over_items_is_the_pure_loss(loss_type: str) -> None:
    # Another model than the reference (seed 0), so that the margins are not zero.
    model, rows = make_policy(seed=1), train_rows()[Task.DPO]
    smoothing = 0.1 if loss_type in ("sigmoid", "robust") else 0.0
    objective = DPOObjective(0.3, loss_type, smoothing)
    terms = objective(model, objective.collate(rows, PAD_ID))
    batch = collate_preference(rows, PAD_ID)
    logps, mask = token_logps_of(padded_logits(model, batch), batch["labels"])
    logps, lengths = logps.sum(-1), mask.sum(-1)
    pairs = len(rows)
    expected = dpo_loss(
        logps[:pairs],
        logps[pairs:],
        torch.tensor([row["ref_chosen_logps"] for row in rows]),
        torch.tensor([row["ref_rejected_logps"] for row in rows]),
        beta=0.3,
        loss_type=loss_type,
        label_smoothing=smoothing,
        chosen_lengths=lengths[:pairs],
        rejected_lengths=lengths[pairs:],
    )
    assert objective.items(rows) == pairs
    torch.testing.assert_close(terms.total / pairs, expected.losses.mean())
    margins = expected.chosen_rewards - expected.rejected_rewards
    assert margins.abs().min() > 1e-4
    means = {name: float(total / count) for name, (total, count) in terms.sums.items()}
    assert means == pytest.approx(
        {
            "reward_accuracy": float((0.5 * (margins.sign() + 1.0)).mean()),
            "reward_margin": float(margins.mean()),
            "chosen_logps": float(logps[:pairs].detach().mean()),
            "rejected_logps": float(logps[pairs:].detach().mean()),
        },
        rel=FLOAT32,
        abs=BATCHING,
    )


@pytest.mark.parametrize("task", Task)
def test_only_the_total_carries_a_gradient(task: Task) -> None:
    objective = OBJECTIVES[task]
    terms = objective(make_policy(), objective.collate(train_rows()[task], PAD_ID))
    assert terms.total.requires_grad
    assert not any(total.requires_grad for total, _ in terms.sums.values())


@pytest.mark.parametrize("task", Task)
def test_sums_over_parts_add_up_to_the_sum_over_the_whole(task: Task) -> None:
    objective, model, rows = OBJECTIVES[task], make_policy(seed=1), train_rows()[task]
    whole = objective(model, objective.collate(rows, PAD_ID))
    parts = [
        objective(model, objective.collate(part, PAD_ID))
        for part in (rows[:2], rows[2:7], rows[7:])
    ]
    total = torch.stack([part.total for part in parts]).sum()
    torch.testing.assert_close(total, whole.total, rtol=BATCHING, atol=BATCHING)
    for name, (value, count) in whole.sums.items():
        assert sum(part.sums[name][1] for part in parts) == count
        together = torch.stack([part.sums[name][0] for part in parts]).sum()
        torch.testing.assert_close(together, value, rtol=BATCHING, atol=BATCHING)


@pytest.mark.parametrize(
    "options", [{"beta": 0.0}, {"loss_type": "kto"}, {"loss_type": "ipo", "label_smoothing": 0.1}]
)
def test_meaningless_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(reversed(options))):
        DPOObjective(**options)


# --- the reference


def test_at_the_reference_the_dpo_loss_is_log_2_and_every_margin_is_0() -> None:
    metrics = evaluate(Task.DPO, make_policy(), train_rows()[Task.DPO])
    # The cache holds sums of order 40 from batches of another shape: 40 eps = 5e-6 times beta.
    assert metrics["loss"] == pytest.approx(math.log(2), abs=FLOAT32)
    assert metrics["reward_margin"] == pytest.approx(0.0, abs=FLOAT32)


def test_cached_reference_logps_equal_live_ones() -> None:
    reference, rows = make_policy(), train_rows()[Task.DPO]
    for row in rows:
        with torch.no_grad():
            chosen, rejected = pair_logps(reference.eval(), collate_preference([row], PAD_ID))
        assert row["ref_chosen_logps"] == pytest.approx(chosen.item(), rel=FLOAT32)
        assert row["ref_rejected_logps"] == pytest.approx(rejected.item(), rel=FLOAT32)


def test_reference_logps_are_added_to_copies() -> None:
    rows = [
        {key: ids for key, ids in row.items() if key.endswith("_ids")}
        for row in train_rows()[Task.DPO]
    ]
    before = copy.deepcopy(rows)
    added = with_reference_logps(make_policy(), rows, batch_size=3, pad_token_id=PAD_ID)
    assert rows == before
    assert [{key: row[key] for key in before[0]} for row in added] == before
    assert all({"ref_chosen_logps", "ref_rejected_logps"} <= set(row) for row in added)


def test_reference_logps_ignore_dropout() -> None:
    model = make_policy(hidden_dropout=0.5)
    rows = train_rows()[Task.DPO]
    first, second = (
        with_reference_logps(model.train(), rows, batch_size=3, pad_token_id=PAD_ID)
        for _ in range(2)
    )
    assert first == second
    assert model.training


# --- evaluation


@pytest.mark.parametrize("task", Task)
def test_evaluation_does_not_depend_on_the_batch_size(task: Task) -> None:
    model, rows = make_policy(seed=1), train_rows()[task]
    expected = evaluate(task, model, rows, batch_size=1)
    for batch_size in (2, 5, 100):
        metrics = evaluate(task, model, rows, batch_size=batch_size)
        assert metrics == pytest.approx(expected, rel=BATCHING, abs=BATCHING)


@pytest.mark.parametrize("task", Task)
def test_evaluation_does_not_depend_on_the_order_of_the_rows(task: Task) -> None:
    model, rows = make_policy(seed=1), train_rows()[task]
    expected = evaluate(task, model, rows)
    assert evaluate(task, model, rows[::-1]) == pytest.approx(expected, rel=BATCHING, abs=BATCHING)


def test_the_sft_loss_is_a_mean_over_tokens_and_the_sequence_loss_over_rows() -> None:
    model, rows = make_policy(), eval_rows()[Task.SFT]
    lengths = [len(row["completion_ids"]) for row in rows]
    assert len(set(lengths)) > 1
    losses = [evaluate(Task.SFT, model, [row])["loss"] for row in rows]
    metrics = evaluate(Task.SFT, model, rows)
    sums = [loss * length for loss, length in zip(losses, lengths, strict=True)]
    assert metrics["loss"] == pytest.approx(sum(sums) / sum(lengths), rel=BATCHING)
    assert metrics["sequence_loss"] == pytest.approx(sum(sums) / len(rows), rel=BATCHING)
    assert metrics["loss"] != pytest.approx(sum(losses) / len(rows), rel=BATCHING)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("task", Task)
def test_evaluation_leaves_the_model_as_it_was(task: Task, training: bool) -> None:
    model = make_policy(hidden_dropout=0.5).train(training)
    first, second = (evaluate(task, model, train_rows()[task]) for _ in range(2))
    assert first == second  # dropout was off
    assert model.training == training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_training_mode_comes_back_after_an_error() -> None:
    model = make_policy().train()
    seen = []
    with contextlib.suppress(KeyError), evaluating(model):
        seen.append(model.training)
        raise KeyError
    assert seen == [False]
    assert model.training


def test_evaluation_draws_no_random_number() -> None:
    model, rows = make_policy(hidden_dropout=0.5), train_rows()[Task.SFT]
    before = torch.get_rng_state()
    evaluate(Task.SFT, model, rows)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_by_length_cover_every_row_once_and_grow() -> None:
    rows = train_rows()[Task.DPO]
    batches = [list(batch) for batch in by_length(range(len(rows)), rows, 4)]
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    lengths = [row_length(rows[i]) for batch in batches for i in batch]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def test_summary_names_carry_the_objective() -> None:
    summary = held_out_summary({Task.SFT: {"loss": 1.0}, Task.DPO: {"loss": 2.0, "margin": 3.0}})
    assert summary == {"sft_loss": 1.0, "dpo_loss": 2.0, "dpo_margin": 3.0}
