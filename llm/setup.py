"""From a validated configuration to everything that training needs: model, rows, reference.

One path for the embedded default and for a user's own model and data; only where the raw material
comes from differs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments, set_seed

from llm import embedded
from llm.config import RunConfig
from llm.data import Encoded, check_max_length, encode_preference, encode_sft
from llm.evaluate import evaluate_objective, with_reference_logps
from llm.formats import load_rows
from llm.models import load_model, load_tokenizer, with_adapters
from llm.objectives import DPOObjective, LanguageObjective, SFTObjective
from llm.trainer import JointTrainer, steps_per_epoch
from theory.cli import UserError
from theory.schedulers import Scheduler, make_scheduler
from theory.tasks import Task

ENCODERS = {Task.DPO: encode_preference, Task.SFT: encode_sft}
LOG2_TOLERANCE = 1e-3
"""At the reference itself the DPO loss is log 2; bfloat16 in other batch shapes differs by less."""


@dataclass(frozen=True)
class Setup:
    """What a run trains on. `new_policy()` gives a fresh copy of the initial policy."""

    tokenizer: Any
    new_policy: Callable[[], Any]
    objectives: Mapping[Task, LanguageObjective]
    train: Mapping[Task, Encoded]
    held_out: Mapping[Task, Encoded]


Raw = dict[Task, tuple[Any, Any]]
"""Raw rows to train on and to hold out, per task."""


def prepare(config: RunConfig, say: Callable[[str], None] = print) -> Setup:
    """Load, tokenise, compute the reference's log-probabilities and check the starting point."""
    tokenizer, raw = read_data(config, say)
    base = _embedded_policy(config, tokenizer) if config.embedded else _own_policy(config)
    policy = base()
    train, held_out = encode_data(config, tokenizer, raw, policy.config, say)
    training = config.training
    objectives: dict[Task, LanguageObjective] = {
        Task.DPO: DPOObjective(training.beta, training.loss_type, training.label_smoothing),
        Task.SFT: SFTObjective(),
    }
    if Task.DPO in raw:
        _add_reference(config, policy, tokenizer, (train, held_out), say)
    setup = Setup(
        tokenizer,
        lambda: with_adapters(base(), config.model),
        {task: objectives[task] for task in raw},
        train,
        held_out,
    )
    if Task.DPO in raw and config.model.reference == "initial":
        _check_start(config, policy, setup)
    return setup


def read_data(config: RunConfig, say: Callable[[str], None]) -> tuple[Any, Raw]:
    """The tokenizer and the raw rows: the user's own, or the embedded corpus."""
    if not config.embedded:
        return load_tokenizer(config.model), _own_rows(config, say)
    corpus = _corpus(config)
    parts = {
        Task.DPO: (corpus.dpo_train, corpus.dpo_eval),
        Task.SFT: (corpus.sft_train, corpus.sft_eval),
    }
    limit = config.data.max_eval_rows
    raw: Raw = {
        task: (train[: config.max_train_rows(task)], held_out[:limit])
        for task, (train, held_out) in parts.items()
    }
    return embedded.build_tokenizer(), raw


def encode_data(
    config: RunConfig, tokenizer: Any, raw: Raw, model_config: Any, say: Callable[[str], None]
) -> tuple[dict[Task, Encoded], dict[Task, Encoded]]:
    """Tokenised rows to train on and to hold out; says what was kept, cut and dropped."""
    train: dict[Task, Encoded] = {}
    held_out: dict[Task, Encoded] = {}
    for task, parts in raw.items():
        length = check_max_length(config.max_length(task), model_config, tokenizer)
        for rows, part, into in zip(parts, ("train", "held-out"), (train, held_out), strict=True):
            name = f"{task.label} {part}"
            into[task] = _encode(task, rows, tokenizer, length, config.data.truncation_mode, name)
            say(into[task].report.line(name))
    return train, held_out


def _encode(
    task: Task, rows: Any, tokenizer: Any, length: int, truncation_mode: str, name: str
) -> Encoded:
    return ENCODERS[task](
        rows, tokenizer, max_length=length, truncation_mode=truncation_mode, name=name
    )


def _own_rows(config: RunConfig, say: Callable[[str], None]) -> Raw:
    """The user's data. Both objectives are read if both are named."""
    data = config.data
    raw: Raw = {}
    for task in Task:
        source = getattr(data, f"{task.label}_dataset")
        if source is None:
            continue
        rows = load_rows(source, limit=config.max_train_rows(task))
        held_out_source = getattr(data, f"{task.label}_eval_dataset")
        if held_out_source is not None:
            held_out = load_rows(held_out_source, split=None, limit=data.max_eval_rows)
        else:
            parts = rows.train_test_split(test_size=data.held_out, seed=config.training.seed)
            rows, held_out = parts["train"], parts["test"]
            if data.max_eval_rows is not None:
                held_out = held_out.select(range(min(data.max_eval_rows, len(held_out))))
            say(f"{task.label}: no evaluation set named, {len(held_out)} rows held out")
        raw[task] = (rows, held_out)
    return raw


def _own_policy(config: RunConfig) -> Callable[[], Any]:
    return lambda: load_model(config.model)


