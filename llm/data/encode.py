"""Token ids of both objectives: read, render, tokenise, truncate, count what was cut and dropped.

    rows = load_rows("pairs.jsonl")                                  # raw rows, see `sources`
    encoded = encode_preference(rows, tokenizer, max_length=512, name="dpo_data")
    print(encoded.report.line(encoded.name))                         # what was cut and dropped
    batch = collate_preference(encoded.rows[:8], pad_token_id=0)     # tensors, `llm.loss.collate`

Every token that is trained on was written by the assistant of its row (or is the template's mark of
its turn); every row is kept or dropped for a counted reason.
"""

from __future__ import annotations

import datetime
import gc
import hashlib
import os
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeAlias

import datasets
import numpy as np
import pyarrow as pa

from llm.data.errors import DataError, RowError, quote
from llm.data.formats import PREFERENCE_ROWS, SFT_ROWS, Options, RowKind, read_row
from llm.data.report import NO_END, OTHER_END, DropReport, told
from llm.data.rows import TokenRows
from llm.data.sources import COLUMN, NUMBER, raw_rows
from llm.data.templates import NO_TURNS_IN_PAIRS, Template, shows_date
from llm.data.tokens import TRUNCATION_MODES, Item, Pieces, Tokens
from theory.records import digest, digest_of_code

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows: TypeAlias = datasets.Dataset | Sequence[Mapping[str, Any]]
_BATCH = 500
_IN_ONE_PROCESS = 20_000
"""Rows up to which starting further processes takes longer than it saves."""
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


@dataclass(frozen=True)
class Encoded:
    """Token ids of one data set: `prompt_ids` and `completion_ids` (SFT) or `chosen_ids` and
    `rejected_ids` (preference) in every row, never empty, never beyond the maximum length.

    A response that holds turns of other speakers has a mask (`completion_mask`, ...) that is 1 on
    the tokens to train on. `ends` are the tokens that answers end in, other than EOS. `table` tells
    of every raw row what became of it; without one the rows stand alone.
    """

    rows: Sequence[dict[str, Any]]
    name: str
    report: DropReport
    ends: tuple[int, ...] = ()
    table: pa.Table | None = None

    def digests(self) -> np.ndarray[Any, Any]:
        """A number for each row that depends on its token ids alone."""
        if isinstance(self.rows, TokenRows) and self.table is not None:
            return self.table.column("digest").to_numpy()[self.rows.lines]
        return np.array([_digest_of(row) for row in self.rows], np.int64)


