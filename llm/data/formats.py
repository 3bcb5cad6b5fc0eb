"""Raw rows: read them from disk or from the hub and recognise their format.

    rows = load_rows("pairs.jsonl")     # raw columns
    preference_fields(rows[0])          # {"prompt": ..., "chosen": ..., "rejected": ...}

A mistake in the whole data set is a `DataError`, one unusable row a `RowError` with the reason
under which `llm.data.encode` counts it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import datasets

from theory.cli import UserError

Row: TypeAlias = Mapping[str, Any]
Rows: TypeAlias = datasets.Dataset | Sequence[Row]

NOT_TEXT = "not text"
NO_ASSISTANT = "no assistant message"
EMPTY_PROMPT = "empty prompt"
EMPTY_RESPONSE = "empty response"

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HH_MARKER = "\n\nAssistant:"
_BATCH_SIZE = 1000


class DataError(UserError):
    """A mistake in the user's data or flags, told in one line."""


class RowError(DataError):
    """One row that cannot be used; `reason` is the key under which encoding counts it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


# ---------------------------------------------------------------------------------------- loading


def load_rows(
    source: str,
    *,
    split: str | None = None,
    config_name: str | None = None,
    limit: int | None = None,
    streaming: bool = False,
) -> datasets.Dataset:
    """Read a data set as it is, from disk or from the hub.

    Args:
        source: a .jsonl, .json, .parquet or .csv file, a directory of such files (split names in
            the file names count, as `datasets` defines them), or a hub id.
        split: default "train"; the slicing syntax of `datasets` works ("train[:100]").
        config_name: which configuration of a data set that has several.
        limit: keep at most this many rows, from the start.
        streaming: read these `limit` rows and nothing else (no slices of splits then).

    Raises:
        DataError: missing or unreadable file, unknown suffix, unknown hub id, configuration or
            split; streaming without a limit.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; it must be at least 1")
    if streaming and limit is None:
        raise DataError(f"{source}: streaming reads the first rows and needs to know how many")
    arguments = _load_arguments(source) | ({"name": config_name} if config_name else {})
    try:
        if streaming:
            return _first_rows(arguments, split or "train", limit)
        arguments |= _kept_by_content(Path(source).expanduser())
        rows = datasets.load_dataset(**arguments, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise DataError(f"cannot load {source!r}: {one_line(cause)}") from error
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _kept_by_content(source: Path) -> dict[str, Any]:
    """Where `datasets` keeps local rows: by itself it tells edited files by their times alone."""
    files = sorted(p for p in (source.rglob("*") if source.is_dir() else [source]) if p.is_file())
    if not files:
        return {}  # of the hub, where a revision tells
    content = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            content.update(hashlib.file_digest(file, "sha256").digest())
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "by_content" / content.hexdigest()[:32]
    return {"cache_dir": str(folder)}


def _first_rows(arguments: dict[str, Any], split: str, limit: int | None) -> datasets.Dataset:
    """The first rows of a stream, in memory; from here on nothing differs from a loaded set."""
    stream = datasets.load_dataset(**arguments, split=split, streaming=True)
    # `stream.take` would open the next file to find out that it needs nothing from it.
    return datasets.Dataset.from_list(list(islice(stream, limit)), features=stream.features)


def is_missing_file(source: str) -> bool:
    """Whether `source` can only mean a local file, and there is none."""
    path = Path(source).expanduser()
    looks_local = path.suffix.lower() in _BUILDERS or not _HUB_ID.fullmatch(source)
    return (looks_local or source.startswith(".")) and not path.exists()


def _load_arguments(source: str) -> dict[str, Any]:
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() not in _BUILDERS:
            raise DataError(
                f"{source}: unknown suffix {path.suffix!r}; use one of {', '.join(_BUILDERS)}"
            )
        return {"path": _BUILDERS[path.suffix.lower()], "data_files": str(path)}
    if path.is_dir():
        if not any(file.suffix.lower() in _BUILDERS for file in path.rglob("*")):
            raise DataError(f"{source}: the directory holds no {', '.join(_BUILDERS)} file")
        return {"path": str(path)}
    if is_missing_file(source):
        raise DataError(f"{source}: no such file or directory")
    return {"path": source}


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


# ----------------------------------------------------------------------------- formats of the rows


def sft_fields(row: Row) -> dict[str, Any]:
    """One raw row as {"prompt", "completion"}: two strings, or two lists of messages.

    Formats: `prompt`+`completion` (strings or messages); `messages` (the last assistant message
    is the completion, what stands before it the prompt); Alpaca's `instruction`+`output` with an
    optional `input`, rendered as

        ### Instruction:\\n{instruction}\\n\\n### Input:\\n{input}\\n\\n### Response:\\n{output}

    without the Input paragraph where `input` is empty.

    Raises:
        DataError: no format matches the columns.
        RowError: the format matches but a value is not text (None, a number, odd messages).
    """
    match _match_format(row, SFT_ROWS):
        case "messages":
            return _split_messages(_messages(row["messages"], "messages"))
        case "alpaca":
            return _alpaca(row)
        case _:
            prompt, completion = _same_kind(row, "prompt", "completion")
            return {"prompt": prompt, "completion": completion}


def preference_fields(row: Row) -> dict[str, Any]:
    """One raw row as {"prompt", "chosen", "rejected"}: strings, or lists of messages.

    With a `prompt` column: as given; responses in messages that repeat the prompt lose it. Without
    one the prompt is what both responses share: their common messages; in text the common prefix
    up to and including its last "\\n\\nAssistant:" (hh-rlhf, arXiv 2204.05862) or, without that
    marker, up to its last white space, which goes to the responses.

    Raises:
        DataError: no format matches the columns.
        RowError: the format matches but a value is not text.
    """
    if _match_format(row, PREFERENCE_ROWS) == "explicit prompt":
        prompt, chosen, rejected = _same_kind(row, "prompt", "chosen", "rejected")
        if isinstance(prompt, list):
            chosen, rejected = (_without_prefix(part, prompt) for part in (chosen, rejected))
    else:
        chosen, rejected = _same_kind(row, "chosen", "rejected")
        cut = _prompt_end(chosen, rejected)
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@dataclass(frozen=True)
class RowKind:
    """What differs between the two kinds of data."""

    fields: Callable[[Row], dict[str, Any]]
    responses: tuple[str, ...]
    formats: dict[str, tuple[str, ...]]  # name -> the columns it needs; the first match counts


SFT_ROWS = RowKind(
    sft_fields,
    ("completion",),
    {
        "prompt-completion": ("prompt", "completion"),
        "messages": ("messages",),
        "alpaca": ("instruction", "output"),
    },
)
PREFERENCE_ROWS = RowKind(
    preference_fields,
    ("chosen", "rejected"),
    {
        "explicit prompt": ("prompt", "chosen", "rejected"),
        "implicit prompt": ("chosen", "rejected"),
    },
)


def _match_format(columns: Sequence[str] | Row, kind: RowKind, where: str = "") -> str:
    for name, needed in kind.formats.items():
        if all(column in columns for column in needed):
            return name
    accepted = " | ".join("+".join(needed) for needed in kind.formats.values())
    raise DataError(
        f"{where}columns {', '.join(map(str, columns)) or '(none)'} match no accepted format: "
        f"{accepted}"
    )


def _same_kind(row: Row, *names: str) -> list[Any]:
    """The values of the named columns, all strings, or all messages as soon as one is a list."""
    values = [row[name] for name in names]
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str | list):
            raise RowError(NOT_TEXT, f"{name} is {type(value).__name__}, not a string or messages")
    if all(isinstance(value, str) for value in values):
        return values
    roles = ("user" if name == "prompt" else "assistant" for name in names)
    return [
        [{"role": role, "content": value}] if isinstance(value, str) else _messages(value, name)
        for name, value, role in zip(names, values, roles, strict=True)
    ]


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    """Validated copies; keys that are None (Arrow fills missing ones) are left out."""
    if not isinstance(value, list):
        raise RowError(NOT_TEXT, f"{name} is {type(value).__name__}, not a list of messages")
    for message in value:
        texts = (message.get("role"), message.get("content")) if isinstance(message, dict) else ()
        if not texts or not all(isinstance(text, str) for text in texts):
            raise RowError(NOT_TEXT, f"{name} has a message without a text role and content")
    return [{k: v for k, v in message.items() if v is not None} for message in value]


