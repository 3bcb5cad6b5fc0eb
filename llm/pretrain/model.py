"""An untrained GPT-NeoX of a named or chosen size, and a tokenizer trained on the texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from theory.cli import UserError

END, PADDING = "<|endoftext|>", "<|padding|>"
BYTES = 256
"""Symbols of a byte-level tokenizer before any merge: every text can be written with them."""
VOCABULARY_MULTIPLE = 128
"""Rows of the embedding come in multiples of this, as in Pythia (50277 tokens, 50304 rows)."""


@dataclass(frozen=True)
class Size:
    """Shape of a GPT-NeoX, and the peak learning rate that goes with it."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 2048
    learning_rate: float = 1e-3


SIZES = {
    "tiny": Size(64, 2, 4, 256, max_position_embeddings=256, learning_rate=3e-3),
    "14m": Size(128, 6, 4, 512),
    "31m": Size(256, 6, 8, 1024),
    "70m": Size(512, 6, 8, 2048),
    "160m": Size(768, 12, 12, 3072, learning_rate=6e-4),
    "410m": Size(1024, 24, 16, 4096, learning_rate=3e-4),
    "1b": Size(2048, 16, 8, 8192, learning_rate=3e-4),
}
"""Ours, and those of Pythia (arXiv 2304.01373, table 1; 14m and 31m came later)."""


def model_config(size: Size, tokenizer: Any) -> GPTNeoXConfig:
    """Pythia's configuration of this size for the vocabulary of the tokenizer.

    A quarter of each head is rotated, attention and MLP run in parallel, the head is not tied to
    the embedding, nothing is dropped out.

    Raises:
        UserError: the heads do not divide the hidden size, or have no dimensions to rotate.
    """
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        if getattr(size, name) < 1:
            raise UserError(f"--{name} is {getattr(size, name)}; it must be at least 1")
    head, rest = divmod(size.hidden_size, size.num_attention_heads)
    if rest or head % 8:
        raise UserError(
            f"--hidden_size {size.hidden_size} in {size.num_attention_heads} heads: a head needs a "
            "multiple of 8 dimensions, a quarter of which are rotated in pairs"
        )
    end = tokenizer.eos_token_id
    return GPTNeoXConfig(
        vocab_size=-(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_hidden_layers,
        num_attention_heads=size.num_attention_heads,
        intermediate_size=size.intermediate_size,
        max_position_embeddings=size.max_position_embeddings,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_model(config: GPTNeoXConfig) -> GPTNeoXForCausalLM:
    """Random weights in float32, drawn from torch's current generator."""
    return GPTNeoXForCausalLM(config)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens; texts with few words fill fewer."""
    specials = [END, PADDING]
    if vocab_size < BYTES + len(specials):
        raise UserError(
            f"--vocab_size is {vocab_size}; bytes and special tokens alone are "
            f"{BYTES + len(specials)}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PADDING
    )


def bare_tokenizer(path: Path, end: str) -> PreTrainedTokenizerFast:
    """Of a tokenizer.json alone, which does not say which of its tokens ends a text: `end` does.

    Raises:
        UserError: the file is no tokenizer, or has no such token.
    """
    try:
        raw = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"--tokenizer {path} cannot be read: {error}") from error
    if raw.token_to_id(end) is None:
        raise UserError(f"--eos_token {end} is no token of {path}")
    padding = end if raw.token_to_id(PADDING) is None else PADDING
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=end, eos_token=end, pad_token=padding
    )