def _corpus(config: RunConfig) -> embedded.Corpus:
    return embedded.generate_corpus(config.data.conflict, seed=config.training.seed)


def _embedded_policy(config: RunConfig, tokenizer: Any) -> Callable[[], Any]:
    """The tiny model, trained on the neutral part of the corpus."""
    base = embedded.build_model(tokenizer, config.training.seed)
    _train_base(base, tokenizer, _corpus(config), config)
    base = base.cpu()
    return lambda: copy.deepcopy(base)


def _train_base(base: Any, tokenizer: Any, corpus: embedded.Corpus, config: RunConfig) -> None:
    """SFT on the neutral corpus, by the same trainer as everything else."""
    neutral = encode_sft(corpus.neutral, tokenizer, max_length=64, name="neutral")
    JointTrainer(
        model=base,
        args=TrainingArguments(
            output_dir=config.output_dir,
            logging_steps=50,
            max_steps=embedded.BASE_STEPS,
            learning_rate=embedded.BASE_LEARNING_RATE,
            save_strategy="no",
            report_to="none",
            use_cpu=config.training.use_cpu,
            disable_tqdm=config.training.disable_tqdm,
            seed=config.training.seed,
        ),
        scheduler=make_scheduler("sft"),
        objectives={Task.SFT: SFTObjective()},
        train_rows={Task.SFT: neutral.rows},
        batch_sizes={Task.SFT: embedded.BASE_BATCH_SIZE},
        processing_class=tokenizer,
        description="embedded base model",
    ).train()


def _add_reference(
    config: RunConfig,
    policy: Any,
    tokenizer: Any,
    parts: tuple[dict[Task, Encoded], dict[Task, Encoded]],
    say: Callable[[str], None],
) -> None:
    """Replace the preference rows by rows that carry the reference's log-probabilities."""
    name = config.model.reference
    reference: Any = policy if name == "initial" else load_model(config.model, name)
    if name != "initial" and reference.config.vocab_size != policy.config.vocab_size:
        raise UserError(f"--reference {name} has another vocabulary than the policy")
    say(f"computing the reference's log-probabilities ({name})")
    reference.to(device=config.training.device)
    for part in parts:
        with _precision(config.training):
            rows = with_reference_logps(
                reference,
                part[Task.DPO].rows,
                batch_size=config.training.per_device_eval_batch_size,
                pad_token_id=tokenizer.pad_token_id,
            )
        part[Task.DPO] = replace(part[Task.DPO], rows=rows)


def _precision(training: TrainingArguments) -> torch.autocast:
    """The mixed precision of the training: a reference in another one is another model."""
    return torch.autocast(
        training.device.type,
        dtype=torch.float16 if training.fp16 else torch.bfloat16,
        enabled=training.fp16 or training.bf16,
    )


def _check_start(config: RunConfig, policy: Any, setup: Setup) -> None:
    """The policy is its own reference here: every reward is 0 and the loss log 2 (sigmoid)."""
    objective = setup.objectives[Task.DPO]
    with _precision(config.training):
        start = evaluate_objective(
            policy,
            objective,
            setup.train[Task.DPO].rows[: 4 * config.training.per_device_eval_batch_size],
            batch_size=config.training.per_device_eval_batch_size,
            pad_token_id=setup.tokenizer.pad_token_id,
        )
    if abs(start["reward_margin"]) > LOG2_TOLERANCE:
        raise UserError(
            f"the policy starts with a mean reward margin of {start['reward_margin']:.2e} against "
            "itself as the reference: is something in the model random in evaluation mode?"
        )
    if config.training.loss_type == "sigmoid" and abs(start["loss"] - np.log(2)) > LOG2_TOLERANCE:
        raise UserError(f"the DPO loss starts at {start['loss']:.4f}, not at log 2 = 0.6931")


def make_trainer(
    setup: Setup,
    config: RunConfig,
    arguments: TrainingArguments,
    scheduler: Scheduler,
    tasks: Sequence[Task],
    *,
    evaluated: Sequence[Task] = tuple(Task),
    callbacks: list[Any] | None = None,
    description: str = "training",
) -> JointTrainer:
    """A trainer for a fresh copy of the initial policy; it trains on `tasks`."""
    set_seed(arguments.seed)
    return JointTrainer(
        model=setup.new_policy(),
        args=arguments,
        scheduler=scheduler,
        objectives=setup.objectives,
        train_rows={task: setup.train[task].rows for task in tasks},
        eval_rows={task: setup.held_out[task].rows for task in evaluated if task in setup.held_out},
        batch_sizes={task: config.training.batch_size(task) for task in tasks},
        processing_class=setup.tokenizer,
        callbacks=callbacks,
        description=description,
    )


def total_steps(setup: Setup, config: RunConfig) -> int:
    """Optimiser steps of the run: max_steps, or num_train_epochs passes over the longer set."""
    training = config.training
    if training.max_steps > 0:
        return training.max_steps
    sizes = {task: len(setup.train[task].rows) for task in config.tasks}
    batches = {task: training.batch_size(task) for task in config.tasks}
    return math.ceil(training.num_train_epochs * steps_per_epoch(sizes, batches, training))