def _split_messages(messages: list[dict[str, Any]]) -> dict[str, Any]:
    for index in range(len(messages) - 1, -1, -1):
        if messages[index]["role"] == "assistant":
            # What follows the last answer has no answer: nothing to learn from.
            return {"prompt": messages[:index], "completion": messages[index : index + 1]}
    raise RowError(NO_ASSISTANT, "messages has none with role 'assistant'")


def _alpaca(row: Row) -> dict[str, str]:
    for name in ("instruction", "output"):
        if not isinstance(row[name], str):
            raise RowError(NOT_TEXT, f"{name} is {type(row[name]).__name__}, not a string")
    # Without an instruction the headings alone would pass for a prompt.
    if not row["instruction"].strip():
        raise RowError(EMPTY_PROMPT, "instruction is empty")
    extra = row.get("input")
    if not isinstance(extra, str | None):
        raise RowError(NOT_TEXT, f"input is {type(extra).__name__}, not a string")
    parts = [f"### Instruction:\n{row['instruction']}"]
    if extra and extra.strip():
        parts.append(f"### Input:\n{extra}")
    return {"prompt": "\n\n".join([*parts, "### Response:\n"]), "completion": row["output"]}


def _without_prefix(messages: list[Any], prefix: list[Any]) -> list[Any]:
    return messages[len(prefix) :] if messages[: len(prefix)] == prefix else messages


