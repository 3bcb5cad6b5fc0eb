"""Tables of the records: cells in words, and the one way in which they are written as Markdown.

The same cells make the tables of `llm.report`'s pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Strong(str):
    """A cell that stands out."""


class Table(NamedTuple):
    """A table below a title."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A pipe table without padding: a record that changes in one cell changes in one line."""
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join(f"| {' | '.join(map(_cell, cells))} |" for cells in lines)


def _cell(text: str) -> str:
    plain = " ".join(text.split()).replace("|", r"\|")  # a | or a new line would end the cell
    return f"**{plain}**" if isinstance(text, Strong) else plain
