"""Where a prompt ends and an answer begins, when both stand in one column or the prompt in two."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from llm.data.errors import RowError, quote
from llm.data.messages import Message

REPEATED = "prompt repeated in the answer, taken once"
GUESSED = "prompt taken to be the words that both answers begin with"
UNCLEAR_PROMPT = "answer behind another prompt"
_LEAST_WORDS = 3
"""An answer may well begin with a word or two of its prompt; more is a copy."""

MARKERS = (
    (r"<\|im_start\|>assistant\n", r"<\|im_start\|>"),
    (r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n", r"<\|start_header_id\|>"),
    (r"<start_of_turn>model\n", r"<start_of_turn>"),
    (r"<\|assistant\|>\n?", r"<\|(user|system|assistant)\|>"),
    (r"\[/INST\]", r"\[INST\]"),
    (r"\n\nAssistant:", r"\n\n(Human|User):"),
    (r"### ?(Assistant|Response):\n?", r"### ?(Human|User|Instruction|System|Input):"),
    (r"(^|\s)(ASSISTANT|Assistant|Bot):", r"\s(USER|User|Human):"),
)
"""(what stands in front of an answer, what stands in front of other turns) in common markups."""


def common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Number of leading elements that two strings or lists share."""
    shortest = min(len(first), len(second))
    if first[:shortest] == second[:shortest]:
        return shortest
    return next(i for i in range(shortest) if first[i] != second[i])


def merged(prompt: list[Message], response: list[Message]) -> tuple[list[Message], list[Message]]:
    """(everything in front of the answer, the answer) of a response that may repeat its prompt.

    The response holds the prompt behind nothing or behind more context; or it begins with the end
    of the prompt; or with an answer. Messages are compared by `Message.said`.

    Raises:
        RowError: none of these.
    """
    asked, said = [each.said for each in prompt], [each.said for each in response]
    count = len(asked)
    for start in range(len(said) - count):
        if said[start : start + count] == asked:
            return response[:start] + prompt, response[start + count :]
    for shared in range(min(count, len(said) - 1), 0, -1):
        if asked[-shared:] == said[:shared]:
            return prompt, response[shared:]
    if response[0].is_reply or response[0].role == "tool":
        return prompt, response
    raise RowError(
        UNCLEAR_PROMPT,
        f"the prompt ends in {quote(prompt[-1].content)}, the answer stands behind "
        f"{quote(response[0].content)}",
    )


def split_shared(
    prompt: list[Message], responses: list[list[Message]]
) -> tuple[list[Message], list[list[Message]]]:
    """The messages that both responses begin with belong to the prompt; one stays with each."""
    chosen, rejected = ([each.said for each in response] for response in responses)
    shared = min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    return [*prompt, *responses[0][:shared]], [response[shared:] for response in responses]


def without_repeat(prompt: str, answers: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """The answers without a copy of the whole prompt at their beginning; whether there was one.

    Outer white space is not compared. A prompt of one or two words that does not end in a colon is
    no copy: answers begin like that.

    Raises:
        RowError: one answer of a pair repeats the prompt, the other does not.
    """
    core = prompt.strip()
    repeats = [_repeats(core, answer) for answer in answers]
    if not any(repeats) or (len(core.split()) < _LEAST_WORDS and not core.endswith(":")):
        return tuple(answers), False
    if not all(repeats):
        raise RowError(UNCLEAR_PROMPT, f"only one answer of the pair repeats {quote(core)}")
    space = prompt[len(prompt.rstrip()) :]
    rests = (answer.lstrip()[len(core) :].removeprefix(space) for answer in answers)
    return tuple(rests), True


def _repeats(core: str, answer: str) -> bool:
    answer = answer.lstrip()
    following = answer[len(core) : len(core) + 1]
    ends = not (following.isalnum() and core[-1:].isalnum())
    return answer.startswith(core) and ends and bool(answer[len(core) :].strip())


def prompt_end(chosen: str, rejected: str) -> tuple[int, tuple[str, ...]]:
    """(where the prompt ends that two texts share, notes about that).

    Up to and including the last mark of an answer (HH's "\\n\\nAssistant:", arXiv 2204.05862, and
    those of chat templates) in what both share, or without one up to its last white space.
    """
    shared = common_prefix(chosen, rejected)
    ends = [match.end() for answer, _ in MARKERS for match in re.finditer(answer, chosen[:shared])]
    if ends:
        return max(ends), ()
    spaces = [match.start() for match in re.finditer(r"\s+", chosen[:shared])]
    return (spaces[-1], (GUESSED,)) if spaces else (0, ())


def document_spans(text: str) -> tuple[tuple[int, int], ...]:
    """What of a text to train on: the answers of a dialogue in a known markup, else all of it."""
    for answer, other in MARKERS:
        starts = [match.end() for match in re.finditer(answer, text)]
        ends = [match.start() for match in re.finditer(f"{other}|{answer}", text)]
        spans = [(i, min((end for end in ends if end >= i), default=len(text))) for i in starts]
        if any(end > start for start, end in spans):
            return tuple((start, end) for start, end in spans if end > start)
    return ((0, len(text)),)
