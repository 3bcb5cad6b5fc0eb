"""What the tests of `llm`'s training half share: a tiny policy, rows of the corpus, a trainer.

Everything runs in float32 on the CPU. The policy is a GPT-NeoX (Pythia's architecture, untied head)
of about 7,000 parameters, so that a step takes milliseconds.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _text import write_jsonl
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, set_seed

from llm.data import embedded
from llm.data.encode import encode_preference, encode_sft
from llm.flags.arguments import JointArguments
from llm.loss.evaluate import with_reference_logps
from llm.loss.kl import ReferenceSamples
from llm.loss.objectives import Batch, DPOObjective, LanguageObjective, Row, SFTObjective
from llm.train.trainer import JointTrainer
from theory.scheduling import Scheduler
from theory.tasks import Task

TOKENIZER = embedded.build_tokenizer()
PAD_ID = int(TOKENIZER.pad_token_id)
OBJECTIVES: dict[Task, LanguageObjective] = {Task.DPO: DPOObjective(), Task.SFT: SFTObjective()}
BATCH_SIZES = {Task.DPO: 2, Task.SFT: 3}
RowSets = dict[Task, list[Row]]


def make_policy(seed: int = 0, **overrides: Any) -> GPTNeoXForCausalLM:
    """An untrained GPT-NeoX; the same seed gives the same weights."""
    options = {
        "vocab_size": len(TOKENIZER),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bos_token_id": TOKENIZER.eos_token_id,
        "eos_token_id": TOKENIZER.eos_token_id,
        "pad_token_id": PAD_ID,
        "tie_word_embeddings": False,
    }
    set_seed(seed)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**(options | overrides)))


class _Says(torch.nn.Module):
    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **_: Any) -> Any:
        return SimpleNamespace(logits=self.logits)


def given(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.nn.Module, Batch]:
    """A model that says `logits` (B, T, V), and the padded batch with `labels` (B, T)."""
    return _Says(logits), {"input_ids": labels, "attention_mask": labels, "labels": labels}


@lru_cache(maxsize=1)
def _rows() -> tuple[RowSets, RowSets]:
    """Rows to train on (11 pairs, 17 demonstrations) and to hold out; the reference is seed 0."""
    corpus = embedded.generate_corpus(0.5, train_rows=17, eval_rows=7, seed=3)
    reference = make_policy()
    parts = []
    for pairs, demonstrations in (
        (corpus.dpo_train[:11], corpus.sft_train),
        (corpus.dpo_eval[:5], corpus.sft_eval),
    ):
        pairs = [_longer(row, "chosen") if i % 3 == 1 else row for i, row in enumerate(pairs)]
        demonstrations = [
            _longer(row, "completion") if i % 3 else row for i, row in enumerate(demonstrations)
        ]
        encoded = encode_preference(pairs, TOKENIZER, max_length=32, name="pairs").rows
        dpo = with_reference_logps(reference, encoded, batch_size=4, pad_token_id=PAD_ID)
        sft = encode_sft(demonstrations, TOKENIZER, max_length=32, name="demonstrations").rows
        parts.append({Task.DPO: dpo, Task.SFT: list(sft)})
    return parts[0], parts[1]


def _longer(row: dict[str, str], key: str) -> dict[str, str]:
    """The corpus has answers of 9 and 10 tokens; these have about 18."""
    return row | {key: 2 * row[key]}


def train_rows() -> RowSets:
    """Tokenised rows with responses of different lengths; a copy that a test may change."""
    return copy.deepcopy(_rows()[0])


def eval_rows() -> RowSets:
    return copy.deepcopy(_rows()[1])


def arguments(output_dir: Path, **overrides: Any) -> JointArguments:
    """Ten silent AdamW steps at a constant learning rate."""
    options: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": 10,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "per_device_eval_batch_size": 4,
        "seed": 0,
    }
    return JointArguments(**(options | overrides))


def plain_sgd(**overrides: Any) -> dict[str, Any]:
    """One step of SGD without clipping: the step is -learning_rate times the gradient."""
    return {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0} | overrides


def make_trainer(
    scheduler: Scheduler,
    output_dir: Path,
    *,
    model: torch.nn.Module | None = None,
    tasks: Sequence[Task] = tuple(Task),
    rows: Mapping[Task, list[Row]] | None = None,
    held_out: Mapping[Task, list[Row]] | None = None,
    batch_sizes: Mapping[Task, int] | None = None,
    objectives: Mapping[Task, LanguageObjective] | None = None,
    value_rows: Mapping[Task, list[Row]] | None = None,
    reference_samples: ReferenceSamples | None = None,
    **overrides: Any,
) -> JointTrainer:
    """A trainer of a fresh tiny policy on `tasks`."""
    rows, sizes = rows or train_rows(), batch_sizes or BATCH_SIZES
    return JointTrainer(
        model=make_policy() if model is None else model,
        args=arguments(output_dir, **overrides),
        scheduler=scheduler,
        objectives=objectives or OBJECTIVES,
        train_rows={task: rows[task] for task in tasks},
        eval_rows=held_out,
        value_rows=value_rows,
        reference_samples=reference_samples,
        batch_sizes={task: sizes[task] for task in tasks},
        processing_class=TOKENIZER,
    )


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_weights(
    actual: torch.nn.Module, expected: torch.nn.Module, tolerance: float = 0.0
) -> None:
    """Every weight equal, bit for bit unless a tolerance is given."""
    torch.testing.assert_close(
        actual.state_dict(), expected.state_dict(), rtol=tolerance, atol=tolerance
    )


def assert_moved(trained: torch.nn.Module, initial: torch.nn.Module) -> None:
    """Every parameter has moved: what follows does not compare two untrained models."""
    before = dict(initial.named_parameters())
    for name, value in trained.named_parameters():
        assert not torch.equal(value, before[name]), name


def own_sources(root: Path, train_rows: int = 40, eval_rows: int = 10) -> dict[str, str]:
    """A saved tiny model and a JSONL file for each data set, by the flag that names it."""
    make_policy().save_pretrained(root / "model")
    TOKENIZER.save_pretrained(root / "model")
    corpus = embedded.generate_corpus(train_rows=train_rows, eval_rows=eval_rows)
    sources = {"model_name_or_path": str(root / "model")}
    for part in ("sft_train", "dpo_train", "sft_eval", "dpo_eval"):
        name = part.removesuffix("_train")
        sources[f"{name}_dataset"] = write_jsonl(root / f"{name}.jsonl", getattr(corpus, part))
    return sources


def short_run(output_dir: Path, *flags: str) -> list[str]:
    """The command line of a run on the embedded corpus that takes about a second."""
    return [
        *("--use_cpu", "true", "--disable_tqdm", "true", "--output_dir", str(output_dir)),
        *("--max_steps", "8", "--warmup_steps", "2", "--eval_steps", "4", "--logging_steps", "2"),
        *("--max_train_rows", "48", "--max_eval_rows", "20"),
        *("--per_device_train_batch_size", "8"),
        *flags,
    ]
