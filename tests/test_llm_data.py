"""llm.data.encode: token ids against TRL, truncation, counted drops, fingerprint."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from _text import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    PAD,
    ROWS,
    SHARED,
    assistant,
    make_tokenizer,
    needs_shared,
    user,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data import formats, messages, tokens
from llm.data.encode import Encoded, encode_preference, encode_sft, fingerprint
from llm.data.errors import DataError
from llm.data.report import DropReport
from llm.data.sources import load_rows, raw_rows
from llm.data.templates import REFUSED_BY_TEMPLATE
from llm.loss.collate import collate_sft

pytestmark = pytest.mark.usefixtures("temporary_datasets_cache")

TOKENIZER = make_tokenizer()
WITHOUT_BOS = make_tokenizer(adds_bos=False)


def sft(rows: list[dict[str, Any]], tokenizer: Any = TOKENIZER, **options: Any) -> Encoded:
    return encode_sft(rows, tokenizer, **{"max_length": 200, "name": "sft_data", **options})


def preference(rows: list[dict[str, Any]], tokenizer: Any = TOKENIZER, **options: Any) -> Encoded:
    return encode_preference(rows, tokenizer, **{"max_length": 200, "name": "dpo_data", **options})


def plain(encoded: Encoded) -> list[dict[str, list[int]]]:
    """The rows with lists for arrays, which would compare unequal to any list."""
    return [{key: list(row_ids) for key, row_ids in row.items()} for row in encoded.rows]


def ids(text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
    return [BOS] * bos + TOKENIZER(text, add_special_tokens=False)["input_ids"] + [EOS] * eos


# --- token ids


def test_a_token_takes_four_bytes() -> None:
    (row,) = sft([{"prompt": "hi", "completion": " yo"}]).rows
    for values in row.values():
        assert memoryview(values).nbytes == 4 * len(values)


def test_text_gets_one_bos_and_one_eos() -> None:
    encoded = sft(
        [
            {"prompt": "hi", "completion": " yo"},
            {"prompt": "<s>hi", "completion": " yo</s>"},
            {"prompt": "<s><s>hi", "completion": " yo"},
        ]
    )
    expected = {"prompt_ids": ids("hi", bos=True), "completion_ids": ids(" yo", eos=True)}
    assert plain(encoded) == [expected] * 3
    assert encoded.report.notes == {}


def test_no_bos_is_invented() -> None:
    encoded = sft([{"prompt": "hi", "completion": " yo"}], WITHOUT_BOS)
    assert plain(encoded)[0]["prompt_ids"] == ids("hi")


def test_a_token_across_the_boundary_belongs_to_the_response() -> None:
    row = {"prompt": "xa", "chosen": "b", "rejected": "c"}
    encoded = preference([row, {"prompt": "xa", "chosen": "c", "rejected": "b"}])
    # "xab" is x+ab, "xac" is x+a+c: the pair shares only "x".
    expected = [ids("x", bos=True), ids("ab", eos=True), ids("ac", eos=True)]
    assert list(plain(encoded)[0].values()) == expected
    assert list(plain(encoded)[1].values()) == [expected[0], expected[2], expected[1]]
    assert encoded.report.notes == {tokens.TOKENS_MERGE: 2}
    assert encoded.report.truncated == 0


@given(st.text(min_size=1), st.text(min_size=1))
@settings(max_examples=50, deadline=None)
def test_prompt_and_response_are_the_tokens_of_the_whole(prompt: str, response: str) -> None:
    if not prompt.strip() or not response.strip():
        return
    row = plain(sft([{"prompt": prompt, "completion": response}], max_length=10**6))[0]
    assert row["prompt_ids"] + row["completion_ids"] == ids(prompt + response, bos=True, eos=True)


def test_messages_get_what_the_template_writes() -> None:
    encoded = sft([{"messages": [user("hi"), assistant("yo")]}])
    assert plain(encoded) == [
        {
            "prompt_ids": ids("<s>[user]hi</s>[assistant]"),
            "completion_ids": ids("yo</s>"),
        }
    ]
    assert plain(encoded)[0]["prompt_ids"].count(BOS) == 1
    assert encoded.report.notes == {}


def test_messages_get_no_bos_that_the_template_does_not_write() -> None:
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE.replace("{{ '<s>' }}", ""))
    row = plain(sft([{"messages": [user("hi"), assistant("yo")]}], tokenizer))[0]
    assert row["prompt_ids"] == ids("[user]hi</s>[assistant]")


def test_an_answer_follows_the_prompt_of_inference_where_the_template_writes_another() -> None:
    template = CHAT_TEMPLATE.replace("'[assistant]' }}", "'[assistant]<think>' }}")
    encoded = sft(
        [{"messages": [user("hi"), assistant("yo")]}] * 2, make_tokenizer(chat_template=template)
    )
    row = {"prompt_ids": ids("<s>[user]hi</s>[assistant]<think>"), "completion_ids": ids("yo</s>")}
    assert plain(encoded) == [row] * 2


def test_messages_without_a_chat_template_are_refused() -> None:
    rows = [{"messages": [user("hi"), assistant("yo")]}]
    with pytest.raises(DataError, match=r"sft_data: none of 1 rows .*--chat_template"):
        sft(rows, make_tokenizer(chat_template=None))


def test_a_row_that_the_template_refuses_is_counted() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer = make_tokenizer(chat_template=template + CHAT_TEMPLATE)
    good, bad = [user("hi"), assistant("yo")], [{"role": "system", "content": "s"}, assistant("yo")]
    report = sft([{"messages": bad}, {"messages": good}], tokenizer).report
    assert report.dropped == {REFUSED_BY_TEMPLATE: 1}
    assert report.kept == 1


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="eos_token"):
        sft(ROWS, tokenizer)


# --- TRL as the oracle

trl_warnings = pytest.mark.filterwarnings(
    "ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"
)
TRL_PAIRS = [
    {"prompt": "hi", "chosen": " yes", "rejected": " no"},
    {"prompt": "xa", "chosen": "b", "rejected": "c"},
    {"prompt": "ends in </s>", "chosen": " a </s>", "rejected": "b"},
    {"prompt": "a prompt of some length", "chosen": " ab" * 20, "rejected": "\n"},
]
TRL_CHATS = [
    {"prompt": [user(f"q{i}")], "chosen": [assistant("y" * i)], "rejected": [assistant("no")]}
    for i in range(1, 4)
]


def trl_rows(kind: str, rows: list[dict[str, Any]], folder: Path, tokenizer: Any) -> list[Any]:
    """The data set as TRL prepares it, truncated by its collator's rule keep_start."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
    )
    arguments = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False}
    make_args, make = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
    model = GPTNeoXForCausalLM(config)
    reference = {"ref_model": copy.deepcopy(model)} if kind == "DPO" else {}
    trainer = make(
        model,
        **reference,
        args=make_args(max_length=40, **arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=copy.deepcopy(tokenizer),
    )
    return list(trainer.train_dataset)


@trl_warnings
@pytest.mark.parametrize("rows", [TRL_PAIRS, TRL_CHATS], ids=["text", "messages"])
def test_preference_tokens_equal_trl(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    kept = [row for row in rows if row["rejected"] != "\n"]  # a blank answer: we drop, TRL trains
    theirs = trl_rows("DPO", kept, tmp_path, TOKENIZER)
    ours = plain(preference(rows, max_length=1000))
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    assert ours == [{key: row[key] for key in keys} for row in theirs]


@trl_warnings
@pytest.mark.parametrize("rows", [TRL_PAIRS, TRL_CHATS], ids=["text", "messages"])
def test_sft_tokens_and_keep_start_equal_trl(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    theirs = trl_rows("SFT", rows, tmp_path, TOKENIZER)
    encoded = sft(rows, max_length=40, truncation_mode="keep_start")
    assert len(encoded.rows) == len(theirs) == len(rows)
    for ours, row in zip(encoded.rows, theirs, strict=True):
        batch = collate_sft([ours], PAD)
        assert batch["input_ids"][0].tolist() == row["input_ids"]
        assert batch["labels"][0].tolist() == row["labels"]


# --- truncation and drops


def test_keep_end_cuts_the_start_of_the_prompt_behind_bos() -> None:
    row = {"prompt": "0123456789", "chosen": "xyz", "rejected": "u"}
    encoded = preference([row], max_length=8)
    expected = [ids("789", bos=True), ids("xyz", eos=True), ids("u", eos=True)]
    assert list(plain(encoded)[0].values()) == expected
    assert encoded.report.truncated == 1


def test_a_cut_in_front_of_a_bos_in_the_text_leaves_one_bos() -> None:
    encoded = sft([{"prompt": "012<s>34", "completion": "u"}], max_length=6)
    assert plain(encoded)[0]["prompt_ids"] == ids("34", bos=True)


def test_keep_end_cuts_a_response_that_is_too_long_and_keeps_a_prompt_token() -> None:
    encoded = sft([{"prompt": "0123456789", "completion": "uvwxyz"}], max_length=5)
    assert plain(encoded) == [{"prompt_ids": ids("9", bos=True), "completion_ids": ids("uvw")}]
    without_bos = sft(
        [{"prompt": "0123456789", "completion": "uvwxyz"}],
        WITHOUT_BOS,
        max_length=2,
    )
    assert plain(without_bos) == [{"prompt_ids": ids("9"), "completion_ids": ids("u")}]


def test_keep_start_cuts_the_end_of_the_whole() -> None:
    rows = [{"prompt": "012", "completion": "uvwxyz"}, {"prompt": "0123456", "completion": "u"}]
    encoded = sft(rows, max_length=6, truncation_mode="keep_start")
    assert plain(encoded) == [{"prompt_ids": ids("012", bos=True), "completion_ids": ids("uv")}]
    assert encoded.report.dropped == {tokens.NO_RESPONSE_LEFT: 1}


def test_every_reason_is_counted() -> None:
    good = {"prompt": "p", "chosen": " c", "rejected": " r"}
    rows = [
        good,
        {**good, "prompt": " \n"},
        {**good, "chosen": ""},
        {**good, "rejected": "  "},
        {**good, "rejected": " c"},
        {**good, "rejected": " c</s>"},  # equal after tokenising
        {**good, "chosen": " same" * 9 + "1", "rejected": " same" * 9 + "2"},  # after truncation
        {**good, "chosen": None},
        {**good, "chosen": True},
        {**good, "prompt": "p" * 50},
    ]
    report = preference(rows, max_length=20, truncation_mode="keep_start").report
    assert report.dropped == {
        formats.EMPTY_PROMPT: 1,
        formats.EMPTY_RESPONSE: 2,
        tokens.EQUAL_RESPONSES: 2,
        tokens.EQUAL_AFTER_TRUNCATION: 1,
        messages.NOT_TEXT: 2,
        tokens.NO_RESPONSE_LEFT: 1,
    }
    assert (report.total, report.kept, report.truncated) == (10, 1, 0)
    assert "1 of 10 rows kept" in report.line("dpo_data")
    assert "\n" not in report.line("dpo_data")
    assert json.loads(json.dumps(report.to_json())) == report.to_json()


def test_answers_that_lose_their_end_are_told_apart_from_prompts_that_lose_their_start() -> None:
    rows = [{"prompt": "0" * 20, "completion": "c"}, {"prompt": "0", "completion": "c" * 20}]
    report = sft([*rows, *ROWS], max_length=12).report
    assert (report.truncated, report.cut) == (2, 1)
    assert report.warnings("x") == [
        "x: 1 of 7 rows lost the end of an answer: raise --max_length",
        "x: 2 of 7 rows were truncated: raise --max_length",
    ]
    assert "2 truncated (1 in an answer)" in report.line("x")
    assert sft(ROWS, max_length=12).report.warnings("x") == []


def test_a_prompt_that_merges_away_entirely_is_empty() -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "p", "completion": "b"}]
    assert sft(rows, WITHOUT_BOS).report.dropped == {formats.EMPTY_PROMPT: 1}
    assert sft(rows).report.dropped == {}  # BOS still predicts the first token


def test_no_row_left_names_the_data_set_and_the_reasons() -> None:
    rows = [{"prompt": "", "completion": "c"}, {"prompt": "p", "completion": None}] * 2
    with pytest.raises(DataError, match="sft_data: none of 4 rows") as error:
        sft(rows)
    assert "2 empty prompt" in str(error.value)
    assert "2 not text" in str(error.value)
    with pytest.raises(DataError, match="sft_data: the data set has no rows"):
        sft([])


def test_unknown_columns_are_refused_once_by_name() -> None:
    with pytest.raises(DataError, match=r"^sft_data: none of 1 .*columns words match no accepted"):
        sft([{"words": "x"}])


def test_a_row_of_another_shape_is_counted_and_named_by_number() -> None:
    report = sft([ROWS[0], {"words": "x"}]).report
    assert report.dropped == {formats.NO_FORMAT: 1}
    assert "row 1: columns words match no accepted format" in report.line("sft_data")


@pytest.mark.parametrize(
    ("options", "word"), [({"truncation_mode": "middle"}, "keep_end"), ({"max_length": 1}, "1")]
)
def test_bad_options(options: dict[str, Any], word: str) -> None:
    with pytest.raises(DataError, match=word):
        sft(ROWS, **options)


texts = st.text("ab </>s", max_size=30)
pairs = st.lists(
    st.fixed_dictionaries({"prompt": texts, "chosen": texts, "rejected": texts}), max_size=8
)


@given(pairs, st.integers(2, 40), st.sampled_from(tokens.TRUNCATION_MODES), st.booleans())
@settings(max_examples=200, deadline=None)
def test_invariants(rows: list[Any], max_length: int, mode: str, adds_bos: bool) -> None:
    rows = [{"prompt": "p", "chosen": "x", "rejected": "y"}, *rows]
    tokenizer = TOKENIZER if adds_bos else WITHOUT_BOS
    options = {"max_length": max_length, "truncation_mode": mode}
    try:
        encoded = preference(rows, tokenizer, **options)
    except DataError:  # max_length 2 leaves one token of BOS and "p"
        assert mode == "keep_start"
        assert max_length == 2
        assert adds_bos
        return
    full = preference(rows, tokenizer, max_length=10**6)
    report = encoded.report
    assert report.total == len(rows) == report.kept + sum(report.dropped.values())
    assert report.kept == len(encoded.rows)
    for row in plain(encoded):
        prompt, chosen, rejected = row.values()
        assert prompt
        assert chosen
        assert rejected
        assert chosen != rejected
        assert len(prompt) + max(len(chosen), len(rejected)) <= max_length
        assert prompt[:2] != [BOS, BOS]
        assert prompt[0] == BOS or not adds_bos
    if max_length >= 36 and mode == "keep_end":  # the longest prompt or response still fits
        assert full.report.kept == report.kept


# --- fingerprint


def encoded_of(*rows: dict[str, list[int]]) -> Encoded:
    return Encoded(list(rows), "x", DropReport(len(rows), len(rows), 0))


def test_fingerprint_sees_every_change() -> None:
    one, two = (
        {"prompt_ids": [1, 2], "completion_ids": [3]},
        {"prompt_ids": [4], "completion_ids": [5]},
    )
    variants = [
        encoded_of(one, two),
        encoded_of(two, one),
        encoded_of(one),
        encoded_of(one, one),
        encoded_of({"prompt_ids": [1], "completion_ids": [2, 3]}, two),  # the boundary moved
        encoded_of({"prompt_ids": [1, 2], "chosen_ids": [3]}, two),
    ]
    assert len({fingerprint(variant) for variant in variants}) == len(variants)
    reordered = {"completion_ids": [3], "prompt_ids": [1, 2], "ref_chosen_logps": 0.5}
    assert fingerprint(encoded_of(reordered, two)) == fingerprint(encoded_of(one, two))  # type: ignore[arg-type]


def test_fingerprint_is_stable() -> None:
    # Caches keyed by it must survive another process and machine: the bytes are fixed.
    told = b"completion_ids:1;" + struct.pack("<i", 50276) + b"prompt_ids:2;"
    expected = hashlib.sha256(told + struct.pack("<2i", 1, 2)).hexdigest()
    row = {"prompt_ids": [1, 2], "completion_ids": [50276]}
    assert fingerprint(encoded_of(row)) == expected


# --- real data


@pytest.fixture(scope="module")
def real_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(SHARED / "models" / "tinystories-656k"))


