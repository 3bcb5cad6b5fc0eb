"""The table of a comparison, for a reader of Markdown and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from llm.compare.settings import EVEN
from llm.compare.summary import Summary
from theory.plotting.style import label
from theory.schedulers import ORDERS
from theory.tables import Strong, Table, markdown_table

TITLES = {"steps": "Equal steps", "compute": "Equal compute"}
COLUMNS = {
    "f_dpo": "f_DPO",
    "f_sft": "f_SFT",
    "gap_dpo": "gap DPO",
    "gap_sft": "gap SFT",
    "ideal_distance": "ideal distance",
    "f_mix": "f_Mix at the weight",
}
HEAD = ("algorithm", "lam or split", "rate", "steps", *COLUMNS.values(), "cost", "s per step")


def markdown(summary: Summary) -> str:
    parts = [f"# Comparison: {summary['problem']}, {summary['seeds']} seeds, 95% t-intervals"]
    parts.append(preamble(summary))
    for title, head, rows in tables(summary):
        parts += [f"## {title}", markdown_table(head, rows)]
    parts.append("\n".join(f"- {warning}" for warning in summary["warnings"]))
    return "\n\n".join(filter(None, parts)) + "\n"


def preamble(summary: Summary) -> str:
    """What all tables share: units, optima, costs, how the learning rates were chosen."""
    optima, costs = summary["optima"], summary["costs"]
    return (
        f"Losses of the {summary['measured_on']} rows in nats; "
        f"f_DPO* = {optima['dpo']:.4f}, f_SFT* = {optima['sft']:.4f} "
        f"({optima['source']}). The weight is lam, or the share of the steps on DPO. A step costs "
        f"{costs['sft_step']:.3g} (SFT), {costs['dpo_step']:.3g} (DPO), a probe of both "
        f"{costs['probe']:.3g} forward passes of an SFT step. Learning rates tuned: "
        f"{summary['tuning']['criterion']}{_rule(summary['tuning'])}."
    )


def tables(summary: Summary) -> Iterator[Table]:
    """Every budget, what the second stage of a sequence forgets, and the tuning."""
    for budget in dict.fromkeys(entry["budget"] for entry in summary["settings"]):
        entries = [entry for entry in summary["settings"] if entry["budget"] == budget]
        yield Table(TITLES[budget], HEAD, list(map(_setting, entries)))
    yield Table(
        "Forgetting in the second stage",
        ("order", "split", "budget", "objective", "end of its stage", "end", "rise"),
        list(map(_forgotten, summary["forgetting"])),
    )
    if summary["tuning"]["lines"]:
        yield _tuning(summary["tuning"])


def _rule(tuning: Summary) -> str:
    if not tuning["least_progress"]:
        return ""
    return (
        f", among the rates that take each objective alone {tuning['least_progress']:.0%} of the "
        "way to f*"
    )


def _setting(entry: Summary) -> list[str]:
    failed = f" ({entry['failed']} failed)" if entry["failed"] else ""
    return [
        label(entry["line"]) + failed,
        knob(entry["line"], entry["knob"]),
        f"{entry['learning_rate']:g}",
        str(entry["num_steps"]),
        *(_cell(entry[name]) for name in COLUMNS),
        _cell(entry["cost"], "{:.0f}"),
        _cell(entry["seconds_per_step"], "{:.4f}"),
    ]


def knob(line: str, value: float | None) -> str:
    """`split 0.5` of an order of sequential training, else `lam 0.5`; a dash without either."""
    if value is None:
        return "-"
    return f"{'split' if line in ORDERS else 'lam'} {value:g}"


def _forgotten(entry: Summary) -> list[str]:
    names = (label(entry["order"]), f"{entry['split']:g}", entry["budget"])
    losses = (entry[key] for key in ("after_first_stage", "after_second_stage", "rise"))
    return [*names, entry["objective"].upper(), *map(_cell, losses)]


def _tuning(tuning: Summary) -> Table:
    """f_Mix at every rate; the chosen one stands out."""
    rates = list(next(iter(tuning["lines"].values()))["f_mix"])
    rows = []
    for line, tuned in tuning["lines"].items():
        chosen = f"{tuning['chosen'][line]:g}"
        cells = {rate: f"{value:.4f}" for rate, value in tuned["f_mix"].items()}
        rows.append([label(line), *(Strong(c) if r == chosen else c for r, c in cells.items())])
    if tuning["progress"]:
        shares = (f"{tuning['progress'].get(rate, 0.0):.0%}" for rate in rates)
        rows.append(["way to f*, alone", *shares])
    return Table(f"Tuning: f_Mix({EVEN}) at each learning rate", ("algorithm", *rates), rows)


def _cell(interval: dict[str, float] | None, form: str = "{:.3f}") -> str:
    """Mean and half-width; without seeds for an interval, the mean alone."""
    if interval is None:
        return "-"
    half = interval["high"] - interval["mean"]
    mean = form.format(interval["mean"])
    return f"{mean} ± {form.format(half)}" if math.isfinite(half) else mean


def report(summary: Summary) -> str:
    """The middle of the table in a terminal, forgetting and warnings."""
    optima = summary["optima"]
    lines = [f"\noptima: f_DPO* {optima['dpo']:.4f}, f_SFT* {optima['sft']:.4f}; at 1/2:"]
    lines.append(f"{'':<14}{'budget':<9}{'rate':>9}{'steps':>7}{'gap DPO':>18}{'gap SFT':>18}"
                 f"{'ideal distance':>18}")  # fmt: skip
    knobs = [entry["knob"] for entry in summary["settings"] if entry["knob"] is not None]
    middle = min(knobs, key=lambda knob: abs(knob - EVEN), default=None)
    lines += [_terminal_line(e) for e in summary["settings"] if e["knob"] in (middle, None)]
    lines += [_forgetting_line(entry) for entry in summary["forgetting"]]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in summary["warnings"])])


def _terminal_line(entry: dict[str, Any]) -> str:
    cells = (_cell(entry[name]) for name in ("gap_dpo", "gap_sft", "ideal_distance"))
    return (
        f"{label(entry['line']):<14}{entry['budget']:<9}{entry['learning_rate']:>9.3g}"
        f"{entry['num_steps']:>7}" + "".join(f"{cell:>18}" for cell in cells)
    )


def _forgetting_line(entry: dict[str, Any]) -> str:
    return (
        f"forgetting, {label(entry['order'])}, split {entry['split']:g}, equal {entry['budget']}: "
        f"f_{entry['objective'].upper()} rises by {_cell(entry['rise'])}"
    )
