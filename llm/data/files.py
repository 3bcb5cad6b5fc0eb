"""One file to raw rows, each as JSON text that says what its owner wrote.

No value is interpreted: a date stays text, a number keeps its digits, an empty or "NA" cell of a
CSV file is that text. A file that is not what its name says is refused in a sentence of its own.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llm.data.errors import DataError, one_line, quote

KINDS = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".ndjson")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
DELIMITERS = ",;\t|"
_BATCH = 1000
_LFS = b"version https://git-lfs"
_UNPACKERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"\x28\xb5\x2f\xfd": lambda path: io.BufferedReader(
        pa.CompressedInputStream(str(path), "zstd")
    ),
}


def kind_of(path: Path) -> str | None:
    """The suffix that says how to read a file, without that of a compression; None if unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else None


def read_file(path: Path) -> Iterator[str]:
    """The rows of a file, one JSON object each.

    Raises:
        DataError: the file is of another kind than its name says, or is damaged.
    """
    head = _head(path)
    kind = kind_of(path)
    try:
        if kind == ".parquet":
            yield from _parquet(path)
        elif kind in (".csv", ".tsv"):
            yield from _csv(path, head)
        else:
            yield from _json(path, head)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 ({error.reason}, byte {error.object[error.start]:#x}): convert it"
            f", e.g. iconv -f LATIN1 -t UTF-8 {path.name}"
        ) from error
    except (pa.ArrowInvalid, EOFError, OSError, lzma.LZMAError) as error:
        raise DataError(f"{path} is damaged or cut short: {one_line(error)}") from error


def _head(path: Path) -> bytes:
    """The first bytes of the content; refuses what is no text in UTF-8 at all."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(_LFS):
        raise DataError(f"{path} is a git-LFS pointer and not the data: run git lfs pull")
    if start.startswith(b"PK\x03\x04"):
        raise DataError(f"{path} is a zip archive: unpack it")
    if start.startswith(b"PAR1") != (kind_of(path) == ".parquet") and start:
        what = "is" if start.startswith(b"PAR1") else "is not"
        raise DataError(f"{path} {what} a Parquet file, whatever its name says: rename it")
    if kind_of(path) == ".parquet":
        return start
    try:
        with _open(path) as stream:
            head = stream.read(64)
    except (EOFError, OSError, lzma.LZMAError) as error:
        raise DataError(f"{path} is damaged or cut short: {one_line(error)}") from error
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in head:
        raise DataError(
            f"{path} is UTF-16 text (or binary) and not UTF-8: convert it, e.g. "
            f"iconv -f UTF-16 -t UTF-8 {path.name}"
        )
    return head


def _open(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(8)
    for magic, unpack in _UNPACKERS.items():
        if start.startswith(magic):
            return unpack(path)
    return path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that are not blank."""
    with _open(path) as stream:
        for number, line in enumerate(stream, 1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                yield number, text


def _json(path: Path, head: bytes) -> Iterator[str]:
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    whole = None
    if first == b"[" or (first == b"{" and kind_of(path) == ".json"):
        whole = _whole(path)
    if isinstance(whole, dict):
        raise DataError(f"{path} is one object and not rows: {_mend(whole)}")
    if whole is None:
        yield from _json_lines(path)
        return
    for number, row in enumerate(whole):
        if not isinstance(row, dict):
            raise DataError(f"{path}: entry {number} is {quote(row)} and not an object")
        yield json.dumps(row)


def _whole(path: Path) -> Any:
    """The file as one JSON value; None if it holds several (one a line, as in JSON Lines)."""
    with _open(path) as stream:
        text = stream.read().decode("utf-8-sig")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        raise DataError(f"{path} is not JSON: {error} (is it cut short?)") from error


def _mend(value: Mapping[str, Any]) -> str:
    keys = ", ".join(map(str, list(value)[:5]))
    for key, entry in value.items():
        if isinstance(entry, list) and entry and isinstance(entry[0], dict):
            return f"the rows seem to stand under {key!r}: save that list alone (jq '.{key}')"
    kind = "columns" if all(isinstance(each, list) for each in value.values()) else "keys"
    return (
        f"its {kind} are {keys}; save one object a row, e.g. with pandas' "
        "to_json(orient='records', lines=True)"
    )


def _json_lines(path: Path) -> Iterator[str]:
    for number, text in _lines(path):
        try:
            row = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(
                f"{path} line {number} is not JSON ({getattr(error, 'msg', error)}): {quote(text)}"
                "; mend or remove it (is the file cut short?)"
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{path} line {number} is {quote(row)} and not an object: one a row")
        yield text


def _csv(path: Path, head: bytes) -> Iterator[str]:
    if not head.strip():
        return
    csv.field_size_limit(2**31 - 1)
    with _open(path) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
        reader = csv.DictReader(text, delimiter=_delimiter(path), strict=True)
        try:
            for row in reader:
                if None in row:
                    raise csv.Error(f"more cells than the header has names: {quote(row[None])}")
                # A line with fewer cells than the header leaves the others without a value.
                yield json.dumps({k: v for k, v in row.items() if v is not None})
        except csv.Error as error:
            raise DataError(
                f"{path} line {reader.line_num}: {error}; put quotes around cells that hold the "
                "delimiter, a quote (doubled) or a line break"
            ) from error


def _delimiter(path: Path) -> str:
    """The one that cuts the header into the most names; a comma if none does."""
    header = next(_lines(path))[1]
    return max(DELIMITERS, key=lambda each: len(next(csv.reader([header], delimiter=each))))


def _parquet(path: Path) -> Iterator[str]:
    for batch in pq.ParquetFile(path).iter_batches(_BATCH):
        yield from rows_as_json(batch)


def rows_as_json(table: Any) -> Iterator[str]:
    """Rows of an Arrow table or batch. Keys without a value are left out at every depth: a table
    has every key in every row, whether or not its owner wrote it."""
    for row in table.to_pylist():
        yield json.dumps(_without_nulls(row), default=_plain)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _plain(value: Any) -> str:
    """Bytes as the text that they are; what is no text cannot be encoded and its row is dropped."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value[:64].decode("utf-8", "surrogateescape")
