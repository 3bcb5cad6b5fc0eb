"""From a validated configuration to everything that training needs: model, rows, reference.

One path for the embedded default and for a user's own model and data; only where the raw material
comes from differs.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, enable_full_determinism, set_seed

from llm.data import embedded
from llm.data.chat import set_chat_template
from llm.data.checks import check_max_length, check_shares, with_leaks_noted
from llm.data.encode import Encoded, encode_preference, encode_sft
from llm.data.sources import load_sources
from llm.data.templates import fixed_date
from llm.flags.arguments import RunConfig
from llm.loss.kl import ReferenceSamples
from llm.loss.objectives import DPOObjective, LanguageObjective, Row, SFTObjective
from llm.model.isolation import layout_problem
from llm.model.load import (
    check_router,
    load_policy,
    load_tokenizer,
    stop_at,
    with_adapters,
)
from llm.model.reference import (
    add_reference_logps,
    check_reference,
    check_start,
    mixed_precision,
    reference_model,
    starts_at_reference,
    weights_digest,
)
from llm.model.samples import samples_of_run
from llm.train.free import RESUME, counting
from llm.train.noise import Dropout
from llm.train.streams import open_streams, steps_per_epoch
from llm.train.trainer import JointTrainer
from llm.train.values import split_values
from theory.cli import UserError
from theory.registry import make_scheduler
from theory.scheduling import Scheduler
from theory.tasks import Task

DATE_FILE = "template_date.txt"
"""In the output directory of a run whose chat template shows a date."""
ENCODERS = {Task.DPO: encode_preference, Task.SFT: encode_sft}


@dataclass(frozen=True)
class Setup:
    """What a run trains on. `new_policy()` gives a fresh copy of the initial policy."""

    tokenizer: Any
    new_policy: Callable[[], Any]
    objectives: Mapping[Task, LanguageObjective]
    train: Mapping[Task, Encoded]
    held_out: Mapping[Task, Encoded]
    policy: str
    """What the initial policy is: a digest of its weights and configuration, or its seed."""
    reference_samples: ReferenceSamples | None = None


Raw = dict[Task, tuple[Any, Any]]
"""Raw rows to train on and to hold out, per task."""


def prepare(config: RunConfig, say: Callable[[str], None] = print) -> Setup:
    """Load, tokenise, compute the reference's log-probabilities and check the starting point."""
    if config.training.full_determinism:
        # CUDA reads its settings at the first product, which is the reference's, not Trainer's.
        enable_full_determinism(config.training.seed)
    tokenizer, raw = read_data(config, say)
    policies = _embedded_policies(config, tokenizer) if config.embedded else _own_policies(config)
    policy = policies.first
    check_reference(config, policy)
    check_router(policy, config.model.model_name_or_path)
    identity = _identity_of(config, policy)
    train, held_out = encode_data(config, tokenizer, raw, policy.config, say)
    check_data(config, (train, held_out))
    training, pad = config.training, tokenizer.pad_token_id
    rows = [row for part in (train, held_out) for each in part.values() for row in each.rows]
    packing, samples = _packs(config, policy, "model_name_or_path", rows, pad, say), None
    with reference_model(config, policy) if Task.DPO in raw else nullcontext() as reference:
        if reference is not None and not starts_at_reference(config, policy):
            packing &= _packs(config, reference, "reference", rows, pad, say)
        if not packing and training.max_tokens_per_batch is not None:
            raise UserError("--max_tokens_per_batch needs packing, and this model has none")
        loss = (training.beta, training.loss_type, training.label_smoothing)
        objectives: dict[Task, LanguageObjective] = {
            Task.DPO: DPOObjective(*loss, packing=packing),
            Task.SFT: SFTObjective(packing=packing),
        }
        if reference is not None:
            fresh = config.model.lora_dropout if config.model.use_peft else 0.0
            off = training.disable_dropout and Task.DPO in config.tasks
            if off and (fresh or Dropout(policy).rates):
                say("dropout is off where DPO is computed (--disable_dropout false leaves it on)")
            pairs = [part[Task.DPO] for part in (train, held_out)]
            pairs = add_reference_logps(config, reference, pad, pairs, say, packing=packing)
            train[Task.DPO], held_out[Task.DPO] = pairs
            if starts_at_reference(config, policy):
                check_start(config, policy, objectives[Task.DPO], pairs[0].rows, pad)
            samples = samples_of_run(
                config, reference, tokenizer, pairs[1].rows, say, packing=packing
            )
    return Setup(
        tokenizer,
        lambda: with_adapters(policies(), config.model),
        {task: objectives[task] for task in raw},
        train,
        held_out,
        identity,
        samples,
    )


