"""llm.data.templates: whatever a template does, only the assistant's own text is trained on."""

from __future__ import annotations

import datetime
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from _text import assistant, make_tokenizer, user
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data import chat, templates, tokens
from llm.data.encode import Encoded, encode
from llm.data.errors import DataError
from llm.data.formats import PREFERENCE_ROWS, SFT_ROWS
from llm.data.report import NO_END, OTHER_END
from llm.preview import responses

# Markup is in lower case; texts are in capitals, one letter for each speaker.
LETTERS = {"system": "S", "user": "U", "assistant": "A", "tool": "T"}


def template_of(system: str, header: str, end: str, trim: str) -> str:
    """A template with one habit of each kind that real ones have."""
    content = "m.content | trim" if trim else "m.content"
    own = "{{ '<' + m.role + '>' + " + content + " + '" + end + "' }}"
    place = {
        "own": own,
        "skipped": "{% if m.role != 'system' %}" + own + "{% endif %}",
        "in the last user's": "{% if m.role == 'user' and loop.last and messages[0].role == "
        "'system' %}{{ '<user>' + messages[0].content + ' ' + m.content + '" + end + "' }}"
        "{% elif m.role != 'system' %}" + own + "{% endif %}",
        "at the end": "{% if m.role != 'system' %}" + own + "{% endif %}{% if loop.last and "
        "messages[0].role == 'system' %}{{ '<note>' + messages[0].content }}{% endif %}",
    }[system]
    generation = {
        "same": "<assistant>",
        "none": "",
        "longer": "<assistant><think>",
        "other": "<answer now>",
    }[header]
    return (
        "{% for m in messages %}" + place + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + generation + "' }}{% endif %}"
    )


HABITS = (
    ("own", "skipped", "in the last user's", "at the end"),
    ("same", "none", "longer", "other"),
    ("</s>", "\n", ""),
    ("", "trim"),
)
TEMPLATES = [template_of(*habits) for habits in product(*HABITS)] + [
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ '<' + m.role + '>' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<go>' }}{% endif %}",
    # only the last answer keeps what it was told to think
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if loop.last and m.role == 'assistant' %}"
    "{{ '<think></think>' }}{% endif %}{{ m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}",
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% for m in messages | reverse %}{{ '<' + m.role + '>' + m.content }}{% endfor %}",
    "{{ raise_exception('no') }}",
]
TOKENIZERS = [make_tokenizer(chat_template=template) for template in TEMPLATES]


def texts_of(role: str) -> Any:
    """What a speaker says: the own letter, among other signs."""
    return st.lists(st.sampled_from([LETTERS[role], " ", "\n", "."]), max_size=5).map("".join)


def message(role: str) -> Any:
    return texts_of(role).map(lambda text: {"role": role, "content": text})


conversations = st.lists(
    st.sampled_from(["user", "assistant", "tool", "system"]).flatmap(message), min_size=1
).flatmap(
    lambda rest: st.sampled_from([[], [{"role": "system", "content": "S."}]]).map(
        lambda front: [*front, *rest]
    )
)


def encoded(rows: list[Any], tokenizer: Any, kind: Any = SFT_ROWS, **options: Any) -> Encoded:
    return encode(rows, tokenizer, kind, **{"max_length": 10**6, "name": "x", **options})


def letters(text: str) -> str:
    return "".join(letter for letter in text if letter in "SUAT")


@given(st.sampled_from(TOKENIZERS), conversations, st.sampled_from(["all", "last"]))
@settings(max_examples=400, deadline=None)
def test_only_the_assistant_is_trained_on_and_all_of_the_conversation_stands_before_it(
    tokenizer: Any, messages: list[dict[str, str]], train_on: str
) -> None:
    result = encoded([{"messages": messages}], tokenizer, train_on=train_on)
    report = result.report
    assert report.kept + sum(report.dropped.values()) == 1
    if not report.kept:
        return
    trained = "".join(letters(each) for row in result.rows for each in responses(row, tokenizer))
    assert set(trained) <= {"A"}
    replies = [i for i, each in enumerate(messages) if each["role"] == "assistant"]
    texts = [each["content"].strip() for each in messages]
    replies = [i for i in replies if texts[i] and any(texts[:i])]
    said = ["".join(letters(each["content"])) for each in messages]
    answers = replies[-1:] if train_on == "last" else replies
    assert trained == "".join(said[i] for i in answers)
    row = result.rows[-1]
    whole = letters(tokenizer.decode([*row["prompt_ids"], *row["completion_ids"]]))
    assert sorted(whole) == sorted("".join(said[: replies[-1] + 1]))


