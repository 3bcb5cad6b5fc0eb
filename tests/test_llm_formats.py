"""llm.data.formats: what the columns of a row mean, and what is refused as unclear."""

from __future__ import annotations

import json
from typing import Any

import pytest
from _text import SHARED, assistant, needs_shared, user
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data import formats, messages, pairs
from llm.data.errors import DataError, RowError
from llm.data.formats import PREFERENCE_ROWS, SFT_ROWS, Options, Reading, RowKind, read_row
from llm.data.sources import load_rows, raw_rows

pytestmark = pytest.mark.usefixtures("temporary_datasets_cache")


def read(row: dict[str, Any], kind: RowKind = SFT_ROWS, **options: Any) -> Reading:
    return read_row(row, kind, Options(eos="</s>", **options))


def told(reading: Reading) -> list[Any]:
    """[prompt, answer, ...]: texts, or messages as (role, content), * where it is trained on."""
    if reading.chat is None:
        prompt = reading.texts[0].prompt
        return [prompt, *(text.text[len(prompt) :] for text in reading.texts)]
    parts = [reading.chat.prompt, *reading.chat.responses]
    marks = [[""] * len(parts[0])]
    marks += [["*" if m.is_reply and m.trained else "" for m in part] for part in parts[1:]]
    return [
        [(mark + m.role, m.content) for m, mark in zip(part, signs, strict=True)]
        for part, signs in zip(parts, marks, strict=True)
    ]


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


U, A, S = ("user", "p"), ("*assistant", "c"), ("system", "s")
CHAT = [user("p"), assistant("c")]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "completion": "c", "id": 7}, ["p", "c"]),
        ({"prompt": "p", "response": "c"}, ["p", "c"]),
        ({"prompt": "2+2=", "completion": 4}, ["2+2=", "4"]),
        ({"prompt": "born ", "completion": "2020-01-02"}, ["born ", "2020-01-02"]),
        ({"prompt": [user("p")], "completion": [assistant("c")]}, [[U], [A]]),
        ({"prompt": [user("p")], "completion": "c"}, [[U], [A]]),
        ({"prompt": "p", "completion": {"role": "assistant", "content": "c"}}, [[U], [A]]),
        ({"question": "p", "answer": "c"}, [[U], [A]]),
        ({"system": "s", "prompt": "p", "completion": "c"}, [[S, U], [A]]),
        ({"messages": CHAT, "system_prompt": "s"}, [[S, U], [A]]),
        ({"messages": json.dumps(CHAT)}, [[U], [A]]),
        ({"messages": str(CHAT)}, [[U], [A]]),
        ({"messages": {"role": ["user", "assistant"], "content": ["p", "c"]}}, [[U], [A]]),
        ({"conversation": [{"input": "p", "output": "c"}]}, [[U], [A]]),
        (
            {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "c"}]},
            [[U], [A]],
        ),
        (
            {"messages": [{"role": "User", "content": [{"type": "text", "text": "p"}]}, CHAT[1]]},
            [[U], [A]],
        ),
        (  # a greeting is in front of the answers
            {"messages": [assistant("g"), *CHAT]},
            [[("assistant", "g"), U], [A]],
        ),
        (  # every answer is trained on; what follows the last has none
            {"messages": [*CHAT, user("r"), assistant("d"), user("late")]},
            [[U], [A, ("user", "r"), ("*assistant", "d")]],
        ),
        (
            {"messages": [user("p"), {**assistant("bad"), "weight": 0}, user("r"), CHAT[1]]},
            [[U, ("assistant", "bad"), ("user", "r")], [A]],
        ),
        (
            {"prompt": [user("p")], "completion": [*CHAT, user("r"), assistant("d")]},
            [[U], [A, ("user", "r"), ("*assistant", "d")]],
        ),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3", "text": "unused"},
            ["### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n", "3"],
        ),
        (
            {"instruction": "Sing.", "context": " ", "response": "la"},
            ["### Instruction:\nSing.\n\n### Response:\n", "la"],
        ),
        (
            {"instruction": "", "input": "Sing.", "output": "la"},
            ["### Instruction:\nSing.\n\n### Response:\n", "la"],
        ),
        (
            {"instruction": "i", "output": "o", "history": [["q", "a"]], "system": "s"},
            [
                "s\n\n### Instruction:\nq\n\n### Response:\n",
                "a</s>\n\n### Instruction:\ni\n\n### Response:\no",
            ],
        ),
        ({"text": "all of it"}, ["", "all of it"]),
        ({"text": "a review", "label": 0}, ["", "a review"]),
        ({"prompt": "p", "completion": "c", "label": True}, ["p", "c"]),
        ({"messages": [user("p"), {**assistant("c"), "tool_calls": None}]}, [[U], [A]]),
        ({"messages": [user("p"), CALL]}, [[U], [("*assistant", "")]]),
        ({"messages": CHAT, "prompt": "p", "prompt_id": "7"}, [[U], [A]]),
    ],
)
def test_demonstrations(row: dict[str, Any], expected: list[Any]) -> None:
    assert told(read(row)) == expected


