"""What became of the rows of a data set, counted by reason, with the mend and one example."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from llm.data import formats, messages, pairs, templates, tokens

LARGE_SHARE = 0.1
"""Of truncated rows, from which on the final table says so."""
OTHER_END = "answer ends in another token than EOS"
NO_END = "answer without an end token"

MENDS = {
    formats.NO_FORMAT: "name the columns",
    formats.NO_ASSISTANT: "name the role that answers 'assistant'",
    formats.EMPTY_PROMPT: "give every row one, or name its column",
    formats.EMPTY_RESPONSE: "remove these rows",
    formats.UNTRAINED: "as its owner wants it",
    formats.UNWANTED: "only rows labelled true are demonstrations; --sft_columns label= keeps all",
    formats.UNCLEAR: "say which column is what: --sft_columns or --dpo_columns NAME=COLUMN,...",
    messages.NOT_TEXT: "write text, or messages with a role and content",
    messages.NOT_TEXT_PART: "a language model reads text: keep the parts of type text",
    messages.WEIGHT: "only 0 and 1 can be obeyed",
    messages.MEDIA: "a language model reads text: remove these rows, or leave the column out",
    messages.SURROGATE: "the text was cut inside a character: write it again",
    pairs.UNCLEAR_PROMPT: "let the answers repeat their prompt to the letter, or not at all",
    templates.NO_TEMPLATE: "give --chat_template NAME or FILE",
    templates.REFUSED_BY_TEMPLATE: "change the messages or give another --chat_template",
    templates.LEFT_OUT: "give a --chat_template that shows it, or take it out of the row",
    templates.NO_ANSWER_SHOWN: "give another --chat_template",
    templates.NO_TURNS_IN_PAIRS: "keep one answer in each response",
    tokens.NO_RESPONSE_LEFT: "raise --max_length or choose --truncation_mode keep_end",
    tokens.PART_LOST: "raise --max_length",
    tokens.EQUAL_RESPONSES: "a pair that prefers nothing teaches nothing",
    tokens.EQUAL_AFTER_TRUNCATION: "raise --max_length",
    templates.TOOLS_TOLD: "tell the model of tools in this way at inference too",
    OTHER_END: "it is made a stop token of the saved model",
    NO_END: "let the chat template write eos_token behind answers; generation stops at white "
    "space that stands in no answer, or runs on",
}
"""What to do about each reason for dropping or noting a row."""


@dataclass(frozen=True)
class DropReport:
    """What became of the rows of one data set: total == kept + sum(dropped.values()).

    `truncated` counts kept rows that lost tokens, `cut` those of them that lost tokens of an
    answer; `notes` counts kept rows worth a look; `turns` counts the answers trained on.
    `examples` quotes one row for each reason. `unused` are the columns that nothing was read from.
    """

    total: int
    kept: int
    truncated: int
    dropped: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    cut: int = 0
    turns: int = 0
    examples: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def line(self, name: str) -> str:
        """One printable line for the data set called `name`."""
        parts = [f"{name}: {self.kept} of {self.total} rows kept"]
        if self.turns > self.kept:
            parts.append(f"{self.turns} answers trained on")
        cut = f" ({self.cut} in an answer)" if self.cut else ""
        parts.append(f"{self.truncated} truncated{cut}")
        parts += [f"{count} dropped ({self._told(why)})" for why, count in self.dropped.items()]
        parts += [f"{count} noted ({self._told(why)})" for why, count in self.notes.items()]
        return f"{', '.join(parts)}; columns not used: {', '.join(self.unused) or 'none'}"

    def reasons(self) -> str:
        """Why rows were dropped."""
        return "; ".join(f"{count} {self._told(why)}" for why, count in self.dropped.items())

    def warnings(self, name: str) -> list[str]:
        """Lines for the final table: what truncation did to the answers, and where it did much."""
        lines = []
        if self.cut:
            lines.append(f"{name}: {self.cut} of {self.kept} rows lost the end of an answer")
        if self.truncated > LARGE_SHARE * self.kept:
            lines.append(f"{name}: {self.truncated} of {self.kept} rows were truncated")
        return [f"{line}: raise --max_length" for line in lines]

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON record."""
        return asdict(self) | {"unused": list(self.unused)}

    def _told(self, reason: str) -> str:
        mend = f": {MENDS[reason]}" if reason in MENDS else ""
        example = f"; {self.examples[reason]}" if reason in self.examples else ""
        return f"{reason}{mend}{example}"


def told(reason: str, detail: str) -> str:
    """A reason with its mend and what it is about, as it stands for one row."""
    return f"{reason} ({detail}): {MENDS[reason]}" if reason in MENDS else f"{reason} ({detail})"