@needs_shared
def test_real_preferences(real_tokenizer: Any) -> None:
    rows = load_rows(str(SHARED / "data" / "preference_train.parquet"))
    encoded = preference(rows, real_tokenizer, max_length=512)
    report = encoded.report
    assert (report.total, report.kept) == (2035, 2031)
    assert report.dropped == {tokens.EQUAL_RESPONSES: 4}
    assert 0 < report.truncated < 500
    for row in plain(encoded):
        longest = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        assert len(row["prompt_ids"]) + longest <= 512
        assert row["prompt_ids"][0] == 1
        assert row["prompt_ids"].count(1) == 1
        assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == 2 or longest > 500


@needs_shared
def test_real_instructions(real_tokenizer: Any) -> None:
    rows = load_rows(str(SHARED / "data" / "sft_train.parquet"), limit=500)
    encoded = sft(rows, real_tokenizer, max_length=512)
    assert encoded.report.kept == 500
    assert encoded.report.dropped == {}
    for row, raw in zip(plain(encoded), raw_rows(rows[:]), strict=True):
        whole = row["prompt_ids"] + row["completion_ids"]
        if len(whole) < 512:
            expected = real_tokenizer(raw["prompt"] + raw["completion"])["input_ids"]
            assert whole == [*expected, real_tokenizer.eos_token_id]
