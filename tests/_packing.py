"""What the tests of packed batches share: small models of many shapes, rows, gradients."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from llm.loss.attention import packed_attention
from llm.loss.forward import response_logps

VOCABULARY = 97
# Sums of up to 9 log-probabilities of order 5 in float32, relative to the largest of them.
FLOAT32 = 1e-5

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GROUPED = _SIZES | {"num_key_value_heads": 2, "intermediate_size": 64}
SHAPES: dict[str, PreTrainedConfig] = {
    "gpt_neox": GPTNeoXConfig(**_SIZES, intermediate_size=64),
    "llama": LlamaConfig(**GROUPED),
    "opt": OPTConfig(**_SIZES, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "gpt2": GPT2Config(**_SIZES, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "sliding window": MistralConfig(**GROUPED, sliding_window=5),
    "experts": MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "logits scaled after the head": GraniteConfig(**GROUPED, logits_scaling=3.0),
}


def make_model(shape: str = "llama") -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES[shape])
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero at first: positions and rows must not be alike
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def make_rows(seed: int = 0) -> list[dict[str, Any]]:
    """Pairs with long and short prompts and responses; `completion_ids` makes them SFT rows too."""
    rng = np.random.default_rng(seed)
    rows = []
    for lengths in ((7, 5, 3), (1, 1, 9), (12, 8, 8), (3, 2, 1)):
        prompt, chosen, rejected = (rng.integers(1, VOCABULARY, n).tolist() for n in lengths)
        rows.append(
            {
                "prompt_ids": prompt,
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "completion_ids": chosen,
                "ref_chosen_logps": -20.0,
                "ref_rejected_logps": -21.0,
            }
        )
    return rows


def value_and_gradient(model: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """log pi of every response, and the gradient of a sum that weighs each differently."""
    model.zero_grad()
    # Layers that are computed again in the backward need their attention there as well.
    with packed_attention(model) if "plan" in batch else nullcontext():
        sums = response_logps(model, batch).sums()
        (sums * torch.arange(1.0, len(sums) + 1.0, device=sums.device)).sum().backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return sums.detach(), gradients


def assert_equal(actual: Any, expected: Any, tolerance: float = FLOAT32) -> None:
    """Values and gradients agree, relative to the largest entry of each tensor."""
    (values, gradients), (expected_values, expected_gradients) = actual, expected
    assert gradients.keys() == expected_gradients.keys()
    pairs = [(values, expected_values)]
    pairs += [(gradients[name], expected_gradients[name]) for name in gradients]
    # A gradient that is zero in exact arithmetic (a key's bias) is judged by the others' size.
    scale = max(float(tensor.abs().max()) for tensor in expected_gradients.values())
    for mine, theirs in pairs:
        bound = tolerance * max(float(theirs.abs().max()), 0.01 * scale)
        assert float((mine.to(theirs.device) - theirs).abs().max()) <= bound
