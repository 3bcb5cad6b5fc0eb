"""Chat templates: conversations as texts in which the assistant's own turns are known.

A template may render the same messages differently once an answer follows. So an answer is taken
from behind the prompt that the model is given at inference (the messages before it, rendered with
the generation prompt), and a conversation becomes as few texts as its template allows: an answer
joins the text before it where its prompt continues that text.

What a template does with a kind of conversation (roles, keys, tools) is tried out once on marks in
place of its texts: every mark must be shown, and no mark of another speaker may stand in an answer.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from llm.data.errors import RowError, one_line, quote
from llm.data.formats import Chat
from llm.data.messages import Message, Rendered
from theory.records import write_text

NO_TEMPLATE = "messages without a chat template"
REFUSED_BY_TEMPLATE = "refused by the chat template"
LEFT_OUT = "left out by the chat template"
NO_ANSWER_SHOWN = "the chat template does not set the answer apart"
CUT_BY_TEMPLATE = "answer shown in part by the chat template"
NO_REASONING = "reasoning not shown by the chat template, and not trained on"
NO_TURNS_IN_PAIRS = "the chat template changes turns of a pair"
TOOLS_TOLD = "tools told in the system message, as the chat template has no place for them"
SEVERAL_TEXTS = "conversation in several sequences, as the chat template changes earlier turns"
_REASONING = ("reasoning_content", "thinking", "reasoning")
_MARK = "Zq{}qZ"
_ASKS_DATE = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


@dataclass
class Template:
    """The chat template of a tokenizer on a fixed date."""

    tokenizer: Any
    date: datetime.date = field(default_factory=datetime.date.today)
    _tried: dict[Any, RowError | None] = field(default_factory=dict)
    _without_tools: dict[Any, bool] = field(default_factory=dict)
    _sources: dict[bool, str] = field(default_factory=dict)

    def texts(self, chat: Chat) -> tuple[tuple[Rendered, ...], ...]:
        """The texts of each response of a chat: one, or several where the template asks for it.

        Raises:
            RowError: the template refuses the messages, leaves something of them out, or does not
                show which part is the answer.
        """
        prompt, tools = chat.prompt, chat.tools
        if tools and self._ignores_tools(prompt, tools):
            prompt, tools = _with_tools(prompt, tools), None
        return tuple(
            tuple(self._conversation([*prompt, *response], len(prompt), tools))
            for response in chat.responses
        )

    def notes(self, chat: Chat, texts: Sequence[Rendered]) -> tuple[str, ...]:
        """What deserves a look in the texts of a chat's first response."""
        shown = "\n".join(text.text for text in texts)
        replies = [each for each in chat.responses[0] if each.is_reply and each.trained]
        cut = any(each.content.strip() not in shown for each in replies)
        thoughts = [each.extra[key] for each in replies for key in _REASONING if key in each.extra]
        silent = any(isinstance(each, str) and each.strip() not in shown for each in thoughts)
        told = bool(chat.tools) and self._ignores_tools(chat.prompt, chat.tools)
        return (
            (TOOLS_TOLD,) * told
            + (CUT_BY_TEMPLATE,) * cut
            + (NO_REASONING,) * silent
            + (SEVERAL_TEXTS,) * (len(texts) > 1)
        )

    def _conversation(self, messages: list[Message], first: int, tools: Any) -> list[Rendered]:
        texts: list[Rendered] = []
        for i, message in enumerate(messages):
            if i < first or not (message.is_reply and message.trained and not message.is_blank):
                continue
            self._try_out(messages[: i + 1], tools)
            prompt, answer = self._turn(messages[: i + 1], tools)
            self._check_shown(prompt, messages[:i], tools)
            span = (len(prompt), len(prompt) + len(answer))
            before: tuple[tuple[int, int], ...] = ()
            if texts and prompt.startswith(texts[-1].text):
                before = texts.pop().spans
            texts.append(Rendered(prompt + answer, (*before, span)))
        return texts

    # ------------------------------------------------------------------------------- one answer

    def _turn(self, messages: list[Message], tools: Any) -> tuple[str, str]:
        """(prompt as at inference, text of the last message), of which the second follows."""
        *before, reply = messages
        prompt = self.render(before, tools, add_generation_prompt=True)
        whole = self.render(messages, tools)
        answer = whole[len(prompt) :] if whole.startswith(prompt) else None
        if answer is None:
            answer = self._answer_by_mark(before, reply, tools, prompt, whole)
        if answer is None:
            answer = self._answer_by_tags(messages, tools)
        if not answer or not answer.strip():
            raise _no_answer(reply)
        return prompt, answer

    def _answer_by_mark(
        self, before: list[Message], reply: Message, tools: Any, prompt: str, whole: str
    ) -> str | None:
        """The answer in a rendering that does not continue the prompt: from where its text begins.

        A mark in place of the text shows what the template writes around it."""
        mark = _MARK.format("answer")
        marked = self.render([*before, replace(reply, content=mark)], tools)
        front, found, back = marked.partition(mark)
        fits = found and mark not in back and whole.startswith(front) and whole.endswith(back)
        content = whole[len(front) : len(whole) - len(back)]
        if not fits or content.strip() != reply.content.strip() or not content.strip():
            return None
        own = [front.rfind(each) for each in reply.extra.values() if isinstance(each, str) and each]
        start = min((place for place in own if place >= 0), default=len(front))
        if start == len(front) and before:
            start -= len(_lead(before[-1].content.strip(), prompt, front))
        return whole[start:]

    def _answer_by_tags(self, messages: list[Message], tools: Any) -> str | None:
        """The last part that the template itself marks as generated ({% generation %})."""
        if not re.search(r"{%-?\s*generation\s*-?%}", self._source(tools)):
            return None
        whole, spans = self._jinja(messages, tools, return_assistant_tokens_mask=True)
        return whole[spans[-1][0] : spans[-1][1]] if spans else None

    # ------------------------------------------------------------------ what the template shows

    def _check_shown(self, prompt: str, before: list[Message], tools: Any) -> None:
        """Every text in front of the answer is in its prompt, or the template changes it."""
        for i, message in enumerate(before):
            if message.content.strip() in prompt:
                continue
            mark = _MARK.format(i)
            marked = [*before[:i], replace(message, content=mark), *before[i + 1 :]]
            if mark not in self.render(marked, tools, add_generation_prompt=True):
                raise _left_out(message)

    def _ignores_tools(self, messages: list[Message], tools: Any) -> bool:
        shape = tuple(map(_shape, messages))
        if shape not in self._without_tools:
            self._without_tools[shape] = self.render(
                messages, tools, add_generation_prompt=True
            ) == self.render(messages, None, add_generation_prompt=True)
        return self._without_tools[shape]

    def _try_out(self, messages: list[Message], tools: Any) -> None:
        shape = (tuple(map(_shape, messages)), bool(tools))
        if shape not in self._tried:
            try:
                self._tried[shape] = self._fault(messages, tools)
            except RowError as error:
                # Refused with marks for texts; the texts themselves are yet to be seen.
                unknown = error.reason == REFUSED_BY_TEMPLATE
                self._tried[shape] = None if unknown else _no_answer(messages[-1])
        fault = self._tried[shape]
        if fault is not None:
            raise fault

    def _fault(self, messages: list[Message], tools: Any) -> RowError | None:
        """What the template does wrong with messages of this shape."""
        marked = [
            replace(each, content=_MARK.format(i)) if each.content.strip() else each
            for i, each in enumerate(messages)
        ]
        for i, message in enumerate(marked):
            if message.extra.get("tool_calls") and not self._shows_calls(marked, i, tools):
                return RowError(LEFT_OUT, f"the tool call {quote(message.extra['tool_calls'])}")
        prompt, answer = self._turn(marked, tools)
        for i, message in enumerate(marked[:-1]):
            if message.content.strip() and message.content in answer:
                return RowError(NO_ANSWER_SHOWN, f"the {message.role} message stands behind it")
            if message.content.strip() not in prompt:
                return _left_out(messages[i])
        return None if marked[-1].content.strip() in answer else _left_out(messages[-1])

    def _shows_calls(self, messages: list[Message], i: int, tools: Any) -> bool:
        mark = _MARK.format("call")
        call = {"type": "function", "function": {"name": mark, "arguments": {mark: mark}}}
        other = replace(messages[i], extra=messages[i].extra | {"tool_calls": [call]})
        return mark in self.render([*messages[:i], other], tools)

    # ---------------------------------------------------------------------------------- rendering

    def render(
        self, messages: Sequence[Message], tools: Any, *, add_generation_prompt: bool = False
    ) -> str:
        """The text of messages.

        Raises:
            RowError: the template raises anything at all.
        """
        if not messages:
            return ""
        return str(self._jinja(messages, tools, add_generation_prompt=add_generation_prompt)[0])

    def _jinja(self, messages: Sequence[Message], tools: Any, **options: Any) -> tuple[str, Any]:
        try:
            return self._render(messages, tools, options)
        except RowError:
            raise
        except Exception as error:
            as_text = [_with_text_arguments(each) for each in messages]
            if as_text == list(messages):
                raise RowError(REFUSED_BY_TEMPLATE, one_line(error)) from error
        try:  # some templates write arguments as they come and want them as JSON text
            return self._render(as_text, tools, options)
        except Exception as error:
            raise RowError(REFUSED_BY_TEMPLATE, one_line(error)) from error

    def _render(
        self, messages: Sequence[Message], tools: Any, options: Mapping[str, Any]
    ) -> tuple[str, Any]:
        texts, spans = _render_jinja(
            conversations=[[each.plain() for each in messages]],
            tools=tools,
            chat_template=self._source(tools),
            **self.tokenizer.special_tokens_map,
            **options,
        )
        return texts[0], spans[0] if spans else []

    def _source(self, tools: Any) -> str:
        """The template as text, with the date in place of the calls that ask for it."""
        if bool(tools) not in self._sources:
            if not self.tokenizer.chat_template:
                raise RowError(NO_TEMPLATE, "the tokenizer of the model has none")
            source = str(self.tokenizer.get_chat_template(None, tools))
            self._sources[bool(tools)] = _ASKS_DATE.sub(
                lambda call: repr(self.date.strftime(call[2])), source
            )
        return self._sources[bool(tools)]


