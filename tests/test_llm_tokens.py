"""llm.data.tokens: a text in parts has the tokens of the whole, in one process or several."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from _text import assistant, make_tokenizer, user, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.encode import encode
from llm.data.errors import RowError
from llm.data.formats import PREFERENCE_ROWS, SFT_ROWS
from llm.data.messages import Rendered
from llm.data.sources import load_rows
from llm.data.tokens import Item, Tokens, parts_at_spaces
from llm.preview import responses


@cache
def word_tokenizer() -> Any:
    """A byte-level BPE on words, as GPT-2's, with tokens for runs of spaces as GPT-NeoX has."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<s>", "</s>", "<pad>"]
    texts = ["a bab ab's 12 ab ba bab\n\n \n a b's  \n ab", "ba ab. ba ab, b12 a1"] * 9
    raw.train_from_iterator(
        texts, BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet)
    )
    raw.add_tokens([AddedToken("  ", normalized=True), AddedToken("    ", normalized=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


texts = st.lists(
    st.sampled_from(["a", "b", "ab", " ", "  ", "\n", "'s", "1", ".", "e\u0301", "</s>", " a b"]),
    min_size=1,
    max_size=12,
).map("".join)


@given(texts, texts, texts, st.booleans())
@settings(max_examples=300, deadline=None)
def test_parts_have_the_tokens_of_the_whole(prompt: str, one: str, two: str, is_chat: bool) -> None:
    tokenizer = word_tokenizer()
    in_parts, at_once = (Tokens(tokenizer, 1000, "keep_end") for _ in range(2))
    assert in_parts.parts_at_spaces
    at_once.parts_at_spaces = False

    def encoded(tokens: Tokens) -> list[Any]:
        spans = (len(prompt), len(prompt + one)), (len(prompt), len(prompt + two))
        pair = Rendered(prompt + one, spans[:1]), Rendered(prompt + two, spans[1:])
        results = tokens.encode([Item(pair, is_chat), Item(pair[:1], is_chat)] * 2)
        return [
            str(each) if isinstance(each, RowError) else [each.prompt, each.responses, each.notes]
            for each in results
        ]

    assert encoded(in_parts) == encoded(at_once)


def test_where_tokens_cross_spaces_no_text_is_parted() -> None:
    assert parts_at_spaces(word_tokenizer())
    assert not parts_at_spaces(make_tokenizer())  # one word for all of the text
    adds_an_end = word_tokenizer().__class__(tokenizer_object=_with_end(), eos_token="</s>")
    assert not parts_at_spaces(adds_an_end)


def _with_end() -> Any:
    from tokenizers import Tokenizer, processors

    raw = Tokenizer.from_str(word_tokenizer().backend_tokenizer.to_str())
    raw.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return raw


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("temporary_datasets_cache")
def test_processes_and_a_second_start_give_the_same_rows(tmp_path: Path, workers: int) -> None:
    tokenizer = make_tokenizer(adds_bos=False)
    turns = [user("U"), assistant("A"), user("V"), assistant("B")]
    rows: list[dict[str, Any]] = [{"messages": turns, "id": i} for i in range(7)]
    source = write_jsonl(tmp_path / "chats.jsonl", [*rows, {"messages": "none"}])

    def read(train_on: str = "all") -> Any:
        options: dict[str, Any] = {"max_length": 200, "name": "x", "workers": workers}
        return encode(load_rows(source), tokenizer, SFT_ROWS, train_on=train_on, **options)

    first, again, other = read(), read(), read("last")
    assert first.report == again.report
    assert first.report.kept == 7
    assert first.report.total == 8
    assert first.report.unused == ("id",)
    for one, two in zip(first.rows, again.rows, strict=True):
        assert one == two
        assert responses(one, tokenizer) == ["A</s>", "B</s>"]
    assert responses(other.rows[0], tokenizer) == ["B</s>"]
    assert len(list((tmp_path / "cache").rglob("cache-*.arrow"))) == 2 * workers
    pairs = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "r"}] * 8)
    encoded = encode(
        load_rows(pairs), tokenizer, PREFERENCE_ROWS, max_length=20, name="x", workers=workers
    )
    assert encoded.report.kept == 8
