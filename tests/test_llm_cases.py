"""Files in the formats that people publish: what of each is kept, and what is trained on.

Everything goes the way of `llm.preview --json`. The tests of `sources`, `formats` and `templates`
hold the same classes on inputs of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from _text import SHARED, make_tokenizer

from llm.data.encode import Encoded, encode
from llm.data.errors import DataError
from llm.data.formats import PAIRS, PREFERENCE_ROWS, SFT_ROWS
from llm.data.sources import load_rows, raw_rows
from llm.preview import list_rows
from theory.tasks import Task

CASES = SHARED / "cases"
pytestmark = [
    pytest.mark.usefixtures("temporary_datasets_cache"),
    pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not here"),
]
USER, BOS = "<user>{}</s><assistant>", "<s>"
CALL = ' call {"name": "weather", "arguments": {"town": "apple"}}</s>'
Row = tuple[str, list[str]]
"""(what the prompt ends in, the texts that are trained on) of the first row that is kept."""

KEPT: dict[str, Row] = {
    "01": ("<system>Answer in one line.</s><user>What is a apple good for?</s><assistant>",
           ["Here is a short answer:\nA apple has one honest use.</s>",
            "Here is a short answer:\nNobody knows about apples.</s>"]),
    "02": ("Name one fact about a apple.\n\n### Input:\nKeep it brief.\n\n### Response:\n",
           ["Sure, a apple is small.</s>", "Sure, a apple is made of smoke.</s>"]),
    "05": ("<system>Be exact.</s><user>Spell apple.</s><assistant>", ["a-p-p-l-e</s>", "No.</s>"]),
    "06": ("<user>Spell apple.\n</s><assistant>", ["a-p-p-l-e</s>", "No.</s>"]),
    "07": ("<user>Spell apple.</s><assistant>", ["a-p-p-l-e</s>", "No.</s>"]),
    "08": ("<user>Spell apple.</s><assistant>", ["a-p-p-l-e</s>", "No.</s>"]),
    "09": ("Human: What is a apple?\nBot:", [" A thing.</s>", " A myth.</s>"]),
    "10": ("You are a calculator.\n\n### Instruction:\nWhat is 1 plus 0?\n\n### Response:\n",
           ["1</s>", "2</s>"]),
    "11": ("### Instruction:\nWhat is a apple?\n\n### Response:\n", ["A thing.</s>"]),
    "12": ("</s><user>Is it dry in appleville?</s><assistant>",
           ["Let me see. I have a tool for that.</s>"]),
    "13": ("</s><user>Weather in appleville?</s><assistant>", [CALL]),
    "15": ("<assistant>BAD JOKE</s><user>Better?</s><assistant>",
           ["A bridge walks into a bar.</s>"]),
    "16": ("Q: what is a bridge? A:", [" A thing.</s>"]),
    "17": (USER.format("Hi apple"), ["Hello first</s>", "Hello second</s>"]),
    "18": (USER.format("Hi apple"), ["Hello</s>"]),
    "20": (USER.format("Hi apple"), ["Hello</s>"]),
    "21": (USER.format("Hi apple"), ["Hello</s>"]),
    "22": (USER.format("Hi apple"), ["Hello</s>", "Go away</s>"]),
    "24": ("<system>Speak like a pirate.</s><user>What is a apple? </s><assistant>",
           ["Arr, a thing.</s>"]),
    "25": ("<system>Speak like a pirate.</s><user>What is a apple?</s><assistant>",
           ["Arr, a thing.</s>"]),
    "26": ("What is a apple? ", ["A thing.</s>"]),
    "27": ("When was the apple made? ", ["2010-01-02</s>"]),
    "28": ("0 + 1 = ", ["1</s>"]),
    "29": ("0 + 1 = ", ["001</s>"]),
    "30": ("Case 0: which side effect? ", ["mild cough</s>"]),
    "36": ("What is a apple? ", ["A thing 😀 apple.</s>"]),
    "42": ("What is a apple?", ["A thing.</s>"]),
    "42b": ("What is a apple?", ["A thing.</s>"]),
    "43": (USER.format("Hi apple"), ["Hello</s>"]),
    "44": (USER.format("Hi apple"), ["Hello</s>"]),
    "45": (BOS, ["A text about a apple.</s>"]),
    "46": (USER.format("Hi apple"), ["Hello</s>"]),
    "51": (USER.format("Hi apple"), ["Hello</s>"]),
    "53": ("What is a apple? ", ["A thing.</s>"]),
    "54": (USER.format("Do it for apple."),
           [' call {"name": "act", "arguments": {"day": 3}}</s>', "Done.</s>"]),
    "57": (USER.format("Hi apple"), ["Hello</s>"]),
    "59": (USER.format("Hi apple"), ["one</s>", "two</s>"]),
    "62": ("<system>Be exact.</s><user>Spell apple.</s><assistant>", ["a-p-p-l-e</s>"]),
    "67": ("Hi apple ", ["a</s>", "b</s>"]),
    "68": ("Hi apple ", ["a</s>", "b</s>"]),
    "72": (USER.format("Spell apple."), ["a-p-p-l-e</s>", "No.</s>"]),
    "73": (USER.format("Weather in appleville?"), [CALL, "It is dry.</s>"]),
    "75": (USER.format("Do it for apple."),
           ['On it. call {"name": "act", "arguments": {"day": 3}}</s>']),
    "77": ("<system>Be exact.</s><user>Spell apple.</s><assistant>", ["a-p-p-l-e</s>", "No.</s>"]),
    "78": (USER.format("What is a apple?"), ["A thing.</s>"]),
    "79": ("### Instruction:\nWhat is a apple?\n\n### Response:\n", ["A thing.</s>"]),
    "80": ("<|im_end|>\n<|im_start|>assistant\n",
           ["Sure: a-p-p-l-e<|im_end|></s>", "Sure: I will not<|im_end|></s>"]),
    "81": ("<developer>Be exact.</s><user>Spell apple.</s><assistant>", ["a-p-p-l-e</s>"]),
}  # fmt: skip
"""With the template t_plain, in which every message is `<role>content EOS`."""
DROPPED = {"15": (6, "weight 0"), "16": (6, "label is false"), "19": (12, "images is ['apple"),
           "39": (12, r"A thing \ud83d")}  # fmt: skip
"""How many rows are dropped, and what the reason quotes."""
REFUSED = {"34": "UTF-16", "37": "under 'data'", "38": "columns are prompt", "38b": "keys are 0",
           "41": "line 13 is not JSON"}  # fmt: skip
"""What is no file of rows, and what the refusal names."""
UNUSED = {"30": ["question_id"], "68": ["score"], "31": ["id"]}
RIGHT = {"14": 12, "31": 12, "32": 12, "33": 12, "35": 12, "35b": 12, "40": 12, "50": 12, "52": 12,
         "58": 12, "61": 9, "63": 12, "65": 12, "66": 12, "69": 12, "70": 12, "71": 12, "82": 12,
         "83": 12}  # fmt: skip
"""Rows kept of what has always been read right."""


def path_of(number: str, folder: str = "data") -> Path:
    (path,) = (CASES / folder).glob(f"{number}_*")
    return path


def encoded(path: Path, template: str = "t_plain", **options: Any) -> tuple[Task, Any, Encoded]:
    rows = load_rows(str(path))
    columns = raw_rows(rows[:1])[0]
    task = Task.DPO if any(columns.keys() >= set(pair) for pair in PAIRS) else Task.SFT
    source = (CASES / "templates" / f"{template}.jinja").read_text("utf-8").strip("\n")
    tokenizer = make_tokenizer(chat_template=source, adds_bos=False)
    kind = PREFERENCE_ROWS if task == Task.DPO else SFT_ROWS
    return task, tokenizer, encode(rows, tokenizer, kind, **{"max_length": 512, **options}, name="")


def listed(path: Path, template: str = "t_plain", **options: Any) -> list[dict[str, Any]]:
    task, tokenizer, result = encoded(path, template, **options)
    return list(list_rows(task, [("train", result)], tokenizer))


@pytest.mark.parametrize("number", sorted({*KEPT, *DROPPED}))
def test_what_is_kept_and_why_the_rest_is_not(number: str) -> None:
    rows = listed(path_of(number))
    count, quoted = DROPPED.get(number, (0, ""))
    dropped = [row for row in rows if row["dropped"]]
    assert len(dropped) == count
    assert not dropped or quoted in dropped[0]["dropped"]
    assert [row["row"] for row in rows] == list(range(len(rows)))
    kept = [row for row in rows if not row["dropped"]]
    assert len(rows) == {"30": 100, "68": 24}.get(number, 12)
    if number in KEPT:
        prompt, texts = KEPT[number]
        assert kept[0]["responses"] == texts
        assert kept[0]["prompt"].endswith(prompt)
    unused = {column for row in kept for column in row["unused_columns"]}
    assert sorted(unused) == UNUSED.get(number, [])


@pytest.mark.parametrize("number", sorted(REFUSED))
def test_what_is_no_file_of_rows_is_refused_in_a_sentence(number: str) -> None:
    with pytest.raises(DataError) as error:
        load_rows(str(path_of(number)))
    assert REFUSED[number] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", sorted(RIGHT))
def test_what_was_read_right_stays_right(number: str) -> None:
    _, tokenizer, result = encoded(path_of(number, "data_right"))
    assert result.report.kept == RIGHT[number]
    assert list(result.report.unused) == UNUSED.get(number, [])
    assert all(row["prompt_ids"] and tokenizer.eos_token_id for row in result.rows)


def test_text_stays_text_in_every_row() -> None:
    answers = {row["responses"][0] for row in listed(path_of("30"))}
    assert {"None</s>", "NA</s>", "null</s>", "N/A</s>"} & answers
    assert [row["responses"] for row in listed(path_of("29"))] == [
        [f"{i:03}</s>"] for i in range(1, 13)
    ]


def test_numbers_keep_their_digits(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "p", "completion": 1.50}\n{"prompt": "p", "completion": 1e5}\n')
    assert [row["responses"] for row in listed(file)] == [["1.50</s>"], ["1e5</s>"]]


def test_a_system_message_that_moves_is_in_front_of_the_answer() -> None:
    for row in listed(path_of("62"), "t_last_user_system"):
        assert row["prompt"].startswith("<s><u>Be exact.\nSpell")
        (text,) = row["responses"]
        assert text.endswith("</s>")
        assert "Spell" not in text


@pytest.mark.parametrize(("template", "number"), [("t_skips_roles", "81"), ("t_no_end", "73")])
def test_what_a_template_drops_silently_is_counted(template: str, number: str) -> None:
    for row in listed(path_of(number), template):
        assert "left out by the chat template" in row["dropped"]
        assert "--chat_template" in row["dropped"]


def test_arguments_are_decoded_for_templates_that_list_them() -> None:
    row = listed(path_of("73"), "t_items")[0]
    assert row["responses"] == [" call weather town=apple</s>", "It is dry.</s>"]
    texts = "".join(text for row in listed(path_of("54"), "t_items") for text in row["responses"])
    assert "None" not in texts


def test_equal_only_after_truncation_says_so() -> None:
    row = listed(path_of("56"), max_length=64)[0]
    assert "once truncated" in row["dropped"]
    assert "raise --max_length" in row["dropped"]
