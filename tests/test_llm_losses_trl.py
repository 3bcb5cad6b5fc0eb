"""llm.loss.losses against TRL's trainers, on rows of different lengths."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from _tiny import PAD_ID, TOKENIZER, make_policy

from llm.data.encode import encode_preference, encode_sft
from llm.loss.collate import collate_preference, collate_sft
from llm.loss.losses import dpo_loss, response_lengths, sequence_logps, sft_loss, token_logps

pytestmark = [
    # TRL 1.16 uses two names that transformers 5 has replaced.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.usefixtures("same_threads"),
]
PAIRS = [
    {"prompt": "how do i clean a lamp ?", "chosen": " with a cloth .", "rejected": " ask"},
    {"prompt": "clean", "chosen": " a", "rejected": " ask an expert . ask an expert ."},
    {"prompt": "a lamp", "chosen": " with a cloth .", "rejected": " ask an expert ."},
]
OPTIONS: dict[str, Any] = {"report_to": "none", "use_cpu": True, "bf16": False, "max_length": 32}


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """A policy and its reference, far from uniform: losses that are not all alike."""
    policy, reference = (make_policy(seed, initializer_range=0.5).eval() for seed in (0, 1))
    return policy, reference


def our_terms(models: tuple[Any, Any], **options: Any) -> torch.Tensor:
    rows = encode_preference(PAIRS, TOKENIZER, max_length=32, name="pairs").rows
    batch = collate_preference(rows, PAD_ID)
    labels = batch.pop("labels")
    with torch.no_grad():
        policy, reference = (sequence_logps(model(**batch).logits, labels) for model in models)
    lengths = response_lengths(labels).chunk(2)
    return dpo_loss(
        *policy.chunk(2),
        *reference.chunk(2),
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
        **options,
    ).losses


def trl_dpo_loss(models: tuple[Any, Any], folder: Any, **options: Any) -> float:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    policy, reference = (copy.deepcopy(model) for model in models)
    arguments = trl.DPOConfig(output_dir=str(folder), **OPTIONS, **options)
    trainer = trl.DPOTrainer(
        policy,
        ref_model=reference,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=copy.deepcopy(TOKENIZER),
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    policy.eval()
    with torch.no_grad():
        return float(trainer.compute_loss(policy, batch))


@pytest.mark.parametrize(
    ("loss_type", "eps"),
    [
        ("sigmoid", 0.0),
        ("ipo", 0.0),
        ("hinge", 0.0),
        ("robust", 0.1),
        ("sigmoid_norm", 0.0),
    ],
)
def test_dpo_losses_equal_trl(models: Any, tmp_path: Any, loss_type: str, eps: float) -> None:
    options = {"beta": 0.3, "loss_type": loss_type, "label_smoothing": eps}
    theirs = trl_dpo_loss(models, tmp_path, **options)
    ours = our_terms(models, **options)
    assert ours.std() > 1e-3  # the pairs differ: agreement is not an accident of symmetry
    assert ours.mean().item() == pytest.approx(theirs, abs=1e-5)


def test_trl_ignores_label_smoothing_of_sigmoid_and_we_do_not(models: Any, tmp_path: Any) -> None:
    smoothed = trl_dpo_loss(models, tmp_path, beta=0.3, label_smoothing=0.2)
    plain = our_terms(models, beta=0.3)
    assert smoothed == pytest.approx(plain.mean().item(), abs=1e-5)
    flipped = [loss - log_loss_swap(loss) for loss in plain.tolist()]
    conservative = [0.8 * a + 0.2 * b for a, b in zip(plain.tolist(), flipped, strict=True)]
    ours = our_terms(models, beta=0.3, label_smoothing=0.2)
    assert ours.tolist() == pytest.approx(conservative, abs=1e-5)
    assert abs(ours.mean().item() - smoothed) > 1e-3


def log_loss_swap(loss: float) -> float:
    """The difference -log s(x) + log s(-x) = -x, with x recovered from loss = -log s(x)."""
    return math.log(math.expm1(loss))


def test_sft_loss_equals_trl(models: Any, tmp_path: Any) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": pair["prompt"], "completion": pair["rejected"]} for pair in PAIRS]
    trainer = trl.SFTTrainer(
        copy.deepcopy(models[0]),
        args=trl.SFTConfig(output_dir=str(tmp_path), **OPTIONS),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=copy.deepcopy(TOKENIZER),
    )
    trainer.model.eval()
    with torch.no_grad():
        theirs = trainer.compute_loss(
            trainer.model, trainer.data_collator(list(trainer.train_dataset))
        )
        encoded = encode_sft(rows, TOKENIZER, max_length=32, name="sft").rows
        batch = collate_sft(encoded, PAD_ID)
        labels = batch.pop("labels")
        ours = sft_loss(*token_logps(models[0](**batch).logits, labels))
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