def _packs(
    config: RunConfig,
    model: Any,
    flag: str,
    rows: Sequence[Row],
    pad_token_id: int,
    say: Callable[[str], None],
) -> bool:
    """Whether to pack: `--packing`, unless the model gives other values then (which is said).

    Raises:
        UserError: padded, it gives other values as well (`llm.model.isolation`).
    """
    own, asked = getattr(config.model, flag), config.training.packing
    name = "the embedded model" if own is None else f"--{flag} {own}"
    model.to(device=config.training.device)
    with mixed_precision(config.training):
        problem = layout_problem(model, name, rows, pad_token_id, packing=asked)
    if problem is not None:
        say(f"batches are padded, not packed: {name}: {problem}")
    return asked and problem is None


class _Policies:
    """Fresh copies of the initial policy. The first one is what `prepare` looked at: a run that
    trains one model loads it once."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load, self._first = load, load()

    @property
    def first(self) -> Any:
        return self._first

    def __call__(self) -> Any:
        policy, self._first = self._first, None
        return self._load() if policy is None else policy


def read_data(config: RunConfig, say: Callable[[str], None]) -> tuple[Any, Raw]:
    """The tokenizer and the raw rows: the user's own, or the embedded corpus."""
    if not config.embedded:
        tokenizer = load_tokenizer(config.model)
        set_chat_template(tokenizer, config.data.chat_template)
        return tokenizer, _own_rows(config, say)
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
    today = date_of_run(config, tokenizer, say, keep=config.training.process_index == 0)
    for task, parts in raw.items():
        length = check_max_length(config.max_length(task), model_config, tokenizer)
        for rows, part, into in zip(parts, ("train", "held-out"), (train, held_out), strict=True):
            name = f"{task.label} {part}"
            encoded = ENCODERS[task](
                rows, tokenizer, **encoding_options(config, task, length, today), name=name
            )
            into[task] = with_leaks_noted(encoded, train[task]) if task in train else encoded
            say(into[task].report.line(name))
    return train, held_out


def date_of_run(
    config: RunConfig, tokenizer: Any, say: Callable[[str], None], *, keep: bool
) -> date:
    """Today, for chat templates that show it; a run that is resumed keeps its own."""
    file = Path(config.output_dir) / DATE_FILE
    if keep and config.training.overwrite_output_dir and not config.training.resume_from_checkpoint:
        file.unlink(missing_ok=True)
    return fixed_date(tokenizer, config.data.template_date, file, keep=keep, say=say)


def encoding_options(config: RunConfig, task: Task, max_length: int, today: date) -> dict[str, Any]:
    """What the flags say about encoding rows of `task`."""
    data = config.data
    return {
        "max_length": max_length,
        "truncation_mode": data.truncation_mode,
        "columns": data.columns(task),
        "train_on": data.train_on,
        "date": today,
        "workers": data.preprocessing_num_workers,
    }


def check_data(config: RunConfig, parts: Sequence[Mapping[Task, Encoded]]) -> None:
    """Refuse data of which more is dropped, truncated or leaked than the flags allow."""
    data = config.data
    for part in parts:
        for encoded in part.values():
            check_shares(
                encoded,
                max_dropped=data.max_dropped_share,
                max_truncated=data.max_truncated_share,
                max_leaked=data.max_leaked_share,
            )