def test_only_the_last_answer_on_request_and_without_a_template_in_text() -> None:
    row = {"messages": [*CHAT, user("r"), assistant("d")]}
    assert told(read(row, train_on="last"))[1] == [("*assistant", "d")]
    reading = read({"instruction": "i", "output": "o", "history": [["q", "a"]]}, train_on="last")
    assert told(reading)[1] == "o"
    plain = {"system": "s", "question": "p", "answer": "c"}
    assert told(read(plain, has_template=False)) == ["s\n\np\n\n", "c"]


@pytest.mark.parametrize(
    "text",
    [
        "### Human: p### Assistant: c### Human: q### Assistant: d",
        "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n<|im_start|>user\nq",
        "\n\nHuman: p\n\nAssistant: c\n\nHuman: q\n\nAssistant: d",
        "USER: p ASSISTANT: c USER: q ASSISTANT: d",
        "[INST] p [/INST] c [INST] q [/INST] d",
    ],
)
def test_of_a_dialogue_in_one_text_the_answers_are_trained_on(text: str) -> None:
    (rendered,) = read({"text": text}).texts
    answers = "".join(rendered.text[start:end] for start, end in rendered.spans)
    assert "c" in answers
    assert not set("pq") & set(answers)


HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:"
C, R = ("*assistant", "c"), ("*assistant", "r")
ML = "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n"


def pair(chosen: Any, rejected: Any, **others: Any) -> dict[str, Any]:
    return {**others, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (pair("c", "r", prompt="p"), ["p", "c", "r"]),
        # A text response that happens to begin like its prompt is left alone.
        (pair("I am", "I was", prompt="I"), ["I", "I am", "I was"]),
        (pair("Q: a b? A: c", " Q: a b? A: r", prompt="Q: a b? A:"), ["Q: a b? A:", " c", " r"]),
        (pair("Q: a b? c", "Q: a b? r", prompt="Q: a b? "), ["Q: a b? ", "c", "r"]),
        *(
            (pair([*front, assistant("c")], [*front, assistant("r")], prompt=prompt), told)
            for front, prompt, told in [
                ([], [user("p")], [[U], [C], [R]]),
                ([user("p")], [user("p")], [[U], [C], [R]]),
                ([user("p")], "p", [[U], [C], [R]]),  # UltraFeedback
                ([user("p")], " p\n", [[("user", " p\n")], [C], [R]]),
                ([user("p")], [{**user("p"), "turn": 1}], [[U], [C], [R]]),
                ([system("s"), user("p")], "p", [[S, U], [C], [R]]),
                ([user("p")], [system("s"), user("p")], [[S, U], [C], [R]]),
                ([user("p"), assistant("x"), user("q")], "p",
                 [[U, ("assistant", "x"), ("user", "q")], [C], [R]]),
            ]
        ),
        (pair(assistant("c"), assistant("r"), prompt="p"), [[U], [C], [R]]),
        (pair([user("p"), {**assistant("c"), "score": 1}], [{**user("p"), "score": 0},
         assistant("r")]), [[U], [C], [R]]),
        # equal dialogues still leave a response on both sides
        (pair(CHAT, CHAT), [[U], [C], [C]]),
        # hh-rlhf: the shared beginning of the answers stays in the answers.
        (pair(HH + " So, yes", HH + " So, no"), [HH, " So, yes", " So, no"]),
        (pair(ML + "So: c", ML + "So: r"), [ML, "So: c", "So: r"]),
        (pair("Say it: yes", "Say it: yeah"), ["Say it:", " yes", " yeah"]),
        (pair("a b", "a b c"), ["a", " b", " b c"]),
        (pair("c", "r", question="p", system="s"), [[S, U], [C], [R]]),
        (pair("c", "r", instruction="i"), ["### Instruction:\ni\n\n### Response:\n", "c", "r"]),
        ({"question": "p", "response_j": "c", "response_k": "r"}, [[U], [C], [R]]),
        (
            {
                "input": {"messages": [user("p")], "tools": []},
                "preferred_output": [assistant("c")],
                "non_preferred_output": [assistant("r")],
            },
            [[U], [C], [R]],
        ),
        (
            pair(
                {"from": "gpt", "value": "c"},
                {"from": "gpt", "value": "r"},
                conversations=[{"from": "human", "value": "p"}],
            ),
            [[U], [C], [R]],
        ),
    ],
)  # fmt: skip
def test_preferences(row: dict[str, Any], expected: list[Any]) -> None:
    assert told(read(row, PREFERENCE_ROWS)) == expected


