"""Encoded rows on disk: a sequence of dicts of token ids, read from an Arrow table as needed."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Row = dict[str, Any]


class TokenRows(Sequence[Row]):
    """Rows of a table whose columns `..._ids` and `..._mask` are lists of integers.

    A row is `{"prompt_ids": array("i"), ...}`, an `array` being a sequence of ints in 4 bytes each;
    a mask of which every entry is 1 is empty in the table and absent from the row. `extra` columns
    are plain sequences in memory.
    """

    def __init__(
        self,
        table: pa.Table,
        lines: NDArray[np.int64] | None = None,
        extra: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        self._table, self._extra = table, dict(extra or {})
        self.lines = np.arange(len(table)) if lines is None else lines
        names = [name for name in table.column_names if name.endswith(("_ids", "_mask"))]
        self._columns = {name: _Lists(table.column(name)) for name in names}

    def __len__(self) -> int:
        return len(self.lines)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        line = int(self.lines[index])
        lists = {name: column[line] for name, column in self._columns.items()}
        row: Row = {k: ids for k, ids in lists.items() if ids or k.endswith("_ids")}
        return row | {name: values[index] for name, values in self._extra.items()}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(other) != len(self):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    def with_columns(self, extra: Mapping[str, Sequence[Any]]) -> TokenRows:
        """The same rows with one more value of each name in `extra`."""
        return TokenRows(self._table, self.lines, self._extra | dict(extra))


def with_columns(rows: Sequence[Row], columns: Mapping[str, Sequence[Any]]) -> Sequence[Row]:
    """The rows with one more value of each name in `columns`; those on disk stay there."""
    if isinstance(rows, TokenRows):
        return rows.with_columns(columns)
    values = zip(*columns.values(), strict=True)
    return [
        row | dict(zip(columns, each, strict=True)) for row, each in zip(rows, values, strict=True)
    ]


class _Lists:
    """A column of lists of integers; nothing is copied but the list that is asked for."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks = [
            (np.asarray(chunk.offsets), np.asarray(chunk.values)) for chunk in column.chunks
        ]
        self._starts = [0, *accumulate(map(len, column.chunks))]

    def __getitem__(self, line: int) -> array[int]:
        chunk = int(np.searchsorted(self._starts, line, side="right")) - 1
        offsets, values = self._chunks[chunk]
        start, end = offsets[line - self._starts[chunk] :][:2]
        return array("i", values[start:end].astype("<i4", copy=False).tobytes())


def fingerprint_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """sha256 (hex) over the token ids in order: equal rows, equal digest, on every platform."""
    digest = hashlib.sha256()
    for row in rows:
        _add_row(digest, row)
    return digest.hexdigest()


def digest_of(row: Mapping[str, Any]) -> int:
    """A number that depends on the token ids of a row alone."""
    digest = hashlib.sha256()
    _add_row(digest, row)
    return int.from_bytes(digest.digest()[:8], "little", signed=True)


def _add_row(digest: hashlib._Hash, row: Mapping[str, Any]) -> None:
    for key in sorted(key for key in row if key.endswith(("_ids", "_mask"))):
        # The length separates neighbours; fixed width and byte order fix the platform.
        digest.update(f"{key}:{len(row[key])};".encode())
        ids = array("i", row[key])
        if sys.byteorder == "big":
            ids.byteswap()
        digest.update(ids.tobytes())