def _own_rows(config: RunConfig, say: Callable[[str], None]) -> Raw:
    """The user's data. Both objectives are read if both are named."""
    return {
        task: _own_rows_of(config, task, say)
        for task in Task
        if getattr(config.data, f"{task.label}_dataset") is not None
    }


def _own_rows_of(config: RunConfig, task: Task, say: Callable[[str], None]) -> tuple[Any, Any]:
    """Rows to train on, and the rows to hold out: named ones, or a random share of the others."""
    data = config.data
    own: dict[str, Any] = {
        name: getattr(data, f"{task.label}_{name}")
        for name in ("dataset", "eval_dataset", "dataset_config", "train_split", "eval_split")
    }

    def read(sources: list[str], split: str | None, limit: int | None) -> Any:
        name = own["dataset_config"] if sources == own["dataset"] else None
        return load_sources(
            sources, split=split, config_name=name, limit=limit, streaming=data.streaming
        )

    rows = read(own["dataset"], own["train_split"], config.max_train_rows(task))
    if own["eval_dataset"] or own["eval_split"]:
        sources = [own["eval_dataset"]] if own["eval_dataset"] else own["dataset"]
        return rows, read(sources, own["eval_split"], data.max_eval_rows)
    if len(rows) < 2:
        raise UserError(f"{task.label}: {len(rows)} rows are too few to hold some of them out")
    parts = rows.train_test_split(test_size=data.held_out, seed=config.training.seed)
    held_out = parts["test"]
    if data.max_eval_rows is not None:
        held_out = held_out.select(range(min(data.max_eval_rows, len(held_out))))
    say(f"{task.label}: no evaluation set named, {len(held_out)} rows held out")
    return parts["train"], held_out


def _identity_of(config: RunConfig, policy: Any) -> str:
    """The embedded policy is trained here, and another machine rounds otherwise."""
    return f"embedded, seed {config.training.seed}" if config.embedded else weights_digest(policy)


def _own_policies(config: RunConfig) -> _Policies:
    return _Policies(lambda: load_policy(config.model))


def _corpus(config: RunConfig) -> embedded.Corpus:
    return embedded.generate_corpus(config.data.conflict, seed=config.training.seed)


def _embedded_policies(config: RunConfig, tokenizer: Any) -> _Policies:
    """The tiny model, trained on the neutral part of the corpus."""
    base = embedded.build_model(tokenizer, config.training.seed)
    _train_base(base, tokenizer, _corpus(config), config)
    base = base.cpu()
    return _Policies(lambda: copy.deepcopy(base))


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
    if arguments.device.type == "cuda":
        gc.collect()  # an earlier trainer is part of a cycle, and holds its model until then
    set_seed(arguments.seed)
    rows, value_rows = split_values(
        arguments, scheduler, {task: setup.train[task].rows for task in tasks}
    )
    return JointTrainer(
        model=stop_at(
            setup.new_policy(), (end for part in setup.train.values() for end in part.ends)
        ),
        args=arguments,
        scheduler=scheduler,
        objectives=setup.objectives,
        train_rows=rows,
        value_rows=value_rows,
        reference_samples=setup.reference_samples if Task.DPO in evaluated else None,
        eval_rows={task: setup.held_out[task].rows for task in evaluated if task in setup.held_out},
        batch_sizes={task: config.training.batch_size(task) for task in tasks},
        processing_class=setup.tokenizer,
        callbacks=callbacks,
        description=description,
        settings=counting(config.model, config.data, free=RESUME),
    )


def total_steps(setup: Setup, config: RunConfig) -> int:
    """Optimiser steps of the run: max_steps, or num_train_epochs passes over the longer set."""
    training = config.training
    if training.max_steps > 0:
        return training.max_steps
    rows = {task: setup.train[task].rows for task in config.tasks}
    streams = open_streams(rows, {task: training.batch_size(task) for task in rows}, training)
    return math.ceil(training.num_train_epochs * steps_per_epoch(streams, training))
