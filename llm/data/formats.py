"""Which columns of a row say what: rows of every known format as a `Chat` or as plain texts.

    reading = read_row(row, SFT_ROWS, Options())
    reading.chat or reading.texts          # messages for a chat template, or text with its spans
    reading.unused                         # columns that nothing was read from

Nothing is guessed: a column that may carry a part of the conversation and is not read must repeat
what is read, or the row is refused with the flag that settles it (`--sft_columns`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llm.data.errors import DataError, RowError, quote
from llm.data.messages import (
    NOT_TEXT,
    Message,
    Rendered,
    assistant,
    check_media,
    is_conversation,
    read_messages,
    read_text,
    read_tools,
    user,
)
from llm.data.pairs import (
    REPEATED,
    document_spans,
    merged,
    prompt_end,
    split_shared,
    without_repeat,
)

Row = Mapping[str, Any]

NO_FORMAT = "no known format"
NO_ASSISTANT = "no answer to train on"
EMPTY_PROMPT = "empty prompt"
EMPTY_RESPONSE = "empty response"
UNWANTED = "labelled as unwanted"
UNTRAINED = "weight 0 on every answer"
BY_WISH = (UNWANTED, UNTRAINED)
"""Rows that their owner wants left out: no loss, however many."""
UNCLEAR = "unclear columns"

CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
PROMPTS = ("prompt", "instruction", "question", "query", "problem")
ANSWERS = ("completion", "response", "answer", "output", "solution")
PAIRS = (
    *(("chosen", "rejected"), ("chosen_response", "rejected_response")),
    *(("response_j", "response_k"), ("preferred_output", "non_preferred_output")),
    *(("preferred", "dispreferred"), ("accepted", "rejected"), ("win", "lose")),
    *(("response_chosen", "response_rejected"), ("answer_chosen", "answer_rejected")),
)
EXTRAS = ("input", "context")
"""What a prompt refers to, in a column of its own."""
SYSTEMS = ("system", "system_prompt", "system_message")
HISTORIES = ("history",)
TOOLS = ("tools", "functions")
SPEAKERS = ("role", "from", "speaker")
MEANINGS = (
    *("prompt", "completion", "chosen", "rejected", "messages", "text", "instruction"),
    *("input", "system", "history", "tools", "label"),
)
"""What --sft_columns and --dpo_columns can name a column for."""
_KNOWN = {*PROMPTS, *ANSWERS, *CONVERSATIONS, "text", *(name for pair in PAIRS for name in pair)}
_ALPACA = ("### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:\n")


@dataclass(frozen=True)
class Options:
    """How rows are read: see `llm.flags.arguments.DataArguments`."""

    columns: Mapping[str, str] = field(default_factory=dict)
    train_on: str = "all"
    has_template: bool = True
    eos: str = ""


@dataclass(frozen=True)
class Chat:
    """Messages in front of the answers, and one list of messages for each answer."""

    prompt: list[Message]
    responses: tuple[list[Message], ...]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Reading:
    """One row as its format says: a chat, or texts (one for each answer)."""

    chat: Chat | None = None
    texts: tuple[Rendered, ...] = ()
    is_document: bool = False
    notes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowKind:
    """What differs between the two kinds of data."""

    label: str
    responses: tuple[str, ...]
    accepted: str


SFT_ROWS = RowKind(
    "sft",
    ("completion",),
    f"{'/'.join(PROMPTS)} + {'/'.join(ANSWERS)} | {'/'.join(CONVERSATIONS)} | text",
)
PREFERENCE_ROWS = RowKind(
    "dpo",
    ("chosen", "rejected"),
    f"{'/'.join(PROMPTS)} + {' or '.join('/'.join(pair) for pair in PAIRS)}; the prompt may stand "
    "in the pair",
)


def parse_columns(text: str | None, flag: str) -> dict[str, str]:
    """`prompt=question,completion=answer` as meaning to column.

    Raises:
        DataError: not of that form, or no such meaning.
    """
    pairs = [each.partition("=") for each in (text or "").split(",") if each.strip()]
    for meaning, equals, column in pairs:
        if not equals or (column.strip() and meaning.strip() not in MEANINGS):
            raise DataError(
                f"{flag} {text}: give MEANING=COLUMN,... with {', '.join(MEANINGS)} for MEANING"
            )
    return {meaning.strip(): column.strip() for meaning, _, column in pairs}


class _Columns:
    """The columns of a row that have a value; knows which ones were read."""

    def __init__(self, row: Row, columns: Mapping[str, str]) -> None:
        hidden = {*columns, *columns.values()}
        named = {meaning: row.get(column) for meaning, column in columns.items() if column}
        own = {key: value for key, value in row.items() if key not in hidden}
        self.row, self.columns = row, columns
        self.values = {k: v for k, v in (own | named).items() if v is not None}
        self.read: set[str] = set()

    def first(self, names: Iterable[str]) -> str | None:
        return next((name for name in names if name in self.values), None)

    def take(self, names: Iterable[str] | str) -> Any:
        name = self.first([names] if isinstance(names, str) else names)
        if name is None:
            return None
        self.read.add(name)
        return self.values[name]

    def text(self, names: Iterable[str]) -> str:
        """The text of the first of these columns; empty if there is none."""
        name = self.first(names)
        return "" if name is None else read_text(self.take(name), name)

    def unused(self) -> tuple[str, ...]:
        origins = {self.columns.get(name, name) for name in self.read}
        return tuple(k for k, v in self.row.items() if v is not None and k not in origins)


def read_row(row: Row, kind: RowKind, options: Options) -> Reading:
    """One raw row as its format says.

    Demonstrations: a prompt and an answer, a conversation, or `text`; preferences: a prompt and two
    answers, where the answers may repeat the prompt. Names are those of PROMPTS, ANSWERS, PAIRS and
    CONVERSATIONS, beside `input`, `system`, `history`, `tools` and KTO's `label`. `prompt` with
    text is continued as it stands; `instruction` is rendered as Alpaca's

        ### Instruction:\\n{instruction}\\n\\n### Input:\\n{input}\\n\\n### Response:\\n{output}

    without the Input paragraph where it is empty; every other row becomes messages.

    Raises:
        RowError: no format matches, a value is not text, or it is unclear what a column is.
    """
    columns = _Columns(row, options.columns)
    check_media(columns.values)
    read = _read_sft if kind == SFT_ROWS else _read_preference
    reading = read(columns, kind, options)
    if not options.columns:
        _check_left_over(columns, reading, kind)
    unused = columns.unused()
    return replace(reading, unused=unused) if unused else reading


def _read_sft(columns: _Columns, kind: RowKind, options: Options) -> Reading:
    conversation = columns.first(CONVERSATIONS)
    if conversation and not columns.values.keys() >= {"prompt", "completion"}:
        _check_wanted(columns)
        return _conversation(columns, conversation, options)
    question, answer = _question(columns), columns.first(ANSWERS)
    if "instruction" in columns.values and "output" in columns.values:
        question, answer = "instruction", "output"
    if question and answer and question != answer:
        _check_wanted(columns)
        return _asked(columns, question, (answer,), options)
    if "text" in columns.values:
        _check_no_speaker(columns)
        text = read_text(columns.take("text"), "text")
        if not text.strip():
            raise RowError(EMPTY_RESPONSE, "text has none")
        return Reading(texts=(Rendered(text, document_spans(text)),), is_document=True)
    raise _no_format(columns, kind)


_LABELS = {"true": True, "false": False, "1": True, "0": False}


def _check_wanted(columns: _Columns) -> None:
    """KTO's label is about an answer; beside a text it classifies, and is not read."""
    label = str(columns.values.get("label")).lower()
    if label in _LABELS and not _LABELS[str(columns.take("label")).lower()]:
        raise RowError(UNWANTED, f"label is {label}")


