"""What `llm.validate` found, if its validation.json is there: whatever lists it holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm.report.page import Html, details, section, table, text
from llm.report.record import read_object
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


def sections(path: Path) -> Iterator[Html]:
    """One section per list of findings."""
    for name, entries in read_object(path).items():
        if isinstance(entries, list) and entries and all(isinstance(e, dict) for e in entries):
            findings = [_with_interval(entry) for entry in entries]
            shown = [c for c in COLUMNS if any(entry.get(c) for entry in findings)]
            columns = list(dict.fromkeys(c for entry in findings for c in entry))
            parts = [_table(findings, shown or columns)]
            if shown and set(columns) - set(COLUMNS):
                parts.append(details("Everything that was recorded", _table(findings, columns)))
            yield section(TITLES.get(name, name.replace("_", " ")), *parts)


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


def _table(findings: Sequence[Finding], columns: Sequence[str]) -> Html:
    head = [HEADS.get(column, column.replace("_", " ")) for column in columns]
    return table(head, ([_cell(entry.get(column)) for column in columns] for entry in findings))


def _cell(value: Any) -> Any:
    if value and isinstance(value, list) and all(map(_is_cause, value)):
        return "; ".join(map(_cause, value))
    tone = TONES.get(value) if isinstance(value, str) else None
    return Html(f'<span class="{tone}">{text(value)}</span>') if tone else value


def _is_cause(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() >= CAUSE


def _cause(cause: Mapping[str, Any]) -> str:
    return f"{cause['cause']} {outcome(cause)} ({cause['evidence']})"
