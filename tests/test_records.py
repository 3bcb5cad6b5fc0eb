"""Records: files appear whole or not at all, JSON stays JSON, figures are reproducible."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from theory import records
from theory.records import (
    digest,
    digest_of_code,
    read_json,
    save_figure,
    write_json,
    write_parquet,
)

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

finite_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)  # fmt: skip


def small_figure() -> Figure:
    """With a clip path and markers: the parts of an SVG that get generated ids."""
    figure = Figure(figsize=(2, 2))
    axes = figure.subplots()
    axes.plot([1, 2, 3], [1, 4, 9], marker="o", label="a line")
    axes.fill_between([1, 2, 3], [0, 3, 8], [2, 5, 10], alpha=0.25)
    figure.legend()
    return figure


@given(st.dictionaries(st.text(), finite_json, max_size=3))
def test_a_digest_depends_on_the_values_and_not_on_their_order(data: dict[str, Any]) -> None:
    assert (
        digest(dict(reversed(data.items()))) == digest(data) == digest(json.loads(json.dumps(data)))
    )
    assert digest({**data, "one more": 1}) != digest(data)


def test_a_digest_of_code_covers_modules_and_whole_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "ROOT", tmp_path)
    for name in ("room/a.py", "room/deep/b.py", "alone.py", "other.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    before = digest_of_code("room", "alone")
    (tmp_path / "other.py").write_text("does not count")
    assert digest_of_code("room", "alone") == before
    for name in ("room/a.py", "room/deep/b.py", "alone.py"):
        (tmp_path / name).write_text("changed")
        assert digest_of_code("room", "alone") != before
        (tmp_path / name).write_text(name)
    with pytest.raises(ValueError, match=r"no source of room\.gone"):
        digest_of_code("room", "room.gone")


def test_a_digest_names_the_same_value_in_every_release() -> None:
    # Results on disk are found by it. The expected value is sha256sum of the text in the comment.
    value = {"b": (1, 0.5), "a": Path("é")}  # {"a": "\u00e9", "b": [1, 0.5]}
    assert digest(value) == "9dcc384d153a223ca84813c41a105e36b25f4320fb131bc1a27a5cdf6bc9bf45"


def failing_frame() -> pd.DataFrame:
    """Parquet cannot hold a column of mixed types."""
    return pd.DataFrame({"mixed": [1, "one", object()]})


class HalfWrittenFigure:
    def savefig(self, path: Path, **_: Any) -> None:
        path.write_bytes(b"half a pict")
        raise OSError("No space left on device")


WRITERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "json": ("file.json", lambda path: write_json(path, {"unwritable": object()})),
    "parquet": ("file.parquet", lambda path: write_parquet(path, failing_frame())),
    "png": ("file.png", lambda path: save_figure(HalfWrittenFigure(), path.with_suffix(""))),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_failing_write_keeps_the_old_file_and_leaves_nothing_else(
    kind: str, tmp_path: Path
) -> None:
    name, write = WRITERS[kind]
    path = tmp_path / name
    path.write_bytes(b"old")
    with pytest.raises((TypeError, OSError, ValueError)):
        write(path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_failing_first_write_leaves_no_file(kind: str, tmp_path: Path) -> None:
    name, write = WRITERS[kind]
    with pytest.raises((TypeError, OSError, ValueError)):
        write(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_rename_leaves_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        assert len(list(tmp_path.iterdir())) == 1  # the whole temporary, next to its target
        raise KeyboardInterrupt

    monkeypatch.setattr(records.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "file.json", {})
    assert list(tmp_path.iterdir()) == []


def test_a_write_replaces_the_old_file_and_makes_missing_directories(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.json"
    write_json(path, {"first": 1})
    write_json(path, {"second": 2})
    assert read_json(path) == {"second": 2}
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


# --- JSON


@given(value=finite_json)
def test_json_round_trip(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("json") / "file.json"
    write_json(path, value)
    assert read_json(path) == value


def test_what_json_cannot_hold_becomes_null(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    numbers = {"nan": math.nan, "inf": [1.5, -math.inf], "numpy": (np.float64("nan"), {"x": 2})}
    write_json(path, numbers)
    assert read_json(path) == {"nan": None, "inf": [1.5, None], "numpy": [None, {"x": 2}]}
    assert math.isnan(numbers["nan"])  # the caller's data is left alone


def test_json_is_readable_utf8_and_ends_with_a_newline(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"lam": [0.5], "float": np.float64(0.1)})
    text = path.read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert text.count("\n") > 4
    assert json.loads(text, parse_constant=pytest.fail) == {"lam": [0.5], "float": 0.1}


# --- tables


def test_parquet_round_trip_keeps_values_types_and_order(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "name": ["b", "a", "b"],
            "seed": np.array([2, 0, 1]),
            "gap": [0.1, np.nextafter(0.1, 1.0), np.nan],
        }
    )
    write_parquet(tmp_path / "frame.parquet", frame)
    restored = pd.read_parquet(tmp_path / "frame.parquet")
    pd.testing.assert_frame_equal(restored, frame, check_exact=True)


# --- figures


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path) -> None:
    for run in ("first", "second"):
        save_figure(small_figure(), tmp_path / run)
    for suffix in ("png", "svg"):
        first, second = ((tmp_path / f"{run}.{suffix}").read_bytes() for run in ("first", "second"))
        assert first == second


def test_a_figure_is_saved_as_png_and_svg_and_settings_stay(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    save_figure(small_figure(), tmp_path / "features.2")  # a dot in a name is no suffix
    assert {p.name for p in tmp_path.iterdir()} == {"features.2.png", "features.2.svg"}
    png = (tmp_path / "features.2.png").read_bytes()
    assert png.startswith(PNG_MAGIC)
    assert int.from_bytes(png[16:20], "big") == 2 * 200  # 2 inches at 200 dpi
    svg = (tmp_path / "features.2.svg").read_text(encoding="utf-8")
    assert svg.rstrip().endswith("</svg>")
    assert "dc:date" not in svg
    assert dict(mpl.rcParams) == before
