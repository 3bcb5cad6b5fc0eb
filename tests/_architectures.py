"""Small models of every causal architecture of transformers, and rows that reach past windows."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 160
WINDOW = 8
LARGEST = 5_000_000
"""Parameters of a model that still counts as small."""
SMALL: dict[str, Any] = (
    dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim"), 64)
    | dict.fromkeys(("lru_width", "embedding_size"), 64)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2)
    | dict.fromkeys(("encoder_layers", "decoder_layers", "num_blocks"), 2)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4)
    | dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    | dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 96)
    | dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp"), 96)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256)
    | dict.fromkeys(("max_seq_length", "max_sequence_length"), 256)
    | dict.fromkeys(("sliding_window", "attention_chunk_size", "local_attention"), WINDOW)
    | dict.fromkeys(("window_size", "attention_window_size"), WINDOW)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4)
    | dict.fromkeys(("moe_num_experts", "ffn_num_experts"), 4)
    | dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32)
    | dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4)
    | dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32)
    | dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 16)
    | dict.fromkeys(("n_groups", "mamba_n_groups", "n_group", "topk_group"), 1)
    | dict.fromkeys(("time_step_rank", "mamba_dt_rank", "mamba_expand", "expand"), 2)
    | dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "head_dim"), 16)
    | dict.fromkeys(("v_head_dim", "qk_nope_head_dim", "linear_head_dim"), 16)
    | {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "use_sliding_window": True}
    | {"mamba_d_ssm": 128, "n_shared_experts": 1, "is_decoder": True, "add_cross_attention": False}
    | {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "rotary_dim": 8}
    | {"max_window_layers": 0}
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_num_heads": 4}
    | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
)
_SHARED_ATTENTION = {"layers_block_type": ["linear_attention", "hybrid"]}
OWN: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "qwen2_moe": {"layer_types": ["sliding_attention", "full_attention"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": _SHARED_ATTENTION | {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": _SHARED_ATTENTION | {"attention_hidden_size": 128, "mamba_headdim": 32},
    "dory": {"layer_types": ["sliding_attention", "mlp"], "num_hidden_layers": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCABULARY},
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY},
    "reformer": {"axial_pos_embds": False, "hash_seed": 0},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
    "xmod": {"default_language": "en_XX"},
}
"""What single architectures need besides, to be small and to have all that they are made of."""


def small_config(architecture: str, **options: Any) -> Any:
    kind = CONFIG_MAPPING[architecture]
    own = OWN.get(architecture, {}) | options
    return kind(**(_small(kind) | _layers_of_every_kind(kind) | own))


def _layers_of_every_kind(kind: Any) -> dict[str, Any]:
    kinds = list(dict.fromkeys(kind().to_dict().get("layer_types") or ()))
    return {"layer_types": kinds, "num_hidden_layers": len(kinds)} if len(kinds) > 1 else {}


def _small(kind: Any) -> dict[str, Any]:
    plain = kind().to_dict()
    renamed = kind.attribute_map or {}
    known = set(plain) | set(renamed)
    values = {k: v for k, v in SMALL.items() if k in known and renamed.get(k) not in SMALL}
    zeros = {
        k: 0.0
        for k, v in plain.items()
        if isinstance(v, float) and any(w in k for w in ("drop", "jitter", "pdrop"))
    }
    if "kv_lora_rank" in known:  # latent attention has no groups
        values["num_key_value_heads"] = values["num_attention_heads"]
    parts = {
        name: _small(type(getattr(kind(), name)))
        for name in kind.sub_configs or ()
        if plain.get(name)
    }
    return values | zeros | parts


def small_model(architecture: str, **options: Any) -> Any:
    """With weights so large that what a token sees matters.

    Raises:
        ValueError: none is small with this configuration; others as the architecture likes.
    """
    config = small_config(architecture, **options)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim in (2, 3) and not any(x in name for x in ("A_log", "conv")):
            std = 0.5 if "embed" in name or "wte" in name else 1.5 / math.sqrt(parameter.shape[-1])
            torch.nn.init.normal_(parameter, std=std)
        elif name.endswith("bias") and "dt_bias" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()
