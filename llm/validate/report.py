"""The table of a validation: prediction, theory's number, measured, verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any


def markdown(record: dict[str, Any]) -> str:
    """The whole of validation.json as Markdown."""
    return "\n".join([*_lines(record), ""])


def _lines(record: dict[str, Any]) -> Iterator[str]:
    yield f"# Validation of {record['problem']}\n"
    yield (
        "Intervals are Student's t over seeds. Margins of predictions: one-sided 95% limits, the "
        "upper one corrected for the number of claims; losses are those of the "
        f"{record['measured_on']} rows, in nats.\n"
    )
    yield "## Predictions\n"
    yield from _head("prediction", "theory", "margin", "verdict", "deciding claim")
    for entry in record["predictions"]:
        name = f"{entry['name']}: {entry['statement']}"
        claim = entry["claim"] or entry["note"]
        yield _row(name, entry["theory"], _interval(entry), _bold(entry["verdict"]), claim)
    for entry in record["predictions"]:
        for cause in entry["ruled_out"]:
            told = f"{cause['cause']}: {outcome(cause)} ({cause['evidence']})"
            yield f"\n- {entry['name']} fails; {told}"
    yield "\n## Hypotheses\n"
    yield from _head("hypothesis", "theory", "measured", "verdict", "seeds")
    for entry in record["hypotheses"]:
        name = f"{entry['name']}: {entry['statement']}"
        verdict = _bold(entry["verdict"])
        yield _row(name, entry["theory"], _interval(entry), verdict, str(entry["seeds"]))
    yield "\n## Theory's numbers and the measured ones\n"
    yield from _head("source", "quantity", "theory", "measured", "verdict", "note")
    for entry in record["quantities"]:
        cells = (_theory(entry["theory"]), _interval(entry), entry["verdict"], entry["note"])
        yield _row(entry["source"], entry["name"], *cells)


def summary_lines(record: dict[str, Any]) -> str:
    """Verdicts for the terminal."""
    lines = []
    for entry in [*record["predictions"], *record["hypotheses"]]:
        name = entry["name"] if len(entry["name"]) > 2 else f"{entry['name']}  {entry['statement']}"
        lines.append(f"{entry['verdict']:<12} {name}")
        lines[-1] += f": {_interval(entry)}"
        for cause in entry.get("ruled_out", ()):
            lines.append(f"{'':<12}   {cause['cause']} {outcome(cause)}: {cause['evidence']}")
    return "\n".join(lines)


def outcome(cause: Mapping[str, Any]) -> str:
    """Whether a failure may be due to one of the causes of `llm.validate.causes`."""
    return "ruled out" if cause["ruled_out"] else "not ruled out"


def _head(*names: str) -> tuple[str, str]:
    return _row(*names), _row(*("---" for _ in names))


def _row(*cells: str) -> str:
    # A | of an absolute value would end the cell.
    escaped = (cell.replace("|", r"\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _bold(verdict: str) -> str:
    return f"**{verdict}**" if verdict == "fails" else verdict


def _theory(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


def _interval(entry: dict[str, Any]) -> str:
    low, high = entry["interval"] if "interval" in entry else (entry["low"], entry["high"])
    return interval_text(entry["measured"], low, high)


def interval_text(mean: float | None, low: float | None, high: float | None) -> str:
    """`0.12 [0.10, 0.14]`; without a mean `-`, without an interval the mean alone."""
    if mean is None or not math.isfinite(mean):
        return "-"
    ends = ["∞" if x is None or math.isinf(x) else f"{x:.3g}" for x in (low, high)]
    ends[0] = f"-{ends[0]}" if ends[0] == "∞" else ends[0]
    return f"{mean:.3g} [{ends[0]}, {ends[1]}]"
