"""What is wrong with a file or a row, in one line that names the mend and quotes the fault."""

from __future__ import annotations

from typing import Any

from theory.cli import UserError

QUOTED = 80
"""Characters of a value that a message quotes."""


class DataError(UserError):
    """A mistake in the user's data or flags, told in one line."""


class RowError(DataError):
    """One row that cannot be used; `reason` is the key under which encoding counts it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def quote(value: Any) -> str:
    """A value as it stands in a message: on one line, in printable characters, shortened."""
    text = ascii(value) if not _encodable(str(value)) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 3]}..."


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
