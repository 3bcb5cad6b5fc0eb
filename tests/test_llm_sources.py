"""llm.data.sources and files: rows as their owner wrote them, and files that are something else."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _text import ROWS, assistant, user

from llm.data import sources
from llm.data.errors import DataError
from llm.data.sources import load_rows, load_sources, raw_rows

pytestmark = pytest.mark.usefixtures("temporary_datasets_cache")


def loaded(source: Path | str, **options: Any) -> list[Any]:
    return raw_rows(load_rows(str(source), **options)[:])


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    table = pd.DataFrame(rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix in (".csv", ".tsv"):
        table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        path.write_bytes(as_lines(rows))
    return path


def squeeze(path: Path) -> Path:
    """ROWS as JSON Lines in the compression that the suffix names."""
    data = as_lines(ROWS)
    if path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(data)
        return path
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    path.write_bytes(compress[path.suffix](data))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv"])
def test_every_file_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"rows{suffix}")
    assert loaded(path) == ROWS
    assert loaded(path, limit=2) == loaded(path, limit=2, streaming=True) == ROWS[:2]
    assert loaded(path, limit=100, streaming=True) == loaded(path, limit=100) == ROWS
    assert loaded(path, split="train[1:3]+train[:1]") == [*ROWS[1:3], ROWS[0]]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_compressed_files_and_folders_of_them(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "set").mkdir()
    path = squeeze(tmp_path / "set" / f"train.jsonl{suffix}")
    assert loaded(path) == loaded(path.parent) == ROWS
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match="damaged or cut short"):
        loaded(path)


def test_a_directory_is_read_by_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS[:2])
    write(tmp_path / "train-more.csv", ROWS[2:3])
    write(tmp_path / "test.jsonl", ROWS[3:])
    (tmp_path / "dataset_info.json").write_text("{}", encoding="utf-8")
    assert loaded(tmp_path) == [ROWS[2], *ROWS[:2]]
    assert loaded(tmp_path, split="test") == ROWS[3:]
    assert loaded(tmp_path, split="test", limit=1, streaming=True) == ROWS[3:4]
    for options in ({}, {"limit": 1, "streaming": True}):
        with pytest.raises(DataError, match=r"no split 'nope': it has test, train"):
            loaded(tmp_path, split="nope", **options)
    with pytest.raises(DataError, match="is local and has no configuration 'en'"):
        loaded(tmp_path, config_name="en")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.csv", "prompt,completion\np,NA\nq,\n", [("p", "NA"), ("q", "")]),
        ("a.csv", "prompt,completion\np,None\n'q',null\n", [("p", "None"), ("'q'", "null")]),
        ("a.csv", "prompt;completion\np,q;007\n", [("p,q", "007")]),
        ("a.csv", '\ufeffprompt,completion\n"p\nq","a ""b"" c"\n', [("p\nq", 'a "b" c')]),
        ("a.tsv", "prompt\tcompletion\np, q\t1.50\n", [("p, q", "1.50")]),
        ("a.jsonl", '{"prompt": "p", "completion": "2020-01-02"}\r\n\r\n', [("p", "2020-01-02")]),
        ("a.jsonl", '{"prompt": 1, "completion": {"a": null}}', [(1, {"a": None})]),
        ("a.jsonl", '{"prompt": "p", "completion": 1.50}', [("p", 1.5)]),
        ("a.json", '\ufeff[{"prompt": "p", "completion": 10}]', [("p", 10)]),
        ("a.json", '{"prompt": "p", "completion": "x"}\n' * 2, [("p", "x")] * 2),
    ],
)
def test_no_value_is_interpreted(tmp_path: Path, name: str, text: str, expected: Any) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert loaded(tmp_path / name) == [{"prompt": p, "completion": c} for p, c in expected]


def test_a_table_invents_no_keys_and_bytes_are_text(tmp_path: Path) -> None:
    calls = [{"arguments": {"day": 3}}, {"arguments": {"town": "x"}}]
    rows = [{"messages": [{**assistant("c"), "calls": [each]}, user("p")]} for each in calls]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert loaded(tmp_path / "a.parquet") == rows
    table = pa.table({"a": pa.array([b"caf\xc3\xa9", b"\xff"], pa.binary()), "b": [1, None]})
    pq.write_table(table, tmp_path / "b.parquet")
    assert loaded(tmp_path / "b.parquet") == [{"a": "café", "b": 1}, {"a": "\udcff"}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", ["git lfs pull"]),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid", ["git lfs pull"]),
        ("a.jsonl", as_lines(ROWS).decode().encode("utf-16"), ["UTF-16", "iconv"]),
        ("a.csv", "prompt,completion\nh\xe9,b\n".encode("latin1"), ["not UTF-8", "0xe9", "iconv"]),
        ("a.jsonl", b"PK\x03\x04...", ["zip archive", "unpack"]),
        ("a.jsonl", b"PAR1...", ["is a Parquet file"]),
        ("a.parquet", b"{}", ["is not a Parquet file"]),
        ("a.parquet", b"PAR1", ["damaged or cut short"]),
        ("a.jsonl", as_lines(ROWS) + b'{"prompt": "half', ["line 6", "cut short", "half"]),
        ("a.jsonl", b"[1, 2]", ["entry 0 is 1"]),
        ("a.jsonl", b'{"a": 1}\n3\n', ["line 2 is 3", "one a row"]),
        ("a.json", b'{"version": 1, "data": [{"prompt": "p"}]}', ["one object", "'data'", "jq"]),
        ("a.json", b'{"prompt": ["p"], "completion": ["c"]}', ["columns are prompt", "records"]),
        ("a.json", b'{"0": {"prompt": "p"}}', ["keys are 0", "records"]),
        ("a.json", b'[{"prompt": "p"}, {"pro', ["is not JSON", "cut short"]),
        ("a.csv", b"prompt,completion\na,b,c\n", ["line 2", "more cells", "quotes"]),
        ("a.csv", b'prompt,completion\na,"b\n', ["unexpected end", "quotes"]),
        ("a.txt", b"x", [".txt", ".jsonl", ".zst"]),
    ],
)
def test_a_file_that_is_something_else_is_told_in_a_sentence(
    tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        load_rows(str(tmp_path / name))
    assert "\n" not in str(error.value)
    assert str(tmp_path / name) in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


def test_other_loading_mistakes(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    rows = str(write(tmp_path / "r.jsonl"))
    for source, options, words in [
        (tmp_path / "empty", {}, ["empty", ".parquet"]),
        (rows, {"limit": 0}, ["limit", "0"]),
        (rows, {"streaming": True}, ["streaming", "how many"]),
        (rows, {"streaming": True, "limit": 2, "split": "train[:1]"}, ["train[:1]"]),
        *(
            (name, {}, [name, "no such file"])
            for name in ("gone.jsonl", "./gone", "a/b/c", "x.csv.gz")
        ),
    ]:
        with pytest.raises(DataError) as error:
            load_rows(str(source), **options)
        assert all(word in str(error.value) for word in words), error.value


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl")
    before, stamp = load_rows(str(path)), path.stat()
    assert load_rows(str(path))._fingerprint == before._fingerprint
    path.write_bytes(path.read_bytes().replace(b"c0", b"d0"))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert loaded(path)[0] == ROWS[0] | {"completion": "d0"}


# --- mixtures


def test_a_mixture_has_the_shares_asked_for_and_repeats_no_row(tmp_path: Path) -> None:
    for name, count in (("a", 60), ("b", 500)):
        rows = [{"prompt": f"{name}{i}", "completion": "c"} for i in range(count)]
        write(tmp_path / f"{name}.jsonl", rows)
    names = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    mixed = load_sources([f"{names[0]}:0.3", f"{names[1]}:.7"])
    prompts = [row["prompt"] for row in raw_rows(mixed[:])]
    assert len(prompts) == len(set(prompts)) == 200
    assert sum(prompt[0] == "a" for prompt in prompts) == 60
    assert prompts != sorted(prompts)
    again = load_sources([f"{names[0]}:3", f"{names[1]}:7"], limit=50)
    assert [row["prompt"] for row in raw_rows(again[:])] == prompts[:50]
    assert len(load_sources(names)) == 560
    for weighted in ([f"{names[0]}:0.3", names[1]], [f"{names[0]}:0", f"{names[1]}:1"]):
        with pytest.raises(DataError, match="a weight above 0 to every source, or to none"):
            load_sources(weighted)
    (tmp_path / "a.jsonl").rename(tmp_path / "a.jsonl:0.3")
    assert sources.parse_source(f"{names[0]}:0.3") == sources.Source(f"{names[0]}:0.3")


# --- the hub


def test_hub_ids_reach_load_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    table = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(sources.datasets, "load_dataset", lambda **kw: calls.append(kw) or table)
    assert loaded("vicgalle/alpaca-gpt4", limit=3) == ROWS[:3]
    load_rows("who/what", split="test", config_name="en")
    assert calls == [
        {"path": "vicgalle/alpaca-gpt4", "split": "train"},
        {"path": "who/what", "name": "en", "split": "test"},
    ]


def test_a_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError("no such\ndata set")

    monkeypatch.setattr(sources.datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"'who/what'.*no such data set"):
        load_rows("who/what")
