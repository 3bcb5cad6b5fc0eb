"""llm.data.formats: the formats of rows, loading, error lines."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from _text import ROWS, SHARED, assistant, needs_shared, user
from hypothesis import given, settings
from hypothesis import strategies as st

import llm.data.formats as formats
from llm.data.formats import DataError, RowError, load_rows, preference_fields, sft_fields

pytestmark = pytest.mark.usefixtures("temporary_datasets_cache")


# --- formats


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "completion": "c", "id": 7}, ("p", "c")),
        (
            {"prompt": [user("p")], "completion": [assistant("c")]},
            ([user("p")], [assistant("c")]),
        ),
        ({"prompt": [user("p")], "completion": "c"}, ([user("p")], [assistant("c")])),
        (
            {"messages": [user("p"), assistant("q"), user("r"), assistant("c"), user("late")]},
            ([user("p"), assistant("q"), user("r")], [assistant("c")]),
        ),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3", "text": "unused"},
            ("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n", "3"),
        ),
        (
            {"instruction": "Sing.", "input": " ", "output": "la"},
            ("### Instruction:\nSing.\n\n### Response:\n", "la"),
        ),
        (
            {"instruction": "Sing.", "output": "la"},
            ("### Instruction:\nSing.\n\n### Response:\n", "la"),
        ),
        (
            {"messages": [user("p"), {**assistant("c"), "tool_calls": None}]},
            ([user("p")], [assistant("c")]),
        ),
    ],
)
def test_sft_formats(row: dict[str, Any], expected: tuple[Any, Any]) -> None:
    assert sft_fields(row) == {"prompt": expected[0], "completion": expected[1]}


HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, ("p", "c", "r")),
        # A text response that happens to begin like its prompt is left alone.
        ({"prompt": "I", "chosen": "I am", "rejected": "I was"}, ("I", "I am", "I was")),
        (
            {
                "prompt": [user("p")],
                "chosen": [user("p"), assistant("c")],
                "rejected": [user("p"), assistant("r")],
            },
            ([user("p")], [assistant("c")], [assistant("r")]),
        ),
        (  # UltraFeedback: a string prompt that the messages repeat
            {
                "prompt": "p",
                "chosen": [user("p"), assistant("c")],
                "rejected": [user("p"), assistant("r")],
            },
            ([user("p")], [assistant("c")], [assistant("r")]),
        ),
        (
            {"chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]},
            ([user("p")], [assistant("c")], [assistant("r")]),
        ),
        (  # equal dialogues still leave a response on both sides
            {"chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("c")]},
            ([user("p")], [assistant("c")], [assistant("c")]),
        ),
        # hh-rlhf: the shared beginning of the answers stays in the answers.
        ({"chosen": HH + " So, yes", "rejected": HH + " So, no"}, (HH, " So, yes", " So, no")),
        ({"chosen": HH + " x", "rejected": HH + " x"}, (HH, " x", " x")),
        ({"chosen": "Say it: yes", "rejected": "Say it: yeah"}, ("Say it:", " yes", " yeah")),
        ({"chosen": "Q\n\nyes", "rejected": "Q\n\nno"}, ("Q", "\n\nyes", "\n\nno")),
        ({"chosen": "a b", "rejected": "a b c"}, ("a", " b", " b c")),
        ({"chosen": "yes", "rejected": "no"}, ("", "yes", "no")),
    ],
)
def test_preference_formats(row: dict[str, Any], expected: tuple[Any, Any, Any]) -> None:
    fields = preference_fields(row)
    assert (fields["prompt"], fields["chosen"], fields["rejected"]) == expected


@given(st.text(), st.text(), st.text())
@settings(max_examples=50, deadline=None)
def test_an_implicit_prompt_loses_no_text(shared: str, one: str, two: str) -> None:
    fields = preference_fields({"chosen": shared + one, "rejected": shared + two})
    assert fields["prompt"] + fields["chosen"] == shared + one
    assert fields["prompt"] + fields["rejected"] == shared + two


@pytest.mark.parametrize(
    ("fields", "row", "words"),
    [
        (sft_fields, {"text": "x", "id": 1}, ["text, id", "prompt+completion", "messages"]),
        (preference_fields, {"chosen": "x"}, ["chosen", "prompt+chosen+rejected"]),
        (sft_fields, {}, ["(none)"]),
    ],
)
def test_unknown_columns_name_what_is_there_and_what_is_accepted(
    fields: Any, row: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(DataError) as error:
        fields(row)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("fields", "row", "reason"),
    [
        (sft_fields, {"prompt": None, "completion": "c"}, "not text"),
        (sft_fields, {"prompt": "p", "completion": 3}, "not text"),
        (sft_fields, {"messages": "hello"}, "not text"),
        (sft_fields, {"messages": [user("p"), {"role": "assistant"}]}, "not text"),
        (sft_fields, {"messages": [user("p")]}, "no assistant message"),
        (sft_fields, {"instruction": None, "output": "x"}, "not text"),
        (sft_fields, {"instruction": "i", "input": 3, "output": "x"}, "not text"),
        (sft_fields, {"instruction": " ", "input": "a", "output": "x"}, "empty prompt"),
        (preference_fields, {"chosen": "c", "rejected": None}, "not text"),
        (preference_fields, {"prompt": "p", "chosen": ["c"], "rejected": "r"}, "not text"),
    ],
)
def test_values_that_are_not_text(fields: Any, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as error:
        fields(row)
    assert error.value.reason == reason
    assert isinstance(error.value, ValueError)


# --- loading


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    import pandas as pd

    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        pd.DataFrame(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_every_file_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"rows{suffix}")
    assert load_rows(str(path)).to_list() == ROWS
    assert load_rows(str(path), limit=2).to_list() == ROWS[:2]
    if suffix != ".csv":  # `datasets` never closes a CSV file that it has not read to its end
        assert load_rows(str(path), limit=2, streaming=True).to_list() == ROWS[:2]
    for streaming in (False, True):
        assert load_rows(str(path), limit=100, streaming=streaming).to_list() == ROWS


def test_a_directory_is_read_by_split(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS[:3])
    write(folder / "test.jsonl", ROWS[3:])
    assert load_rows(str(folder)).to_list() == ROWS[:3]
    assert load_rows(str(folder), split="test").to_list() == ROWS[3:]
    assert load_rows(str(folder), split="train[:1]").to_list() == ROWS[:1]
    assert load_rows(str(folder), split="test", limit=1, streaming=True).to_list() == ROWS[3:4]


@pytest.mark.parametrize("name", ["rows.jsonl", "set/train.jsonl"])
def test_an_edited_file_is_read_anew_whatever_its_time_says(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    source = str(path.parent if "/" in name else path)
    for word in ("one", "two", "one"):
        write(path, [{"prompt": "p", "completion": word}])
        os.utime(path, (1e9, 1e9))
        assert load_rows(source)[0]["completion"] == word


def test_hub_ids_reach_load_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(formats.datasets, "load_dataset", lambda **kw: calls.append(kw) or ROWS)
    assert load_rows("vicgalle/alpaca-gpt4") == ROWS
    load_rows("who/what", split="test", config_name="en")
    assert calls == [
        {"path": "vicgalle/alpaca-gpt4", "split": "train"},
        {"path": "who/what", "name": "en", "split": "test"},
    ]


def test_messages_survive_streaming(tmp_path: Path) -> None:
    rows = [{"messages": [user("p"), assistant("c")]}] * 3
    path = str(write(tmp_path / "chats.jsonl", rows))
    streamed = load_rows(path, limit=3, streaming=True)
    assert streamed.to_list() == load_rows(path).to_list() == rows


def test_a_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise formats.datasets.exceptions.DatasetNotFoundError("no such\ndata set")

    monkeypatch.setattr(formats.datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"'who/what'.*no such data set"):
        load_rows("who/what")


@pytest.mark.parametrize("name", ["gone.jsonl", "./gone", "a/b/c", "/no/where", "x.parquet"])
def test_a_missing_file_is_named(name: str) -> None:
    with pytest.raises(DataError, match="no such file") as error:
        load_rows(name)
    assert name in str(error.value)


def test_other_loading_mistakes(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x", encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"prompt": \n', encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for source, options, words in [
        ("x.txt", {}, [".txt", ".jsonl"]),
        ("bad.jsonl", {}, ["bad.jsonl"]),
        ("empty", {}, ["empty", ".parquet"]),
        (str(write(tmp_path / "r.jsonl")), {"split": "nope"}, ["r.jsonl", "nope"]),
        ("r.jsonl", {"limit": 0}, ["limit", "0"]),
        ("r.jsonl", {"streaming": True}, ["r.jsonl", "streaming", "how many"]),
        ("r.jsonl", {"streaming": True, "limit": 2, "split": "train[:1]"}, ["train[:1]"]),
        ("bad.jsonl", {"streaming": True, "limit": 2}, ["bad.jsonl"]),
    ]:
        with pytest.raises(DataError) as error:
            load_rows(str(tmp_path / source), **options)
        assert "\n" not in str(error.value)
        assert all(word in str(error.value) for word in words), error.value


# --- real data


@needs_shared
def test_real_bare_dialogues_split_where_the_authors_of_the_data_split() -> None:
    rows = load_rows(str(SHARED / "data" / "preference_train.parquet"), limit=500).to_list()
    bare = [{k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in rows]
    assert [preference_fields(row) for row in bare] == rows
