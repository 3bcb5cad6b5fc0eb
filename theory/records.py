"""Writing what an experiment leaves: every file appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd

ROOT = Path(__file__).parents[1]
"""Where the packages lie."""


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON; NaN and infinities become null, which JSON can hold."""
    write_text(path, json.dumps(_finite(data), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def digest(value: Any) -> str:
    """sha256 (hex) of `value` as JSON with sorted keys; what JSON cannot hold counts as its str."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_code(*modules: str) -> str:
    """sha256 (hex) of the source of modules and of all in packages, such as "llm.loss".

    What is kept by it is never taken for the result of other code. A module that is not there is
    a ValueError: a room that moved must not silently stop counting.
    """
    whole = hashlib.sha256()
    for module in modules:
        place = ROOT.joinpath(*module.split("."))
        paths = sorted(place.rglob("*.py")) or [place.with_suffix(".py")]
        if not paths[0].is_file():
            raise ValueError(f"no source of {module} below {ROOT}")
        for path in paths:
            whole.update(path.read_bytes())
    return whole.hexdigest()


def write_parquet(path: Path, frame: pd.DataFrame) -> None:
    write_file(path, lambda temporary: frame.to_parquet(temporary, index=False))


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """`write` next to `path` and rename: a reader, or a killed run, never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_figure(figure: Any, path: Path) -> None:
    """Save a matplotlib figure as PNG (200 dpi) and SVG: `path` with .png and .svg appended."""
    # No date and no random ids in the SVG: the same numbers give the same bytes.
    with mpl.rc_context({"svg.hashsalt": "joint-sft-dpo"}):
        for suffix, metadata in (("png", {}), ("svg", {"Date": None})):
            save = partial(figure.savefig, format=suffix, dpi=200, metadata=metadata)
            write_file(path.with_name(f"{path.name}.{suffix}"), save)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data
