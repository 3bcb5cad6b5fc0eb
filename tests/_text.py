"""What the tests of `llm`'s data share: a tiny tokenizer, messages, rows, the development data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(
    not (SHARED / "data").is_dir(), reason="the shared development data is not here"
)
BOS, EOS, PAD = 0, 1, 2
ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(5)]
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{{ '[' + m.role + ']' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def make_tokenizer(*, adds_bos: bool = True, chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """A byte-level BPE with one merge, "a"+"b", so that tokens can span prompt and response."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<s>", "</s>", "<pad>"]
    symbols = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    raw = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, [("a", "b")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    if adds_bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write_jsonl(path: Path, rows: Sequence[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
