"""Messages of every spelling as one: who speaks, what, and whether it is trained on.

OpenAI's `role` and `content`, ShareGPT's `from` and `value`, lists of content parts, tool calls
with their arguments as JSON text, JSON text of a whole conversation, columns of roles and contents:
all become a list of `Message`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llm.data.errors import RowError, quote

NOT_TEXT = "not text"
NOT_TEXT_PART = "content that is no text"
WEIGHT = "message weight other than 0 or 1"
MEDIA = "pictures or sound"
SURROGATE = "half a character (a lone surrogate)"

MEDIA_KEYS = frozenset(
    ("image", "images", "video", "videos", "audio", "audios", "pixel_values", "image_url")
)
ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "chatbot": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
"""Other names of the roles; any other name goes to the chat template as it is."""
_ROLE_KEYS = ("role", "from", "speaker")
_CONTENT_KEYS = ("content", "value", "text")
_TRAINED_KEYS = ("weight", "train", "training", "trainable", "loss")
"""Keys of a message by which its owner says whether to train on it (1, true) or not (0, false)."""
_READ = {*_ROLE_KEYS, *_CONTENT_KEYS, *_TRAINED_KEYS, "tool_calls", "function_call"}


@dataclass(frozen=True)
class Message:
    """One turn. `extra` holds what else the chat template may show: tool calls, reasoning, ..."""

    role: str
    content: str
    extra: dict[str, Any] = field(default_factory=dict)
    trained: bool = True

    @property
    def is_reply(self) -> bool:
        return self.role == "assistant"

    @property
    def is_blank(self) -> bool:
        return not self.content.strip() and not self.extra.get("tool_calls")

    @property
    def said(self) -> tuple[str, str, str]:
        """What two messages are compared by: no other keys, no outer white space."""
        calls = json.dumps(self.extra.get("tool_calls"), sort_keys=True)
        return self.role, self.content.strip(), calls

    def plain(self) -> dict[str, Any]:
        """As a chat template reads it."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True)
class Rendered:
    """A text and where in it (start, end; in characters) the assistant's own turns stand."""

    text: str
    spans: tuple[tuple[int, int], ...]

    @property
    def prompt(self) -> str:
        return self.text[: self.spans[0][0]]


class Number(float):
    """A number that knows how it was written: 1.50 as an answer is that text."""

    def __new__(cls, text: str) -> Number:
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str


def user(content: str) -> Message:
    return Message("user", content)


def assistant(content: str) -> Message:
    return Message("assistant", content)


def read_text(value: Any, name: str) -> str:
    """Text as it is, and numbers in their digits.

    Raises:
        RowError: neither, or text that no encoding of Unicode has.
    """
    if isinstance(value, Number):
        value = value.text
    elif isinstance(value, int | float) and not isinstance(value, bool):
        value = json.dumps(value)
    if not isinstance(value, str):
        raise RowError(NOT_TEXT, f"{name} is {quote(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(SURROGATE, f"{name} is {quote(value)}") from error
    return value


def read_messages(value: Any, name: str) -> list[Message]:
    """The messages of a column called `name`: any of the spellings above.

    Raises:
        RowError: not messages, or messages with other content than text.
    """
    if isinstance(value, str):
        value = decoded(value)
    if isinstance(value, Mapping):
        value = _turned(value)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise RowError(NOT_TEXT, f"{name} is {quote(value)} and not a list of messages")
    pairs = [_pair(each) for each in value]
    if None not in pairs:
        return [message for pair in pairs if pair for message in pair]
    return [_message(each, name) for each in value]


def is_conversation(value: Any) -> bool:
    """Whether a value is messages, in any spelling, and not text."""
    value = decoded(value) if isinstance(value, str) else value
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Mapping)


def _pair(value: Any) -> list[Message] | None:
    """[question, answer] or {"input": question, "output": answer} as two messages."""
    if isinstance(value, Mapping) and "role" not in value and "from" not in value:
        value = [_first(value, ("input", "user", "human")), _first(value, ("output", "assistant"))]
    if not isinstance(value, list | tuple) or len(value) != 2 or None in value:
        return None
    return [user(read_text(value[0], "history")), assistant(read_text(value[1], "history"))]


def check_media(row: Mapping[str, Any]) -> None:
    """Raise RowError if a row or message comes with what a language model cannot see."""
    for key in MEDIA_KEYS & row.keys():
        if row[key] not in (None, [], "", {}):
            raise RowError(MEDIA, f"{key} is {quote(row[key])}")


