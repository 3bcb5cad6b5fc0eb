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
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeAlias

import datasets
import numpy as np
import pyarrow as pa

from llm.data.errors import DataError
from llm.data.formats import PREFERENCE_ROWS, SFT_ROWS, Options, RowKind
from llm.data.lines import NO_WHITE_END, LineEncoder, white_end
from llm.data.report import DropReport, told
from llm.data.rows import TokenRows, digest_of, fingerprint_rows
from llm.data.sources import COLUMN, NUMBER
from llm.data.templates import Template, shows_date
from llm.data.tokens import PART_LOST, TRUNCATION_MODES, Tokens
from theory.cli import usable_cores
from theory.records import digest, digest_of_code

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows: TypeAlias = datasets.Dataset | Sequence[Mapping[str, Any]]
_BATCH = 500
_IN_ONE_PROCESS = 20_000
"""Rows up to which starting further processes takes longer than it saves."""


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
        return np.array([digest_of(row) for row in self.rows], np.int64)


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
    encoder = LineEncoder(kind, options, template, tokens)
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
    chosen = workers or (usable_cores() if rows >= _IN_ONE_PROCESS else 1)
    return min(chosen, rows) if chosen > 1 else None


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


def _fingerprint(rows: datasets.Dataset, encoder: LineEncoder) -> str:
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


# -------------------------------------------------------------------------------- what came of it


def _encoded(table: pa.Table, total: int, name: str) -> Encoded:
    numbers = {key: table.column(key).to_numpy() for key in ("row", "turns", "end")}
    kept = table.column("reason").is_null().to_numpy()
    rows_kept = np.unique(numbers["row"][kept])
    lost = ~np.isin(numbers["row"], rows_kept)
    dropped, examples = _reasons(table.filter(pa.array(lost)))
    ends = np.unique(numbers["end"][numbers["end"] >= 0])
    white = np.unique(numbers["end"][numbers["end"] <= NO_WHITE_END])
    if len(white) == 1 and white[0] != NO_WHITE_END:
        ends = np.append(ends, white_end(int(white[0])))
    counts = {key: _rows_with(table, numbers["row"], key) for key in ("truncated", "cut")}
    notes = _lines_of(table, "notes")
    if parts := int((~kept & ~lost).sum()):
        notes[PART_LOST] = parts
    report = DropReport(
        total,
        len(rows_kept),
        dropped=dropped,
        notes=notes,
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
    """`fingerprint_rows` of a data set."""
    return fingerprint_rows(encoded.rows)
