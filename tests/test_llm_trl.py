"""The losses next to TRL's, on the same models and rows."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from llm.data.encode import encode_preference, encode_sft
from llm.loss.collate import collate_preference
from llm.loss.forward import response_logps
from llm.loss.losses import dpo_loss
from llm.loss.objectives import SFTObjective

# TRL 1.16 uses two names that transformers 5 has replaced.
trl_warnings = pytest.mark.filterwarnings(
    "ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"
)

WORDS = list("abcdefgh")
PAIRS = [
    {"prompt": "a b c", "chosen": " d e", "rejected": " f"},
    {"prompt": "h", "chosen": " g", "rejected": " a b c d e"},
    {"prompt": "e e", "chosen": " b a", "rejected": " c a"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def models(tokenizer: Any) -> tuple[Any, Any]:
    """A tiny random policy and another one as its reference."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,  # far from uniform, so that the losses are not all alike
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(config).eval(), GPTNeoXForCausalLM(config).eval()


def our_terms(models: tuple[Any, Any], tokenizer: Any, **options: Any) -> torch.Tensor:
    rows = encode_preference(PAIRS, tokenizer, max_length=64, name="pairs").rows
    batch = collate_preference(rows, tokenizer.pad_token_id)
    with torch.no_grad():
        policy, reference = (response_logps(model, batch) for model in models)
    lengths = policy.lengths().chunk(2)
    return dpo_loss(
        *policy.sums().chunk(2),
        *reference.sums().chunk(2),
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
        **options,
    ).losses


def trl_dpo_loss(models: tuple[Any, Any], tokenizer: Any, folder: Any, **options: Any) -> float:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    policy, reference = (copy.deepcopy(model) for model in models)
    arguments = trl.DPOConfig(
        output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, max_length=64, **options
    )
    trainer = trl.DPOTrainer(
        policy,
        ref_model=reference,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=copy.deepcopy(tokenizer),
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    policy.eval()
    with torch.no_grad():
        return float(trainer.compute_loss(policy, batch))


@trl_warnings
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
def test_dpo_losses_equal_trl(
    models: Any, tokenizer: Any, tmp_path: Any, loss_type: str, eps: float
) -> None:
    options = {"beta": 0.3, "loss_type": loss_type, "label_smoothing": eps}
    theirs = trl_dpo_loss(models, tokenizer, tmp_path, **options)
    ours = our_terms(models, tokenizer, **options)
    assert ours.std() > 1e-3  # the pairs differ: agreement is not an accident of symmetry
    assert ours.mean().item() == pytest.approx(theirs, abs=1e-5)


@trl_warnings
def test_trl_ignores_label_smoothing_of_sigmoid_and_we_do_not(
    models: Any, tokenizer: Any, tmp_path: Any
) -> None:
    smoothed = trl_dpo_loss(models, tokenizer, tmp_path, beta=0.3, label_smoothing=0.2)
    plain = our_terms(models, tokenizer, beta=0.3)
    assert smoothed == pytest.approx(plain.mean().item(), abs=1e-5)
    flipped = [loss - log_loss_swap(loss) for loss in plain.tolist()]
    conservative = [0.8 * a + 0.2 * b for a, b in zip(plain.tolist(), flipped, strict=True)]
    ours = our_terms(models, tokenizer, beta=0.3, label_smoothing=0.2)
    assert ours.tolist() == pytest.approx(conservative, abs=1e-5)
    assert abs(ours.mean().item() - smoothed) > 1e-3


def log_loss_swap(loss: float) -> float:
    """The difference -log s(x) + log s(-x) = -x, with x recovered from loss = -log s(x)."""
    return math.log(math.expm1(loss))


@trl_warnings
def test_sft_loss_equals_trl(models: Any, tokenizer: Any, tmp_path: Any) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": pair["prompt"], "completion": pair["rejected"]} for pair in PAIRS]
    trainer = trl.SFTTrainer(
        copy.deepcopy(models[0]),
        args=trl.SFTConfig(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_length=64
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=copy.deepcopy(tokenizer),
    )
    trainer.model.eval()
    with torch.no_grad():
        theirs = trainer.compute_loss(
            trainer.model, trainer.data_collator(list(trainer.train_dataset))
        )
        encoded = encode_sft(rows, tokenizer, max_length=64, name="sft").rows
        objective = SFTObjective(packing=False)
        total = objective(models[0], objective.collate(encoded, tokenizer.pad_token_id)).total
        ours = total / objective.items(encoded)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