def decoded(text: str) -> Any:
    """The list or object that a text spells in JSON (or in Python, as pandas writes one)."""
    if not text.lstrip().startswith(("[", "{")):
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return value if isinstance(value, list | dict) else text
    return text


def read_tools(value: Any) -> list[Any] | None:
    """The tools of a row, or None.

    Raises:
        RowError: something else than a list of descriptions."""
    value = decoded(value) if isinstance(value, str) else value
    if not value:
        return None
    value = [value] if isinstance(value, Mapping) else value
    tools = [decoded(each) if isinstance(each, str) else each for each in value]
    if not all(isinstance(each, Mapping) for each in tools):
        raise RowError(NOT_TEXT, f"tools is {quote(value)} and not a list of descriptions")
    return [without_nulls(each) for each in tools]


def without_nulls(value: Any) -> Any:
    """Keys without a value left out at every depth, as a table invents them for other rows."""
    if isinstance(value, Mapping):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def _turned(value: Mapping[str, Any]) -> Any:
    """One message, or columns of roles and contents, as a list of messages."""
    columns = [each for each in value.values() if isinstance(each, list)]
    keys = [key for key in (*_ROLE_KEYS, *_CONTENT_KEYS) if isinstance(value.get(key), list)]
    if len(keys) < 2 or len({len(each) for each in columns}) != 1:
        return [value]
    return [dict(zip(value, each, strict=True)) for each in zip(*columns, strict=True)]


def _message(value: Any, name: str) -> Message:
    role = _first(value, _ROLE_KEYS) if isinstance(value, Mapping) else None
    if not isinstance(role, str):
        raise RowError(NOT_TEXT, f"{name} has {quote(value)}, which is no message with a role")
    check_media(value)
    extra = {k: without_nulls(v) for k, v in value.items() if k not in _READ and v is not None}
    content, calls = _first(value, _CONTENT_KEYS), value.get("tool_calls")
    if role.lower() == "function_call":
        content, calls = None, content
    calls = calls or value.get("function_call")
    content = _content(content, f"the {role} message of {name}", bool(calls))
    return _with_calls(Message(_role(role), content, extra, _trained(value)), calls, name)


def _role(name: str) -> str:
    lower = name.strip().lower()
    known = (*ROLES.values(), "system", "developer")
    return ROLES.get(lower, lower if lower in known else name)


def _first(value: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((value[key] for key in keys if value.get(key) is not None), None)


def _content(value: Any, name: str, has_calls: bool) -> str:
    if value is None and has_calls:
        return ""
    if isinstance(value, list):
        return "\n".join(_part(each, name) for each in value)
    if isinstance(value, Mapping) and "text" not in value:  # the result of a tool, as an object
        return json.dumps(value, ensure_ascii=False)
    return _part(value, name) if isinstance(value, Mapping) else read_text(value, name)


def _part(value: Any, name: str) -> str:
    if isinstance(value, Mapping):
        if value.get("type", "text") not in ("text", "input_text", "output_text"):
            raise RowError(NOT_TEXT_PART, f"{name} holds {value['type']}: {quote(value)}")
        value = value.get("text")
    return read_text(value, name)


def _trained(value: Mapping[str, Any]) -> bool:
    flag = _first(value, _TRAINED_KEYS)
    if flag not in (None, 0, 1):
        raise RowError(WEIGHT, f"{quote(flag)} in {quote(value)}")
    return flag is None or bool(flag)


def _with_calls(message: Message, calls: Any, name: str) -> Message:
    """With the calls in the form of `tool_calls`, their arguments as objects: a template that
    writes them as JSON would escape text a second time."""
    calls = decoded(calls) if isinstance(calls, str) else calls
    if not calls:
        return message
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not all(isinstance(call, Mapping) for call in calls):
        raise RowError(NOT_TEXT, f"{name} has tool calls {quote(calls)}")
    entries = [_call(call) for call in calls]
    return replace(message, extra=message.extra | {"tool_calls": entries})


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    call = without_nulls(call)
    function = dict(call["function"]) if isinstance(call.get("function"), Mapping) else None
    inner = {key: call[key] for key in ("name", "arguments", "parameters") if key in call}
    function = inner if function is None else function
    if isinstance(function.get("arguments"), str):
        # What the text spells was written by the assistant, null or not.
        function["arguments"] = decoded(function["arguments"])
    outer = {key: each for key, each in call.items() if key not in inner}
    return {"type": "function", **outer, "function": function}