_render_jinja: Any = render_jinja_template


def shows_date(tokenizer: Any) -> bool:
    """Whether the chat template of a tokenizer depends on the day."""
    return "strftime_now" in str(tokenizer.chat_template)


def fixed_date(
    tokenizer: Any, given: str | None, file: Path, *, keep: bool, say: Callable[[str], None]
) -> datetime.date:
    """What a chat template takes for today: `given`, or the day on which the run in the folder of
    `file` began, or today, which `keep` writes there for the run to be resumed."""
    if given is not None:
        return datetime.date.fromisoformat(given)
    today = datetime.date.today()
    if not shows_date(tokenizer):
        return today
    if file.is_file():
        today = datetime.date.fromisoformat(file.read_text("utf-8").strip())
    elif keep:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, f"{today}\n")
    say(f"the chat template shows a date: in this run it is {today} (--template_date)")
    return today


def _no_answer(reply: Message) -> RowError:
    return RowError(NO_ANSWER_SHOWN, f"the answer is {quote(reply.content)}")


def _with_tools(messages: list[Message], tools: Any) -> list[Message]:
    """With the descriptions of the tools in the system message."""
    own = messages[0].content if messages[0].role == "system" else ""
    lines = [
        "You can call these functions:",
        *(json.dumps(each, ensure_ascii=False) for each in tools),
    ]
    system = "\n".join([f"{own}\n"] * bool(own.strip()) + lines)
    return [Message("system", system), *messages[messages[0].role == "system" :]]


def _left_out(message: Message) -> RowError:
    what = f"the {message.role} message {quote(message.content)}"
    return RowError(LEFT_OUT, f"{what}; rename the role or give another --chat_template")


def _shape(message: Message) -> tuple[Any, ...]:
    extra = frozenset(message.extra)
    return message.role, extra, bool(message.content.strip()), message.trained


def _lead(last: str, prompt: str, front: str) -> str:
    """What the template writes between the end of its prompt and the answer, such as a space."""
    if not last or last not in front or last not in prompt:
        return ""
    expected, written = prompt.rpartition(last)[2], front.rpartition(last)[2]
    return written[len(expected) :] if written.startswith(expected) else ""


def _with_text_arguments(message: Message) -> Message:
    calls = message.extra.get("tool_calls")
    if not calls:
        return message
    return replace(
        message, extra=message.extra | {"tool_calls": [_as_text(each) for each in calls]}
    )


def _as_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if not isinstance(function.get("arguments", ""), str):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": function}