def _check_no_speaker(columns: _Columns) -> None:
    """A text that somebody says is one turn of a conversation, and may be the user's."""
    speaker = columns.first(SPEAKERS)
    if speaker and "text" not in columns.columns:
        raise RowError(
            UNCLEAR, f"{speaker} says who wrote text ({quote(columns.values[speaker])}): join the "
            "turns of a conversation into messages"
        )  # fmt: skip


def _question(columns: _Columns) -> str | None:
    if "completion" in columns.values and "prompt" in columns.values:
        return "prompt"
    return columns.first(PROMPTS) or columns.first(EXTRAS)


def _read_preference(columns: _Columns, kind: RowKind, options: Options) -> Reading:
    pair = next((each for each in PAIRS if columns.values.keys() >= set(each)), None)
    if pair is None:
        raise _no_format(columns, kind)
    question = columns.first((*PROMPTS, *CONVERSATIONS)) or columns.first(EXTRAS)
    if question is None:
        return _without_question(columns, pair, options)
    return _asked(columns, question, pair, options)


def _no_format(columns: _Columns, kind: RowKind) -> RowError:
    empty = [name for name, value in columns.row.items() if value is None and name in _KNOWN]
    if empty:
        raise RowError(NOT_TEXT, f"{', '.join(empty)} has no value")
    names = ", ".join(columns.values) or "(none)"
    return RowError(
        NO_FORMAT, f"columns {names} match no accepted format: {kind.accepted}; name yours with "
        f"--{kind.label}_columns {'prompt' if kind == SFT_ROWS else 'chosen'}=COLUMN,..."
    )  # fmt: skip