@given(st.text(), st.text(), st.text())
@settings(max_examples=50, deadline=None)
def test_an_implicit_prompt_loses_no_text(shared: str, one: str, two: str) -> None:
    try:
        reading = read({"chosen": shared + one, "rejected": shared + two}, PREFERENCE_ROWS)
    except RowError:  # no prompt, or no answer behind it
        return
    assert [text.text for text in reading.texts] == [shared + one, shared + two]
    assert reading.texts[0].prompt == reading.texts[1].prompt


@pytest.mark.parametrize(
    ("row", "kind", "reason", "word"),
    [
        ({"prompt": None, "completion": "c"}, SFT_ROWS, messages.NOT_TEXT, "prompt"),
        ({"prompt": "p", "completion": True}, SFT_ROWS, messages.NOT_TEXT, "True"),
        ({"prompt": "p", "completion": "x\ud83d"}, SFT_ROWS, messages.SURROGATE, r"\ud83d"),
        ({"messages": "hello"}, SFT_ROWS, messages.NOT_TEXT, "hello"),
        ({"messages": [user("p"), {"role": "assistant"}]}, SFT_ROWS, messages.NOT_TEXT, "None"),
        ({"messages": [user("p")]}, SFT_ROWS, formats.NO_ASSISTANT, "user"),
        ({"messages": [assistant("c")]}, SFT_ROWS, formats.EMPTY_PROMPT, "'c'"),
        (
            {"messages": [user("p"), {**assistant("c"), "weight": 0}]},
            SFT_ROWS,
            formats.UNTRAINED,
            "assistant (0)",
        ),
        (
            {"messages": [user("p"), {**assistant("c"), "weight": 0.5}]},
            SFT_ROWS,
            messages.WEIGHT,
            "0.5",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, CHAT[1]]},
            SFT_ROWS,
            messages.NOT_TEXT_PART,
            "image",
        ),
        ({"messages": CHAT, "images": ["a.jpg"]}, SFT_ROWS, messages.MEDIA, "a.jpg"),
        ({"messages": CHAT, "tools": "look"}, SFT_ROWS, messages.NOT_TEXT, "look"),
        ({"prompt": "p", "completion": "c", "label": "False"}, SFT_ROWS, formats.UNWANTED, "false"),
        ({"instruction": " ", "input": "", "output": "x"}, SFT_ROWS, formats.EMPTY_PROMPT, "''"),
        ({"prompt": "p", "response": " "}, SFT_ROWS, formats.EMPTY_RESPONSE, "p"),
        # columns that may carry a part of the conversation and say something else
        ({"prompt": "p", "completion": "c", "context": "k"}, SFT_ROWS, formats.UNCLEAR, "'k'"),
        ({"question": "p", "answer": "c", "response": "d"}, SFT_ROWS, formats.UNCLEAR, "answer"),
        ({"messages": CHAT, "history": [["q", "a"]]}, SFT_ROWS, formats.UNCLEAR, "history"),
        ({"text": "why?", "role": "prompter"}, SFT_ROWS, formats.UNCLEAR, "'prompter'"),
        (
            {"messages": [system("t"), *CHAT], "system": "s"},
            SFT_ROWS,
            formats.UNCLEAR,
            "'t'",
        ),
        (pair("c", "r", prompt="p", question="o"), PREFERENCE_ROWS, formats.UNCLEAR, "question"),
        (pair("c", None), PREFERENCE_ROWS, messages.NOT_TEXT, "rejected"),
        (pair("yes", "no"), PREFERENCE_ROWS, formats.EMPTY_PROMPT, "'no'"),
        (
            pair([user("o"), assistant("c")], [user("o"), assistant("r")], prompt="p"),
            PREFERENCE_ROWS,
            pairs.UNCLEAR_PROMPT,
            "'o'",
        ),
        (
            pair("Q: a b? A: c", "r", prompt="Q: a b? A:"),
            PREFERENCE_ROWS,
            pairs.UNCLEAR_PROMPT,
            "only one",
        ),
        ({"words": "x", "id": 1}, SFT_ROWS, formats.NO_FORMAT, "words, id"),
        ({"chosen": "x"}, PREFERENCE_ROWS, formats.NO_FORMAT, "chosen/rejected"),
        ({}, SFT_ROWS, formats.NO_FORMAT, "(none)"),
    ],
)
def test_a_row_that_cannot_be_used_says_why_in_one_line(
    row: dict[str, Any], kind: RowKind, reason: str, word: str
) -> None:
    with pytest.raises(RowError) as error:
        read(row, kind)
    assert error.value.reason == reason
    assert word in error.value.detail
    assert "\n" not in str(error.value)


