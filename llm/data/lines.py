"""Batches of raw rows to lines of the table of encoded rows, in any process."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from llm.data.errors import RowError, quote
from llm.data.formats import Options, RowKind, read_row
from llm.data.report import NO_END, OTHER_END
from llm.data.rows import digest_of
from llm.data.sources import NUMBER, raw_rows
from llm.data.templates import NO_TURNS_IN_PAIRS, Template
from llm.data.tokens import Item, Pieces, Tokens

_SCHEMA = {
    **{
        "row": pa.int64(),
        "number": pa.int64(),
        "digest": pa.int64(),
        "turns": pa.int32(),
        "end": pa.int64(),
    },
    **{"reason": pa.string(), "detail": pa.string(), "notes": pa.string(), "unused": pa.string()},
    **{"truncated": pa.bool_(), "cut": pa.bool_(), "prompt_ids": pa.list_(pa.int32())},
}
"""Columns of encoded rows beside those of the responses; lists of texts are lines of one text."""


@dataclass
class LineEncoder:
    """Batches of raw rows to lines of the encoded table: one for each row, several for a
    conversation in several sequences."""

    kind: RowKind
    options: Options
    template: Template
    tokens: Tokens

    def __post_init__(self) -> None:
        self.schema = pa.schema(_SCHEMA)
        for name in self.kind.responses:
            self.schema = self.schema.append(pa.field(f"{name}_ids", pa.list_(pa.int32())))
            self.schema = self.schema.append(pa.field(f"{name}_mask", pa.list_(pa.int8())))
        self._blank: dict[int, bool] = {}
        self._specials: set[int] = {*self.tokens.tokenizer.all_special_ids}
        self._specials |= set(getattr(self.tokens.tokenizer, "added_tokens_decoder", {}))

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> pa.Table:
        with _no_garbage():
            columns = self.encode(raw_rows(batch), indices, batch[NUMBER])
            return pa.Table.from_pydict(columns, self.schema)

    def encode(
        self, rows: Sequence[Mapping[str, Any]], indices: Sequence[int], numbers: Sequence[int]
    ) -> dict[str, Any]:
        """Columns of the lines of these rows, in their order; `numbers` count in the source."""
        read = [self._read(*each) for each in zip(indices, numbers, rows, strict=True)]
        items = [item for each in read for item in each.items]
        pieces = iter(self.tokens.encode(items))
        lines = [self._line(each, item, next(pieces)) for each in read for item in each.items] + [
            self._dropped(each, each.error) for each in read if each.error
        ]
        lines.sort(key=lambda line: line["row"])
        return {name: [line[name] for line in lines] for name in self.schema.names}

    def _read(self, index: int, number: int, row: Mapping[str, Any]) -> _Read:
        read = _Read(index, number)
        try:
            reading = read_row(row, self.kind, self.options)
            read.unused = reading.unused
            if reading.chat is None:
                read.items = [Item(reading.texts, False, reading.is_document, reading.notes)]
            else:
                texts = self.template.texts(reading.chat)
                notes = (*reading.notes, *self.template.notes(reading.chat, texts[0]))
                if len(texts) > 1 and any(len(each) > 1 for each in texts):
                    raise RowError(NO_TURNS_IN_PAIRS, quote(texts[0][-1].text))
                read.items = [Item(each, True, notes=notes) for each in zip(*texts, strict=True)]
        except RowError as error:
            read.error = error
            read.unused = read.unused or ()
        return read

    def _line(self, read: _Read, item: Item, pieces: Pieces | RowError) -> dict[str, Any]:
        if isinstance(pieces, RowError):
            return self._dropped(read, pieces)
        end, notes = self._end(item, pieces)
        lists: dict[str, Any] = {"prompt_ids": pieces.prompt}
        for name, ids, mask in zip(
            self.kind.responses, pieces.responses, pieces.masks, strict=True
        ):
            lists |= {f"{name}_ids": ids} | ({f"{name}_mask": mask} if mask else {})
        empty: dict[str, Any] = {f"{name}_mask": [] for name in self.kind.responses}
        return (
            empty
            | lists
            | {
                "row": read.index,
                "number": read.number,
                "digest": digest_of(lists),
                "turns": len(item.texts[0].spans),
                "end": end,
                "reason": None,
                "detail": None,
                "notes": "\n".join((*item.notes, *pieces.notes, *notes)),
                "unused": "\n".join(read.unused),
                "truncated": pieces.is_truncated,
                "cut": pieces.is_cut,
            }
        )

    def _dropped(self, read: _Read, error: RowError) -> dict[str, Any]:
        line: dict[str, Any] = {name: [] for name in self.schema.names if name.endswith("_ids")}
        line |= {name: [] for name in self.schema.names if name.endswith("_mask")}
        return line | {
            **{
                "row": read.index,
                "number": read.number,
                "digest": 0,
                "turns": 0,
                "end": -1,
                "notes": "",
            },
            **{"truncated": False, "cut": False, "unused": "\n".join(read.unused)},
            **{"reason": error.reason, "detail": error.detail},
        }

    def _end(self, item: Item, pieces: Pieces) -> tuple[int, tuple[str, ...]]:
        """(the token other than EOS that the answers of a chat end in, or -1; notes)."""
        if not item.is_chat or pieces.is_cut:
            return -1, ()
        ends = {self._last_mark(ids) for ids in pieces.responses}
        if ends == {self.tokens.tokenizer.eos_token_id}:
            return -1, ()
        if None in ends:
            return self._white_end(pieces), (NO_END,)
        others = [end for end in ends if end not in (None, self.tokens.tokenizer.eos_token_id)]
        return int(str(others[0])), (OTHER_END,)

    def _white_end(self, pieces: Pieces) -> int:
        """`white_end(token)` if all answers end in the same white space that stands nowhere in
        them, so that generation may stop there; else NO_WHITE_END."""
        tokens = {ids[-1] for ids in pieces.responses}
        token = min(tokens)
        if len(tokens) > 1 or self.tokens.tokenizer.decode([token]).strip():
            return NO_WHITE_END
        for ids, mask in zip(pieces.responses, pieces.masks, strict=True):
            goes_on = (
                ids[:-1]
                if mask is None
                else [
                    one for one, now, then in zip(ids, mask, mask[1:], strict=False) if now and then
                ]
            )
            if token in goes_on:
                return NO_WHITE_END
        return white_end(token)

    def _last_mark(self, ids: Sequence[int]) -> int | None:
        """The special token at the end, behind which there is white space at most."""
        for token in reversed(ids):
            if token in self._specials:
                return token
            if token not in self._blank:
                self._blank[token] = not self.tokens.tokenizer.decode([token]).strip()
            if not self._blank[token]:
                return None
        return None


@dataclass
class _Read:
    """One raw row: the items that it becomes, or why it becomes none."""

    index: int
    number: int
    items: list[Item] = field(default_factory=list)
    error: RowError | None = None
    unused: tuple[str, ...] = ()


NO_WHITE_END = -2


def white_end(token: int) -> int:
    """How the column `end` tells of white space that ends answers, apart from marks; its own
    inverse."""
    return NO_WHITE_END - 1 - token


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Rows leave no cycles, and looking for some among many objects takes long."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
