"""What `llm.validate` found, if its validation.json is there: whatever lists it holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm.report.record import Data, read_object
from llm.validate.report import outcome

FILE = "validation.json"
TITLES = {
    "predictions": "Verdicts on the predictions",
    "quantities": "Quantities that theory gives",
    "hypotheses": "Hypotheses",
}
COLUMNS = (
    *("name", "statement", "theory", "measured", "interval"),
    *("verdict", "claim", "ruled_out", "seeds", "note"),
)
"""What the tables show, where it is there; the rest is a click away."""
HEADS = {"ruled_out": "other causes"}
CAUSE = {"cause", "ruled_out", "evidence"}
TONES = {"holds": "good", "fails": "bad"}
Finding = Mapping[str, Any]


def findings(path: Path) -> Iterator[Data]:
    """The tables of each list of findings: what is shown, and all that was recorded."""
    for name, entries in read_object(path).items():
        if isinstance(entries, list) and entries and all(isinstance(e, dict) for e in entries):
            found = [_with_interval(entry) for entry in entries]
            shown = [column for column in COLUMNS if any(entry.get(column) for entry in found)]
            columns = list(dict.fromkeys(column for entry in found for column in entry))
            more = columns if shown and set(columns) - set(COLUMNS) else []
            yield {
                "title": TITLES.get(name, name.replace("_", " ")),
                "tones": TONES,
                "head": _head(shown or columns),
                "rows": _rows(found, shown or columns),
                "whole_head": _head(more),
                "whole_rows": _rows(found, more) if more else [],
            }


def _with_interval(entry: Finding) -> Finding:
    """`low` and `high`, or a list of both, as one cell; a limit that is not there is infinite."""
    own = {name: value for name, value in entry.items() if name not in ("low", "high")}
    limits: Any = [entry.get("low"), entry.get("high")] if len(own) < len(entry) else None
    limits = own.get("interval", limits)
    if isinstance(limits, dict):
        limits = [limits.get("low"), limits.get("high")]
    if not isinstance(limits, list) or len(limits) != 2:
        return entry
    low = -math.inf if limits[0] is None else limits[0]
    high = math.inf if limits[1] is None else limits[1]
    return own | {"interval": f"{low:.3g} to {high:.3g}".replace("inf", "∞")}


def _head(columns: Sequence[str]) -> list[str]:
    return [HEADS.get(column, column.replace("_", " ")) for column in columns]


def _rows(found: Sequence[Finding], columns: Sequence[str]) -> list[list[Any]]:
    return [[_cell(entry.get(column)) for column in columns] for entry in found]


def _cell(value: Any) -> Any:
    if value and isinstance(value, list) and all(map(_is_cause, value)):
        return "; ".join(map(_cause, value))
    return value


def _is_cause(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() >= CAUSE


def _cause(cause: Mapping[str, Any]) -> str:
    return f"{cause['cause']} {outcome(cause)} ({cause['evidence']})"
