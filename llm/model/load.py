"""Loading a policy and its tokenizer: whole models, LoRA adapters, 4-bit bases.

Every failure is one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.utils.peft_utils import find_adapter_config_file

from llm.flags.arguments import ModelArguments
from theory.cli import UserError


def load_tokenizer(arguments: ModelArguments) -> Any:
    """The tokenizer of the model, with a pad token (EOS if it has none: padding is masked)."""
    name = arguments.model_name_or_path
    try:
        tokenizer = _load(AutoTokenizer, name, arguments.model_revision, arguments)
    except UserError:  # many adapters come without one
        adapter = _adapter_config(name, arguments.model_revision)
        if adapter is None:
            raise
        tokenizer = _load(AutoTokenizer, *_base_of(adapter), arguments)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no EOS token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(arguments: ModelArguments) -> Any:
    """The configuration of the model (of the base under an adapter), without any weights."""
    name, revision = arguments.model_name_or_path, arguments.model_revision
    adapter = _adapter_config(name, revision)
    source = (name, revision) if adapter is None else _base_of(adapter)
    return _load(AutoConfig, *source, arguments)


def load_policy(arguments: ModelArguments) -> Any:
    """The model to train, on the CPU (4-bit weights: where bitsandbytes puts them).

    An adapter comes with its base under it and goes on being trained.
    """
    return _load_model(arguments, arguments.model_name_or_path, arguments.model_revision, True)


def check_router(model: Any, name: str | None) -> None:
    """Refuse to train a mixture of experts that asks for a loss besides the two objectives."""
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise UserError(
            f"{name} asks for an auxiliary loss of its router, which is no part of f_SFT or f_DPO: "
            "set output_router_logits to false in its config.json"
        )


def load_reference(arguments: ModelArguments) -> Any:
    """The model of `--reference`, a whole one or an adapter, loaded as the policy is."""
    return _load_model(arguments, arguments.reference, arguments.reference_revision, False)


def load_adapted(arguments: ModelArguments) -> tuple[PreTrainedModel, Callable[[Any], PeftModel]]:
    """The base of the adapter `model_name_or_path`, and what puts the adapter onto such a base."""
    name, revision = arguments.model_name_or_path, arguments.model_revision
    adapter = _adapter_config(name, revision)
    if adapter is None:
        raise UserError(f"{name} holds no adapter (adapter_config.json)")
    base = _load_whole(arguments, *_base_of(adapter))
    return base, lambda model: _with_adapter(model, name, revision, trainable=False)


def with_adapters(model: Any, arguments: ModelArguments) -> Any:
    """The model itself, or with fresh LoRA adapters around it (`use_peft` and it has none).

    A fresh adapter changes nothing yet (its B is 0), so the reference's log-probabilities can be
    taken from the model before it is wrapped: no second model is held in memory.
    """
    if not arguments.use_peft or isinstance(model, PeftModel):
        return model
    targets: Any = arguments.lora_target_modules
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        revision=arguments.model_revision,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora_target_modules: {str(error).splitlines()[0]}") from error


def stop_at(model: Any, ends: Iterable[int]) -> Any:
    """The model, whose generation ends at these tokens as well: at the ends of the answers that it
    is trained on. What it saves says so."""
    config = getattr(model, "generation_config", None)
    if config is not None:
        own = config.eos_token_id
        known = own if isinstance(own, list) else [own] * (own is not None)
        added = sorted(set(ends) - set(known))
        config.eos_token_id = [*known, *added] if added else own
    return model


def _load_model(
    arguments: ModelArguments, name: str | None, revision: str, trainable: bool
) -> PreTrainedModel | PeftModel:
    adapter = _adapter_config(name, revision)
    model = _load_whole(arguments, *((name, revision) if adapter is None else _base_of(adapter)))
    if arguments.load_in_4bit:
        # Freezes the base and keeps norms and heads in float32. Trainer switches checkpointing on.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        _keep_differentiable(model)
    return model if adapter is None else _with_adapter(model, name, revision, trainable)


def _load_whole(arguments: ModelArguments, name: str | None, revision: str) -> PreTrainedModel:
    dtype: Any = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    options: dict[str, Any] = {"attn_implementation": arguments.attn_implementation, "dtype": dtype}
    if arguments.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
        )
    # Weights that a checkpoint lacks are drawn: the same ones at every load, and the state of
    # the generator does not depend on how often a policy was loaded.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _load(AutoModelForCausalLM, name, revision, arguments, **options)


def _keep_differentiable(model: PreTrainedModel) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes repacks 4-bit weights when the model is evaluated.

    It would go on to use them in training, where they pass no gradient on, and without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def _with_adapter(model: Any, name: str | None, revision: str, trainable: bool) -> PeftModel:
    try:
        return PeftModel.from_pretrained(
            model, str(name), is_trainable=trainable, revision=revision
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load the adapter {name}: {_first_line(error)}") from error


def _adapter_config(name: str | None, revision: str) -> PeftConfig | None:
    """Of the adapter called `name`; None if that is no adapter (or nothing at all)."""
    try:
        if find_adapter_config_file(str(name), revision=revision) is None:
            return None
        config = PeftConfig.from_pretrained(str(name), revision=revision)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot load the adapter {name}: {_first_line(error)}") from error
    if config.base_model_name_or_path is None:
        raise UserError(f"the adapter {name} does not say which model it belongs to")
    return config


def _base_of(adapter: PeftConfig) -> tuple[str, str]:
    """Name and revision of the model under an adapter."""
    return str(adapter.base_model_name_or_path), adapter.revision or "main"


def _load(
    kind: Any, name: str | None, revision: str, arguments: ModelArguments, **options: Any
) -> Any:
    try:
        return kind.from_pretrained(
            name, revision=revision, trust_remote_code=arguments.trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        raise UserError(
            f"cannot load {name} as a causal language model: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