# ------------------------------------------------------------------------------- one conversation


def _conversation(columns: _Columns, name: str, options: Options) -> Reading:
    messages = read_messages(columns.take(name), name)
    messages = _with_system(messages, columns.text(SYSTEMS))
    return _trained_chat(messages, read_tools(columns.take(TOOLS)), options)


def _with_system(messages: list[Message], system: str) -> list[Message]:
    if not system.strip():
        return messages
    own = messages[:1] if messages and messages[0].role == "system" else []
    if own and own[0].content.strip() not in ("", system.strip()):
        raise RowError(UNCLEAR, f"two system messages: {quote(system)}, {quote(own[0].content)}")
    return [Message("system", system), *messages[len(own) :]]


def _trained_chat(messages: list[Message], tools: Any, options: Options) -> Reading:
    """A chat whose prompt ends in front of the first answer that is trained on."""
    replies = [i for i, each in enumerate(messages) if each.is_reply]
    trained = [i for i in replies if messages[i].trained and not messages[i].is_blank]
    if not trained:
        wanted = [i for i in replies if messages[i].trained]
        reason = EMPTY_RESPONSE if wanted else UNTRAINED if replies else NO_ASSISTANT
        roles = ", ".join(f"{each.role} ({each.trained:d})" for each in messages)
        raise RowError(reason, f"roles (trained on or not) are {roles}")
    # A greeting has nothing in front of it: it belongs to the prompt of the answers behind it.
    begun = [i for i in trained if not all(each.is_blank for each in messages[:i])]
    if not begun:
        first = quote(messages[trained[0]].content)
        raise RowError(EMPTY_PROMPT, f"nothing stands in front of {first}")
    trained = begun[-1:] if options.train_on == "last" else begun
    marked = [
        each if each.trained == (i in trained) else replace(each, trained=i in trained)
        for i, each in enumerate(messages)
    ]
    prompt = marked[: trained[0]]
    return Reading(chat=Chat(prompt, (marked[trained[0] : trained[-1] + 1],), tools))


# ------------------------------------------------------------------------ a question and answers


@dataclass(frozen=True)
class _Asked:
    """The columns around a question, read."""

    question: str
    text: str
    extra: str
    system: str
    history: list[Message]
    tools: Any
    answers: tuple[str, ...]

    @property
    def is_bare(self) -> bool:
        return not (self.system.strip() or self.history or self.tools)


def _asked(columns: _Columns, question: str, names: Sequence[str], options: Options) -> Reading:
    value, answers = columns.take(question), [columns.take(name) for name in names]
    tools = columns.take(TOOLS)
    if isinstance(value, Mapping) and "messages" in value:  # OpenAI's preferences
        value, tools = value["messages"], tools or value.get("tools")
    if is_conversation(value) or any(map(is_conversation, answers)):
        return _asked_in_messages(
            columns, question, value, list(zip(names, answers, strict=True)), tools, options
        )
    text = read_text(value, question)
    extra = "" if question in ("prompt", *EXTRAS) else columns.text(EXTRAS)
    if not text.strip():
        text, extra = extra, ""
    asked = _Asked(
        question,
        text,
        extra,
        columns.text(SYSTEMS),
        _history(columns),
        read_tools(tools),
        tuple(read_text(value, name) for name, value in zip(names, answers, strict=True)),
    )
    _check_blank(asked)
    return _in_style(asked, options)