@given(st.sampled_from(TOKENIZERS), conversations, conversations, conversations)
@settings(max_examples=200, deadline=None)
def test_so_it_is_for_pairs(tokenizer: Any, prompt: Any, one: Any, two: Any) -> None:
    row = {"prompt": prompt, "chosen": [*prompt, *one], "rejected": [*prompt, *two]}
    result = encoded([row], tokenizer, PREFERENCE_ROWS)
    for each in result.rows:
        assert set(letters("".join(responses(each, tokenizer)))) <= {"A"}
        for name in ("chosen", "rejected"):
            assert 1 in each.get(f"{name}_mask", [1])


def last_user_system() -> Any:
    return make_tokenizer(chat_template=template_of("in the last user's", "none", "</s>", ""))


def test_the_prompt_of_an_answer_is_the_one_at_inference() -> None:
    tokenizer = last_user_system()
    messages = [{"role": "system", "content": "S"}, user("U"), assistant("A"), user("UU")]
    result = encoded([{"messages": [*messages, assistant("AA")]}], tokenizer)
    # Each answer is behind the system message, so one sequence cannot hold both.
    assert [tokenizer.decode(row["prompt_ids"]) for row in result.rows] == [
        "<user>S U</s>",
        "<user>U</s><assistant>A</s><user>S UU</s>",
    ]
    assert result.report.kept == 1
    assert result.report.notes == {templates.SEVERAL_TEXTS: 2}
    row = {"messages": [*messages, assistant("AA")]}
    report = encoded([row], tokenizer, max_length=30, truncation_mode="keep_start").report
    assert (report.kept, report.notes[tokens.PART_LOST]) == (1, 1)
    pair = {"prompt": messages[:2], "chosen": [assistant("A")], "rejected": [assistant("AA")]}
    (row,) = encoded([pair], tokenizer, PREFERENCE_ROWS).rows
    assert tokenizer.decode(row["prompt_ids"]) == "<user>S U</s>"
    pair["chosen"] = [*messages[2:], assistant("A")]
    report = encoded([pair], tokenizer, PREFERENCE_ROWS).report
    assert report.dropped == {templates.NO_TURNS_IN_PAIRS: 1}


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 'x "y"'}}}


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("{{ c.function | tojson }}", '{"name": "f", "arguments": {"a": "x \\"y\\""}}'),
        ("{% for k, v in c.function.arguments | items %}{{ k + '=' + v }}{% endfor %}", 'a=x "y"'),
        ("{{ 'f' + c.function.arguments }}", 'f{"a": "x \\"y\\""}'),  # wants JSON text
    ],
)
def test_tool_calls_are_written_as_the_template_wants_them(arguments: str, shown: str) -> None:
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% for c in m.tool_calls or [] "
        "%}" + arguments + "{% endfor %}{{ '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    reply = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    row = {"messages": [user("U"), reply, {"role": "tool", "content": "T"}, assistant("A")]}
    result = encoded([row], tokenizer)
    assert responses(result.rows[0], tokenizer) == [f"{shown}</s>", "A</s>"]