def encode_sft(rows: Rows, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Encoded:
    """Tokenise and truncate demonstrations of any format of `formats.read_row`.

    Truncation, in tokens: "keep_end" cuts the start of the prompt (behind BOS) to make room for
    the response and cuts the end of a response only if that is not enough; a prompt token always
    stays. "keep_start" cuts the end of the whole, as TRL does by default.

    Args:
        rows: what `sources.load_rows` gives, or a list of dicts.
        tokenizer: of transformers; it needs an EOS token.
        options: of `encode`.

    Raises:
        DataError: a wrong option; no chat template for messages; no row left.
    """
    return check_rows(encode(rows, tokenizer, SFT_ROWS, **options))


def encode_preference(rows: Rows, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Encoded:
    """Tokenise and truncate pairs of any format of `formats.read_row`.

    As `encode_sft`. Both responses continue the same `prompt_ids` (their common part, where the
    tokens of the boundary differ); "keep_end" makes room for the longer one. Pairs whose responses
    have the same tokens in the end are dropped: their margin and gradient are zero.
    """
    return check_rows(encode(rows, tokenizer, PREFERENCE_ROWS, **options))


def encode(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    kind: RowKind,
    *,
    max_length: int,
    truncation_mode: str = "keep_end",
    name: str,
    columns: Mapping[str, str] | None = None,
    train_on: str = "all",
    date: datetime.date | None = None,
    workers: int | None = None,
) -> Encoded:
    """Rows of either kind; what cannot be used is counted, even if nothing is left.

    Args:
        max_length: tokens of prompt and response together, at least 2 (`llm.data.checks`).
        truncation_mode: "keep_end" or "keep_start".
        name: of the data set, for messages.
        columns: meaning (`formats.MEANINGS`) to column, where the names do not say it.
        train_on: the answers of a conversation to train on, "all" or "last".
        date: what a chat template takes for today.
        workers: processes; default one for each core where there are many rows.
    """
    if truncation_mode not in TRUNCATION_MODES:
        raise DataError(
            f"truncation_mode is {truncation_mode!r}; it must be {' or '.join(TRUNCATION_MODES)}"
        )
    if max_length < 2:
        raise DataError(f"max_length is {max_length}; prompt and response need at least 2 tokens")
    if tokenizer.eos_token_id is None:
        raise DataError(f"{name}: the tokenizer has no eos_token, so responses would have no end")
    if len(rows) == 0:
        raise DataError(f"{name}: the data set has no rows")
    options = Options(
        dict(columns or {}), train_on, bool(tokenizer.chat_template), str(tokenizer.eos_token)
    )
    template = Template(tokenizer, date or datetime.date.today())
    tokens = Tokens(tokenizer, max_length, truncation_mode)
    encoder = _Encoder(kind, options, template, tokens)
    if not isinstance(rows, datasets.Dataset):
        table = pa.Table.from_pydict(encoder.encode(rows, *[range(len(rows))] * 2), encoder.schema)
        return _encoded(table, len(rows), name)
    with _quiet(len(rows) < _IN_ONE_PROCESS):
        mapped = rows.map(
            encoder,
            batched=True,
            batch_size=_BATCH,
            with_indices=True,
            num_proc=_processes(len(rows), workers),
            remove_columns=[COLUMN, NUMBER],
            features=datasets.Features.from_arrow_schema(encoder.schema),
            new_fingerprint=_fingerprint(rows, encoder),
            desc=f"tokenise {name}",
        )
    return _encoded(mapped.data.table, len(rows), name)


def check_rows(encoded: Encoded) -> Encoded:
    """The same, if a row is left.

    Raises:
        DataError: none is, with the reasons.
    """
    if not len(encoded.rows):
        report = encoded.report
        raise DataError(
            f"{encoded.name}: none of {report.total} rows can be used: {report.reasons()}"
        )
    return encoded


def _processes(rows: int, workers: int | None) -> int | None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    chosen = workers or (cores or 1 if rows >= _IN_ONE_PROCESS else 1)
    return min(chosen, rows) if chosen > 1 else None


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


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """No bars for what is done at once."""
    quiet = quiet and datasets.is_progress_bar_enabled()
    if quiet:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if quiet:
            datasets.enable_progress_bars()


def _fingerprint(rows: datasets.Dataset, encoder: _Encoder) -> str:
    """Of everything that the encoded rows depend on: a cached table of another kind is not used."""
    tokenizer, tokens = encoder.tokens.tokenizer, encoder.tokens
    if tokenizer.is_fast:
        described = tokenizer.backend_tokenizer.to_str()
    else:
        described = str(sorted(tokenizer.get_vocab().items()))
    date = str(encoder.template.date) if shows_date(tokenizer) else None
    settings = [encoder.kind.label, repr(encoder.options), tokens.max_length, tokens.cut.__name__]
    code = digest_of_code("llm.data")
    parts = [described, tokenizer.chat_template, tokenizer.special_tokens_map, date, settings, code]
    return digest([rows._fingerprint, *map(str, parts)])[:32]


@dataclass
class _Encoder:
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
                "digest": _digest_of(lists),
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
            return -1, (NO_END,)
        others = [end for end in ends if end not in (None, self.tokens.tokenizer.eos_token_id)]
        return int(str(others[0])), (OTHER_END,)

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


# -------------------------------------------------------------------------------- what came of it


def _encoded(table: pa.Table, total: int, name: str) -> Encoded:
    numbers = {key: table.column(key).to_numpy() for key in ("row", "turns", "end")}
    kept = table.column("reason").is_null().to_numpy()
    rows_kept = np.unique(numbers["row"][kept])
    lost = ~np.isin(numbers["row"], rows_kept)
    dropped, examples = _reasons(table.filter(pa.array(lost)))
    ends = np.unique(numbers["end"][numbers["end"] >= 0])
    counts = {key: _rows_with(table, numbers["row"], key) for key in ("truncated", "cut")}
    report = DropReport(
        total,
        len(rows_kept),
        dropped=dropped,
        notes=_lines_of(table, "notes"),
        turns=int(numbers["turns"].sum()),
        examples=examples,
        unused=tuple(_lines_of(table, "unused")),
        **counts,
    )
    rows = TokenRows(table, np.flatnonzero(kept))
    return Encoded(rows, name, report, tuple(map(int, ends)), table)


def _rows_with(table: pa.Table, numbers: Any, key: str) -> int:
    return len(np.unique(numbers[table.column(key).to_numpy()]))


def _reasons(lost: pa.Table) -> tuple[dict[str, int], dict[str, str]]:
    """How many rows were lost for each reason, and the first of each."""
    reasons, details = lost.column("reason").to_pylist(), lost.column("detail").to_pylist()
    seen: set[int] = set()
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    rows, numbers = (lost.column(key).to_pylist() for key in ("row", "number"))
    for row, number, reason, detail in zip(rows, numbers, reasons, details, strict=True):
        if row not in seen:
            seen.add(row)
            counts[reason] += 1
            examples.setdefault(reason, f"e.g. row {number}: {detail}")
    return dict(counts), examples


def _lines_of(table: pa.Table, key: str) -> dict[str, int]:
    """How many lines of the table have each line of a text."""
    counts: Counter[str] = Counter()
    for entry in table.column(key).value_counts().to_pylist():
        for line in filter(None, (entry["values"] or "").split("\n")):
            counts[line] += entry["counts"]
    return dict(sorted(counts.items(), key=lambda each: (-each[1], each[0])))


@dataclass(frozen=True)
class Fate:
    """What became of one raw row: why it was dropped, or where in `Encoded.rows` it stands."""

    number: int
    dropped: str | None
    unused: tuple[str, ...]
    places: tuple[int, ...]


def what_became(encoded: Encoded) -> Iterator[Fate]:
    """The fate of every raw row, in order."""
    if encoded.table is None or not isinstance(encoded.rows, TokenRows):
        return
    places = {int(line): place for place, line in enumerate(encoded.rows.lines)}
    entries = enumerate(
        _entries(encoded.table.select(["row", "number", "reason", "detail", "unused"]))
    )
    for _, group in groupby(entries, key=lambda each: each[1]["row"]):
        lines = list(group)
        first = lines[0][1]
        kept = tuple(places[line] for line, _ in lines if line in places)
        why = None if kept else told(first["reason"], first["detail"])
        unused = tuple(filter(None, first["unused"].split("\n")))
        yield Fate(first["number"], why, unused, kept)


def _entries(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches():
        yield from batch.to_pylist()


# ------------------------------------------------------------------------------------- fingerprint


def fingerprint(encoded: Encoded) -> str:
    """sha256 (hex) over the token ids in order: equal data, equal digest, on every platform."""
    return fingerprint_rows(encoded.rows)


def fingerprint_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """`fingerprint` of encoded rows."""
    digest = hashlib.sha256()
    for row in rows:
        _add_row(digest, row)
    return digest.hexdigest()


def _digest_of(row: Mapping[str, Any]) -> int:
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