def common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Number of leading elements that two strings or lists share."""
    shortest = min(len(first), len(second))
    if first[:shortest] == second[:shortest]:
        return shortest
    return next(i for i in range(shortest) if first[i] != second[i])


def _prompt_end(chosen: Any, rejected: Any) -> int:
    """Where the prompt ends that two full dialogues share (0: they share none)."""
    shared = common_prefix(chosen, rejected)
    if isinstance(chosen, list):
        # If one dialogue holds the whole other, its last message is still its response.
        return max(0, min(shared, len(chosen) - 1, len(rejected) - 1))
    marker = chosen.rfind(_HH_MARKER, 0, shared)
    if marker >= 0:
        return marker + len(_HH_MARKER)
    spaces = [match.start() for match in re.finditer(r"\s+", chosen[:shared])]
    return spaces[-1] if spaces else 0


# ------------------------------------------------------------------------------ what encoding needs


def check_columns(rows: Rows, kind: RowKind, name: str) -> None:
    """Raise DataError if the data set called `name` is empty or of no accepted format."""
    if len(rows) == 0:
        raise DataError(f"{name}: the data set has no rows")
    columns = rows.column_names if isinstance(rows, datasets.Dataset) else list(rows[0])
    _match_format(columns, kind, f"{name}: ")


def in_batches(rows: Rows) -> Iterator[list[Row]]:
    """All rows in order, in lists of bounded length."""
    for start in range(0, len(rows), _BATCH_SIZE):
        part = rows[start : start + _BATCH_SIZE]
        if isinstance(part, dict):  # a datasets.Dataset answers a slice with columns
            part = [
                dict(zip(part, values, strict=True)) for values in zip(*part.values(), strict=True)
            ]
        yield list(part)


def prompt_and_responses(row: Row, kind: RowKind) -> tuple[Any, list[Any]]:
    """The fields of one row, none of them blank: all strings, or all lists of messages."""
    fields = kind.fields(row)
    prompt, responses = fields["prompt"], [fields[key] for key in kind.responses]
    if _is_blank(prompt):
        raise RowError(EMPTY_PROMPT, "no text")
    if any(map(_is_blank, responses)):
        raise RowError(EMPTY_RESPONSE, "no text")
    return prompt, responses


def _is_blank(value: str | list[dict[str, Any]]) -> bool:
    texts = [value] if isinstance(value, str) else [message["content"] for message in value]
    return not any(text.strip() for text in texts)
