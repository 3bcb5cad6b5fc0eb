"""Documents of any data set, and the rows of tokens that a language model learns them from.

A document is the text of one row: a column of plain text, or the prompt and the answer (the chosen
one of a pair) of the formats that `llm.formats` reads.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np

from llm import embedded
from llm.checks import with_leaks_noted
from llm.data import DropReport, Encoded
from llm.formats import (
    NOT_TEXT,
    PREFERENCE_ROWS,
    SFT_ROWS,
    Row,
    RowError,
    RowKind,
    check_columns,
    in_batches,
    load_rows,
    prompt_and_responses,
)
from theory.cli import UserError

EMPTY_TEXT = "empty text"
CUT = "cut into several rows"
"""The note on documents that are longer than a row."""

Document = str | RowError
"""The text of a row, or why it has none."""


def embedded_documents(seed: int) -> tuple[list[Document], list[Document]]:
    """To train on and to hold out: both answers of the generated corpus, about equally often.

    The held-out documents ask about things that training never shows."""
    corpus = embedded.generate_corpus(seed=seed)
    parts = ((corpus.sft_train, corpus.dpo_train), (corpus.sft_eval, corpus.dpo_eval))
    train, held_out = (
        [
            _document(row, kind)
            for rows in zip(*part, strict=True)
            for row, kind in zip(rows, (SFT_ROWS, PREFERENCE_ROWS), strict=True)
        ]
        for part in parts
    )
    return train, held_out


def read_documents(
    sources: Sequence[str], *, split: str, column: str, limit: int | None
) -> list[Document]:
    """All rows of the files, directories or hub ids, in their order; `limit` is per source.

    Raises:
        DataError: a source cannot be read, or has neither the column nor a format of `llm.formats`.
    """
    documents: list[Document] = []
    for source in sources:
        rows = load_rows(source, split=split, limit=limit)
        kind = None if column in rows.column_names else _kind(rows, column, source)
        for batch in in_batches(rows):
            documents += [
                _document(row, kind) if kind is not None else _plain(row[column]) for row in batch
            ]
    return documents


def split_documents(
    documents: Sequence[Document], share: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """A random share of the documents, at least one, is held out: whole ones, never a part."""
    if len(documents) < 2:
        raise UserError(f"{len(documents)} documents are too few to hold some of them out")
    order = np.random.default_rng(seed).permutation(len(documents))
    count = min(max(1, round(share * len(documents))), len(documents) - 1)
    held_out, train = np.sort(order[:count]), np.sort(order[count:])
    return [documents[i] for i in train], [documents[i] for i in held_out]


def texts_of(documents: Sequence[Document]) -> Iterator[str]:
    return (document for document in documents if isinstance(document, str))


def encode_documents(
    documents: Sequence[Document], tokenizer: Any, max_length: int, name: str
) -> Encoded:
    """Rows of at most `max_length` tokens in which every token of every document is learnt once.

    A document is END text END, so that the model learns how texts begin and where they end. A row
    is a prompt of one token and what follows it; the last token of a row is the prompt of the
    next row of the same document. Rows never mix documents.
    """
    rows: list[dict[str, array[int]]] = []
    dropped, cut = Counter(d.reason for d in documents if isinstance(d, RowError)), 0
    texts = list(texts_of(documents))
    if not texts:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise UserError(f"{name}: none of {len(documents)} documents can be used: {reasons}")
    end = tokenizer.eos_token_id
    for start in range(0, len(texts), 1000):
        encoded = tokenizer(
            texts[start : start + 1000],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )
        for ids in encoded["input_ids"]:
            own = list(_rows_of([end, *ids, end], max_length))
            cut += len(own) > 1
            rows += own
    notes = {CUT: cut} if cut else {}
    report = DropReport(len(documents), len(texts), 0, dict(dropped), notes)
    return Encoded(rows, name, report)


def encode_parts(
    train: Sequence[Document], held_out: Sequence[Document], tokenizer: Any, max_length: int
) -> tuple[Encoded, Encoded]:
    """Both parts; held-out rows that are trained on as well are noted."""
    encoded = encode_documents(train, tokenizer, max_length, "sft train")
    other = encode_documents(held_out, tokenizer, max_length, "sft held-out")
    return encoded, with_leaks_noted(other, encoded)


def _rows_of(ids: list[int], max_length: int) -> Iterator[dict[str, array[int]]]:
    for start in range(0, len(ids) - 1, max_length - 1):
        yield {
            "prompt_ids": array("i", ids[start : start + 1]),
            "completion_ids": array("i", ids[start + 1 : start + max_length]),
        }


def _kind(rows: datasets.Dataset, column: str, source: str) -> RowKind:
    """Pairs if there is a chosen answer, else demonstrations; checked against the columns."""
    kind = PREFERENCE_ROWS if "chosen" in rows.column_names else SFT_ROWS
    check_columns(rows, kind, f"{source} (it has no column {column!r} either)")
    return kind


def _plain(value: Any) -> Document:
    if not isinstance(value, str):
        return RowError(NOT_TEXT, type(value).__name__)
    return value if value.strip() else RowError(EMPTY_TEXT, "no text")


def _document(row: Row, kind: RowKind) -> Document:
    """Prompt and (first) answer as one text; messages are joined by blank lines."""
    try:
        prompt, (answer, *_) = prompt_and_responses(row, kind)
    except RowError as error:
        return error
    if isinstance(prompt, str):
        return str(prompt + answer)
    return "\n\n".join(message["content"] for message in [*prompt, *answer])
