"""Raw rows of files, folders and hub ids, on disk: JSON text, and its number in the source.

    rows = load_rows("pairs.jsonl.gz")                      # a datasets.Dataset
    rows = load_sources(["a.jsonl:0.7", "b.parquet:0.3"])   # a mixture
    raw_rows(rows[:2])                                      # [{"prompt": ..., ...}, ...]

What has been read once is kept in the cache of `datasets` under a digest of its bytes, so that an
edited file is read again and an unchanged one is there at once, whatever its size.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import xxhash
from datasets.table import MemoryMappedTable

from llm.data.errors import DataError, one_line
from llm.data.files import COMPRESSED, KINDS, kind_of, read_file, rows_as_json
from llm.data.messages import Number

COLUMN, NUMBER = "json", "number"
"""The columns of raw rows: the row, and where it stands in its source."""
FOLDER = "joint_rows"
"""Of the cache, in that of `datasets`."""
VERSION = 2
"""Of how rows are read; another number reads every file again."""
SPLITS = {
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
    "train": ("train", "training"),
}
"""Words in the name of a file or folder that say which split it holds, as `datasets` has them."""
_ABOUT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_BATCH = 1000
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WEIGHTED = re.compile(r"(.+):(\d*\.?\d+)")


@dataclass(frozen=True)
class Source:
    """Where rows come from, and their share of a mixture (None: all of them, beside others)."""

    name: str
    weight: float | None = None


def raw_rows(batch: Mapping[str, Sequence[str]]) -> list[Any]:
    """The rows of a slice of what `load_rows` gives, as Python objects."""
    return [json.loads(text, parse_float=Number) for text in batch[COLUMN]]


def parse_source(text: str) -> Source:
    """`NAME` or `NAME:WEIGHT`; a file whose name ends like that is a file."""
    match = _WEIGHTED.fullmatch(text)
    if match is None or Path(text).expanduser().exists():
        return Source(text)
    return Source(match[1], float(match[2]))


def load_sources(sources: Sequence[str], **options: Any) -> datasets.Dataset:
    """Rows of one source or of several, mixed in an order that depends on nothing but them.

    With weights, the largest mixture that has these shares and repeats no row; without, all rows.

    Args:
        sources: as for `parse_source`.
        options: of `load_rows`; `limit` counts rows of the mixture.

    Raises:
        DataError: as `load_rows`; weights on some of several sources, or a weight of 0.
    """
    parsed = [parse_source(source) for source in sources]
    weights = [source.weight for source in parsed]
    if len(parsed) == 1:
        return load_rows(parsed[0].name, **options)
    if (None in weights) != (set(weights) == {None}) or 0.0 in weights:
        raise DataError(f"{' '.join(sources)}: give a weight above 0 to every source, or to none")
    limit = None if not options.get("streaming") else options["limit"]
    parts = [load_rows(source.name, **(options | {"limit": limit})) for source in parsed]
    return _mixed(parts, weights, options.get("limit"))


def _mixed(
    parts: Sequence[datasets.Dataset], weights: Sequence[float | None], limit: int | None
) -> datasets.Dataset:
    total = sum(weight or 0.0 for weight in weights)
    room = min(
        (len(part) * total / weight for part, weight in zip(parts, weights, strict=True) if weight),
        default=math.inf,
    )
    rng = np.random.default_rng(0)
    taken = []
    for part, weight in zip(parts, weights, strict=True):
        count = len(part) if weight is None else round(room * weight / total)
        taken.append(part.select(np.sort(rng.permutation(len(part))[:count])))
    rows = datasets.concatenate_datasets(taken)
    return rows.select(rng.permutation(len(rows))[:limit])


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
        source: a JSON Lines, JSON, Parquet, CSV or TSV file (.gz, .zst, .bz2 or .xz around it), a
            directory of such files (split names in their names count), or a hub id.
        split: default "train"; the slicing syntax of `datasets` works ("train[:100]").
        config_name: which configuration of a hub id that has several.
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
    path = Path(source).expanduser()
    if is_missing_file(source):
        raise DataError(f"{source}: no such file or directory")
    if not path.exists() or _has_a_card(path):
        return _from_hub(source, split or "train", config_name, limit, streaming)
    if config_name is not None:
        raise DataError(
            f"{source} is local and has no configuration {config_name!r}: drop the flag"
        )
    return _local(path, split or "train", limit, streaming)


def is_missing_file(source: str) -> bool:
    """Whether `source` can only mean a local file, and there is none."""
    path = Path(source).expanduser()
    looks_local = kind_of(path) is not None or not _HUB_ID.fullmatch(source)
    return (looks_local or source.startswith(".")) and not path.exists()


# ------------------------------------------------------------------------------------ local files


def _local(path: Path, split: str, limit: int | None, streaming: bool) -> datasets.Dataset:
    files = _files_by_split(path)
    if streaming:
        if split not in files:
            raise DataError(f"{path} streams no split {split!r}: it has {', '.join(files)}")
        lines = (row for file in files[split] for row in read_file(file))
        first = list(islice(lines, limit))
        return datasets.Dataset.from_dict({COLUMN: first, NUMBER: range(len(first))})
    rows = {name: _read(parts) for name, parts in files.items() if name in split}
    try:
        pieces = datasets.ReadInstruction.from_spec(split).to_absolute(
            {name: len(part) for name, part in rows.items()}
        )
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{path} has no split {split!r}: it has {', '.join(files)} ({one_line(error)})"
        ) from error
    parts = [rows[each.splitname].select(range(each.from_, each.to)) for each in pieces]
    chosen = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    return chosen if limit is None else chosen.select(range(min(limit, len(chosen))))


def _files_by_split(path: Path) -> dict[str, list[Path]]:
    if path.is_file():
        if kind_of(path) is None:
            raise DataError(f"{path}: unknown suffix {path.suffix!r}; use one of {_SUFFIXES}")
        return {"train": [path]}
    files = [file for file in sorted(path.rglob("*")) if _is_data(file, path)]
    if not files:
        raise DataError(f"{path}: the directory holds no {', '.join(KINDS)} file")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(path)), []).append(file)
    named = [name for name in by_split if name]
    if "" in by_split and "train" not in named:
        by_split["train"] = by_split.pop("")
    return {name: by_split[name] for name in (*SPLITS, *by_split) if by_split.get(name) and name}


_SUFFIXES = f"{', '.join(KINDS)} (and {', '.join(COMPRESSED)} after it)"


def _is_data(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
    return file.is_file() and not hidden and file.name not in _ABOUT_DATA and bool(kind_of(file))


def _split_of(file: Path) -> str:
    words = re.split(r"[^a-z]+", str(file).lower())
    return next((name for name, known in SPLITS.items() if set(words) & set(known)), "")


def _read(files: Sequence[Path]) -> datasets.Dataset:
    return _on_disk(_digest(files), (row for file in files for row in read_file(file)))


def _digest(files: Sequence[Path]) -> str:
    digest = xxhash.xxh3_128(f"rows {VERSION}".encode())
    for file in files:
        digest.update(f"{kind_of(file)} {file.stat().st_size};".encode())
        with file.open("rb") as stream:
            while part := stream.read(2**20):
                digest.update(part)
    return digest.hexdigest()


def _on_disk(key: str, rows: Iterable[str]) -> datasets.Dataset:
    """The rows as a memory-mapped table; written first if the cache has none of that key."""
    path = Path(datasets.config.HF_DATASETS_CACHE) / FOLDER / f"{key}.arrow"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.part")
        try:
            _write(unfinished, iter(rows))
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return datasets.Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=key)


def _write(path: Path, rows: Iterator[str]) -> None:
    schema, start = pa.schema({COLUMN: pa.string(), NUMBER: pa.int64()}), 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while part := list(islice(rows, _BATCH)):
            numbers = range(start, start + len(part))
            writer.write_batch(pa.record_batch([part, pa.array(numbers)], schema=schema))
            start += len(part)


# ---------------------------------------------------------------------------------------- the hub


def _has_a_card(path: Path) -> bool:
    """Whether a folder says itself, as one of the hub does, which files make which split."""
    card = path / "README.md"
    return card.is_file() and "data_files" in card.read_text("utf-8", errors="replace")


def _from_hub(
    source: str, split: str, config_name: str | None, limit: int | None, streaming: bool
) -> datasets.Dataset:
    arguments = {"path": source, "split": split} | ({"name": config_name} if config_name else {})
    try:
        if streaming:
            stream = datasets.load_dataset(**arguments, streaming=True)
            # `stream.take` would open the next file to find out that it needs nothing from it.
            first = list(islice(stream, limit))
            return _json_of(datasets.Dataset.from_list(first, features=stream.features))
        rows = _json_of(datasets.load_dataset(**arguments))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot load {source!r}: {one_line(error.__cause__ or error)}") from error
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _json_of(rows: datasets.Dataset) -> datasets.Dataset:
    batches = rows.with_format("arrow").iter(_BATCH)
    lines = (line for batch in batches for line in rows_as_json(batch))
    return _on_disk(f"{rows._fingerprint}-{VERSION}", lines)