def _check_blank(asked: _Asked) -> None:
    if not asked.text.strip():
        raise RowError(EMPTY_PROMPT, f"{asked.question} is {quote(asked.text)}")
    for answer in asked.answers:
        if not answer.strip():
            raise RowError(EMPTY_RESPONSE, f"{asked.question} {quote(asked.text)} has {answer!r}")


def _in_style(asked: _Asked, options: Options) -> Reading:
    """Text where the columns say how it reads on, else messages."""
    answers, repeated = without_repeat(asked.text, asked.answers)
    notes = (REPEATED,) if repeated else ()
    if asked.question == "instruction" and not asked.tools:
        texts = tuple(_alpaca(asked, answer, options) for answer in answers)
        return Reading(texts=texts, notes=notes)
    if asked.question == "prompt" and asked.is_bare:
        return Reading(texts=tuple(_continued(asked.text, each) for each in answers), notes=notes)
    if not options.has_template and not asked.history and not asked.tools:
        prompt = "\n\n".join(each for each in (asked.system, asked.text, asked.extra) if each)
        prompt += "" if asked.question == "prompt" else "\n\n"
        return Reading(texts=tuple(_continued(prompt, each) for each in answers), notes=notes)
    question = f"{asked.text}\n\n{asked.extra}" if asked.extra.strip() else asked.text
    messages = _with_system([*asked.history, user(question)], asked.system)
    if len(answers) == 1:
        reading = _trained_chat([*messages, assistant(answers[0])], asked.tools, options)
        return replace(reading, notes=notes)
    chat = Chat(messages, tuple([assistant(each)] for each in answers), asked.tools)
    return Reading(chat=chat, notes=notes)


def _continued(prompt: str, answer: str) -> Rendered:
    return Rendered(prompt + answer, ((len(prompt), len(prompt) + len(answer)),))


def _alpaca(asked: _Asked, answer: str, options: Options) -> Rendered:
    """Alpaca's headings; the answers of earlier turns end in EOS and are trained on as well."""
    text = f"{asked.system}\n\n" if asked.system.strip() else ""
    spans = []
    for each in [*asked.history, user(_alpaca_question(asked)), assistant(answer)]:
        if each.is_reply:
            spans.append((len(text), len(text) + len(each.content) + len(options.eos)))
            text += f"{each.content}{options.eos}\n\n"
        else:
            text += f"{_ALPACA[0]}{each.content}{_ALPACA[2]}"
    end = len(text) - len(options.eos) - 2  # what encoding puts there itself
    spans[-1] = (spans[-1][0], end)
    is_pair = len(asked.answers) == 2
    chosen = spans[-1:] if options.train_on == "last" or is_pair else spans
    return Rendered(text[:end], tuple(chosen))


def _alpaca_question(asked: _Asked) -> str:
    return asked.text + (f"{_ALPACA[1]}{asked.extra}" if asked.extra.strip() else "")


def _history(columns: _Columns) -> list[Message]:
    name = columns.first(HISTORIES)
    value = columns.take(HISTORIES)
    return read_messages(value, str(name)) if value not in (None, [], "", "[]") else []


# ------------------------------------------------------------- a question or answers in messages


def _asked_in_messages(
    columns: _Columns,
    question: str,
    value: Any,
    answers: Sequence[tuple[str, Any]],
    tools: Any,
    options: Options,
) -> Reading:
    prompt = _turns(value, question, user)
    if question not in ("prompt", *EXTRAS, *CONVERSATIONS) and not is_conversation(value):
        extra = columns.text(EXTRAS)
        prompt = [user(f"{value}\n\n{extra}" if extra.strip() else str(value))]
    if question in CONVERSATIONS and len(prompt) > 1 and prompt[-1].is_reply:
        prompt = prompt[:-1]  # the conversation with the wanted answer, once more
    prompt = _with_system([*_history(columns), *prompt], columns.text(SYSTEMS))
    prompt = [replace(each, trained=False) for each in prompt]
    responses = [merged(prompt, _turns(value, name, assistant)) for name, value in answers]
    fronts = [[each.said for each in front] for front, _ in responses]
    if any(front != fronts[0] for front in fronts):
        raise RowError(UNCLEAR, f"the answers stand behind different prompts: {quote(fronts)}")
    return _answered(responses[0][0], [rest for _, rest in responses], read_tools(tools), options)