def test_what_a_template_leaves_out_is_counted_and_tools_are_told() -> None:
    tokenizer = make_tokenizer(chat_template=template_of("own", "same", "</s>", ""))
    row = {"messages": [user("U"), {**assistant(""), "tool_calls": [CALL]}]}
    report = encoded([row], tokenizer).report
    assert report.dropped == {templates.LEFT_OUT: 1}
    assert "the tool call" in report.line("x")
    skipping = make_tokenizer(chat_template=template_of("skipped", "same", "</s>", ""))
    system = {"role": "system", "content": "Be exact."}
    report = encoded([{"messages": [system, user("U"), assistant("A")]}], skipping).report
    assert report.dropped == {templates.LEFT_OUT: 1}
    assert "the system message 'Be exact.'" in report.line("x")
    result = encoded([{"messages": [user("U"), assistant("A")], "tools": [CALL]}], tokenizer)
    prompt = tokenizer.decode(result.rows[0]["prompt_ids"])
    assert prompt.startswith("<system>You can call these functions:\n")
    assert '"name": "f"' in prompt
    assert result.report.notes == {templates.TOOLS_TOLD: 1}


def test_the_date_is_fixed(tmp_path: Path) -> None:
    template = "{{ strftime_now('%d %b %Y') }}" + template_of("own", "same", "</s>", "")
    tokenizer = make_tokenizer(chat_template=template)
    day = datetime.date(2020, 2, 29)
    result = encoded([{"messages": [user("U"), assistant("A")]}], tokenizer, date=day)
    assert tokenizer.decode(result.rows[0]["prompt_ids"]).startswith("29 Feb 2020<user>")
    file, said = tmp_path / "run" / "date", list[str]()

    def fixed(given: str | None = None, *, keep: bool = True) -> datetime.date:
        return templates.fixed_date(tokenizer, given, file, keep=keep, say=said.append)

    assert fixed("2020-02-29") == day
    assert fixed(keep=False) == datetime.date.today()
    assert not file.exists()
    fixed()
    file.write_text("2020-02-29\n", encoding="utf-8")
    assert fixed() == day
    assert "2020-02-29" in said[-1]
    assert templates.fixed_date(make_tokenizer(), None, file, keep=True, say=said.append) != day


@pytest.mark.parametrize("name", chat.NAMES)
def test_named_templates_show_a_conversation_and_its_ends(name: str) -> None:
    tokenizer = make_tokenizer(chat_template=None)
    chat.set_chat_template(tokenizer, name)
    front = [{"role": "system", "content": "S"}, user("U")]
    row = {"messages": [*front, assistant("A"), user("UU"), assistant("AA")]}
    result = encoded([row], tokenizer)
    assert result.report.notes == {}
    texts = responses(result.rows[0], tokenizer)
    assert [text.strip() for text in texts] == ["A</s>", "AA</s>"]
    whole = [*result.rows[0]["prompt_ids"], *result.rows[0]["completion_ids"]]
    shown = tokenizer.decode(whole).replace("INST", "").replace("Instruction", "")
    assert letters(shown) == "SUAUUAA"


def test_a_template_by_file_and_what_is_none(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}\n", encoding="utf-8")
    chat.set_chat_template(tokenizer, None)
    assert "[assistant]" in tokenizer.chat_template
    chat.set_chat_template(tokenizer, str(file))
    assert "[assistant]" not in tokenizer.chat_template
    file.write_text("\n{% for m in messages %}", encoding="utf-8")
    for name, word in ((str(file), "own.jinja line"), ("vicuna", "none of alpaca, chatml")):
        with pytest.raises(DataError, match=word):
            chat.set_chat_template(tokenizer, name)


def test_an_answer_that_does_not_end_in_eos_is_counted() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    row = {"messages": [user("U"), assistant("A")]}
    chat.set_chat_template(tokenizer, "chatml")
    result = encoded([row], tokenizer)
    assert result.report.notes == {OTHER_END: 1}
    assert result.ends == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    tokenizer.chat_template = template_of("own", "same", "\n", "")
    (line_feed,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    two = {"messages": [*row["messages"], user("U"), assistant("A A")]}
    result = encoded([row, two], tokenizer)
    assert (result.report.notes, result.ends) == ({NO_END: 2}, (line_feed,))
    assert "eos_token" in result.report.line("x")
    for text in ("A\nA", "A"):  # no end where answers hold it, or where there is none
        tokenizer.chat_template = template_of("own", "same", "\n" * (text != "A"), "")
        other = {"messages": [user("U"), assistant(text)]}
        assert encoded([row, other], tokenizer).ends == ()
