"""Loading a policy and its tokenizer; every failure is one line."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llm.config import ModelArguments
from theory.cli import UserError


def load_tokenizer(arguments: ModelArguments) -> Any:
    """The tokenizer of the model, with a pad token (EOS if it has none: padding is masked)."""
    tokenizer = _load(AutoTokenizer, arguments.model_name_or_path, arguments)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {arguments.model_name_or_path} has no EOS token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(arguments: ModelArguments, name: str | None = None) -> PreTrainedModel:
    """The causal language model called `name` (default: the policy), on the CPU."""
    dtype: Any = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    return _load(
        AutoModelForCausalLM,
        name or arguments.model_name_or_path,
        arguments,
        dtype=dtype,
        attn_implementation=arguments.attn_implementation,
    )


def with_adapters(model: Any, arguments: ModelArguments) -> Any:
    """The model itself, or with fresh LoRA adapters around it (`use_peft`).

    A fresh adapter changes nothing yet (its B is 0), so the reference's log-probabilities can be
    taken from the wrapped policy before training: no second model is held in memory.
    """
    if not arguments.use_peft:
        return model
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.lora_target_modules,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora_target_modules: {str(error).splitlines()[0]}") from error


def _load(kind: Any, name: str | None, arguments: ModelArguments, **options: Any) -> Any:
    try:
        return kind.from_pretrained(
            name,
            revision=arguments.model_revision,
            trust_remote_code=arguments.trust_remote_code,
            **options,
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load {name} as a causal language model: {first}") from error