def _turns(value: Any, name: str, speaker: Callable[[str], Message]) -> list[Message]:
    if is_conversation(value):
        return read_messages(value, name)
    return [speaker(read_text(value, name))]


def _answered(
    prompt: list[Message], responses: list[list[Message]], tools: Any, options: Options
) -> Reading:
    if len(responses) == 1:
        return _trained_chat([*prompt, *responses[0]], tools, options)
    prompt, responses = split_shared(prompt, responses)
    for response in responses:
        if not any(each.is_reply and each.trained for each in response):
            raise RowError(NO_ASSISTANT, f"roles are {', '.join(each.role for each in response)}")
        if all(each.is_blank for each in response if each.is_reply):
            raise RowError(EMPTY_RESPONSE, f"after {quote(prompt[-1].content if prompt else '')}")
    if all(each.is_blank for each in prompt):
        raise RowError(EMPTY_PROMPT, "the two answers share no message in front of them")
    return Reading(chat=Chat(prompt, tuple(responses), tools))


def _without_question(columns: _Columns, pair: Sequence[str], options: Options) -> Reading:
    """Both dialogues are whole: the prompt is what they share."""
    values = [columns.take(name) for name in pair]
    if any(map(is_conversation, values)):
        system = columns.text(SYSTEMS)
        turns = [
            _with_system(_turns(v, n, assistant), system) for n, v in zip(pair, values, strict=True)
        ]
        return _answered([], turns, read_tools(columns.take(TOOLS)), options)
    chosen, rejected = (read_text(value, name) for name, value in zip(pair, values, strict=True))
    cut, notes = prompt_end(chosen, rejected)
    system = columns.text(SYSTEMS)
    prompt = f"{system}\n\n{chosen[:cut]}" if system.strip() else chosen[:cut]
    if not prompt.strip():
        raise RowError(EMPTY_PROMPT, f"{quote(chosen)} and {quote(rejected)} share no beginning")
    for answer in (chosen[cut:], rejected[cut:]):
        if not answer.strip():
            raise RowError(EMPTY_RESPONSE, f"after {quote(prompt)}")
    return Reading(
        texts=tuple(_continued(prompt, each[cut:]) for each in (chosen, rejected)), notes=notes
    )


# ------------------------------------------------------------------------------- what was not read


_CARRIERS = {*PROMPTS, *EXTRAS, *SYSTEMS, *HISTORIES, *CONVERSATIONS, *TOOLS}
_ANSWERS = set(ANSWERS)


def _check_left_over(columns: _Columns, reading: Reading, kind: RowKind) -> None:
    """Refuse a row with a column that may belong to its conversation and says something else."""
    carriers = _CARRIERS | (_ANSWERS if kind == SFT_ROWS and not reading.is_document else set())
    carriers &= set(columns.unused())
    if not carriers:
        return
    read = [part for part in _texts_of(reading) if part]
    everything = "\n".join(read)
    for name in sorted(carriers):
        for text in _leaves(columns.row[name]):
            if text not in everything and not any(part in text for part in read):
                raise RowError(
                    UNCLEAR,
                    f"{name} says {quote(text)}, which is no part of what was read from "
                    f"{', '.join(sorted(columns.read))}",
                )


def _texts_of(reading: Reading) -> list[str]:
    if reading.chat is None:
        return [each.text.strip() for each in reading.texts]
    messages = [*reading.chat.prompt, *(each for part in reading.chat.responses for each in part)]
    return [each.content.strip() for each in messages]


def _leaves(value: Any) -> list[str]:
    """The texts in a value, at any depth, but not the names of roles."""
    if isinstance(value, Mapping):
        parts = [each for key, each in value.items() if key not in ("role", "from")]
    else:
        parts = value if isinstance(value, list) else []
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    return [leaf for part in parts for leaf in _leaves(part)]