def test_tool_calls_are_objects_and_nulls_are_not_invented() -> None:
    arguments = {"town": {"name": "x", "zip": None}, "day": None}
    calls = [
        {"type": "function", "function": {"name": "f", "arguments": arguments}},
        {"id": "1", "function": {"name": "f", "arguments": json.dumps({"day": 3, "town": None})}},
    ]
    row = {"messages": [user("p"), {"role": "assistant", "content": None, "tool_calls": calls}]}
    reading = read(row | {"tools": json.dumps([{"name": "f", "default": None}])})
    assert reading.chat is not None
    (message,) = reading.chat.responses[0]
    spelled = [call["function"]["arguments"] for call in message.extra["tool_calls"]]
    assert spelled == [{"town": {"name": "x"}}, {"day": 3, "town": None}]
    assert reading.chat.tools == [{"name": "f"}]


def test_columns_by_name_and_columns_not_used() -> None:
    row = {"query": "o", "ask": "p", "reply": "c", "system": "s", "id": 3, "note": None}
    reading = read(row, columns={"prompt": "ask", "completion": "reply", "system": ""})
    assert told(reading) == ["p", "c"]
    assert reading.unused == ("query", "system", "id")
    seen = {"messages": CHAT, "images": ["a.jpg"]}
    assert told(read(seen, columns=formats.parse_columns("images=", "--x"))) == [[U], [A]]
    assert formats.parse_columns("prompt=ask, completion = reply,system=", "--x") == {
        "prompt": "ask",
        "completion": "reply",
        "system": "",
    }
    for text in ("prompt", "prompt=a,colour=b"):
        with pytest.raises(DataError, match=r"--sft_columns .*MEANING=COLUMN"):
            formats.parse_columns(text, "--sft_columns")


@needs_shared
def test_real_bare_dialogues_split_where_the_authors_of_the_data_split() -> None:
    rows = load_rows(str(SHARED / "data" / "preference_train.parquet"), limit=500)
    for row in raw_rows(rows[:]):
        bare = {key: row["prompt"] + row[key] for key in ("chosen", "rejected")}
        assert told(read(bare, PREFERENCE_ROWS)) == [*row.values()]
