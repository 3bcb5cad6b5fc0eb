"""The table of a validation: prediction, theory's number, measured, verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from theory.tables import Strong, markdown_table

Entry = Mapping[str, Any]


def markdown(record: dict[str, Any]) -> str:
    """The whole of validation.json as Markdown."""
    failures = [
        f"- {entry['name']} fails; {cause['cause']}: {outcome(cause)} ({cause['evidence']})"
        for entry in record["predictions"]
        for cause in entry["ruled_out"]
    ]
    parts = [
        f"# Validation of {record['problem']}",
        "Intervals are Student's t over seeds. Margins of predictions: one-sided 95% limits, the "
        "upper one corrected for the number of claims; losses are those of the "
        f"{record['measured_on']} rows, in nats.",
        *_titled("Predictions", ("prediction", "theory", "margin", "verdict", "deciding claim"),
                 map(_prediction, record["predictions"])),
        *failures,
        *_titled("Hypotheses", ("hypothesis", "theory", "measured", "verdict", "seeds"),
                 map(_hypothesis, record["hypotheses"])),
        *_titled("Theory's numbers and the measured ones",
                 ("source", "quantity", "theory", "measured", "verdict", "note"),
                 map(_quantity, record["quantities"])),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _titled(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> tuple[str, str]:
    return f"## {title}", markdown_table(head, rows)


def _prediction(entry: Entry) -> list[str]:
    return [*_judged(entry), entry["claim"] or entry["note"]]


def _hypothesis(entry: Entry) -> list[str]:
    return [*_judged(entry), str(entry["seeds"])]


def _judged(entry: Entry) -> list[str]:
    verdict = entry["verdict"]
    shown = Strong(verdict) if verdict == "fails" else verdict
    return [f"{entry['name']}: {entry['statement']}", entry["theory"], _interval(entry), shown]


def _quantity(entry: Entry) -> list[str]:
    theory = entry["theory"]
    theory = theory if isinstance(theory, str) else f"{theory:.3g}"
    measured = (_interval(entry), entry["verdict"], entry["note"])
    return [entry["source"], entry["name"], theory, *measured]


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


def outcome(cause: Entry) -> str:
    """Whether a failure may be due to one of the causes of `llm.validate.causes`."""
    return "ruled out" if cause["ruled_out"] else "not ruled out"


def _interval(entry: Entry) -> str:
    low, high = entry["interval"] if "interval" in entry else (entry["low"], entry["high"])
    return interval_text(entry["measured"], low, high)


def interval_text(mean: float | None, low: float | None, high: float | None) -> str:
    """`0.12 [0.10, 0.14]`; without a mean `-`, without an interval the mean alone."""
    if mean is None or not math.isfinite(mean):
        return "-"
    ends = ["∞" if x is None or math.isinf(x) else f"{x:.3g}" for x in (low, high)]
    ends[0] = f"-{ends[0]}" if ends[0] == "∞" else ends[0]
    return f"{mean:.3g} [{ends[0]}, {ends[1]}]"
