"""The models of the benchmark: architectures with random weights, and their training settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)

SEED = 0
EOS = 0
"""Token id that ends every response, and pads."""


@dataclass(frozen=True)
class Batches:
    """Rows (pairs) of a batch of each objective; a round has `number` batches of each."""

    sft: int
    dpo: int
    number: int


@dataclass(frozen=True)
class Shape:
    """An architecture and how it is trained. `lora_rank` 0 means all weights."""

    name: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    max_length: int
    alone: Batches
    """Of the suites on one objective."""
    joint: Batches
    """Of the suites on both."""
    kv_heads: int | None = None
    """Set for Llama; else the model is a GPT-NeoX (Pythia)."""
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    checkpointing: bool = False
    """Activation checkpointing, for every contender."""

    def config(self) -> PreTrainedConfig:
        common: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_length,
            "tie_word_embeddings": False,
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), EOS),
        }
        if self.kv_heads is not None:
            return LlamaConfig(**common, num_key_value_heads=self.kv_heads)
        return GPTNeoXConfig(**common, hidden_dropout=0.0, attention_dropout=0.0)

    def lora(self) -> LoraConfig | None:
        if not self.lora_rank:
            return None
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=self.lora_rank,
            lora_alpha=self.lora_rank,
            target_modules=list(self.lora_targets),
        )

    @property
    def forward_share(self) -> float:
        """Share of a step's work that one forward pass is: 1/3 when all weights are trained."""
        backward = 1.0 if self.lora_rank else 2.0
        return 1.0 / (1.0 + backward + self.checkpointing)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 128, 16, 1, 2, 32, 128, Batches(2, 2, 2), Batches(2, 2, 2)),
        Shape("small", 8192, 256, 6, 4, 1024, 512, Batches(8, 8, 2), Batches(8, 8, 5)),
        Shape(
            *("pythia-1b", 50304, 2048, 16, 8, 8192, 2048),
            *(Batches(12, 4, 32), Batches(12, 4, 20)),
            lora_rank=32,
            lora_targets=("query_key_value",),
        ),
        Shape(
            *("llama-3-8b", 128256, 4096, 32, 32, 14336, 2048),
            *(Batches(4, 1, 16), Batches(4, 1, 10)),
            kv_heads=8,
            lora_rank=16,
            lora_targets=("q_proj", "v_proj"),
            checkpointing=True,
        ),
    )
}


def build_model(shape: Shape, device: torch.device, attention: str = "sdpa") -> PreTrainedModel:
    """Random weights, the same ones for every contender: float32 on a CPU, bfloat16 on CUDA."""
    set_seed(SEED)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        return AutoModelForCausalLM.from_config(
            shape.config(), dtype=dtype, attn_implementation=attention
        )


def with_adapters(model: PreTrainedModel, shape: Shape) -> Any:
    """The model as it is trained: itself, or inside its LoRA adapters."""
    lora = shape.lora()
    return model if lora is None else get_peft_model(model, lora)
