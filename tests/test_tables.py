"""Tables of Markdown: the recorded ones are what the recorded numbers say; cells stay cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import llm.benchmark.report
import llm.compare.table
import llm.validate.report
from llm.report.comparison import read_summary
from theory.records import read_json
from theory.tables import Strong, markdown_table

FIGURES = Path(__file__).parents[1] / "figures"
COMPARISON = (read_summary, llm.compare.table.markdown)
VALIDATION = (lambda folder: read_json(folder / "validation.json"), llm.validate.report.markdown)
BENCHMARK = (lambda folder: read_json(folder / "benchmark.json"), llm.benchmark.report.table)
RECORDED: dict[str, Any] = {
    "compare": COMPARISON,
    "data/tinystories/compare": COMPARISON,
    "validate": VALIDATION,
    "data/tinystories/validate": VALIDATION,
    "llm_benchmark": BENCHMARK,
}
PREAMBLE = 4
"""Lines of title and units, whose words may change."""


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_table_is_what_its_numbers_say(name: str) -> None:
    read, write = RECORDED[name]
    written = write({"measured_on": "held-out"} | read(FIGURES / name)).splitlines()
    recorded = (FIGURES / name / "table.md").read_text().splitlines()
    assert written[PREAMBLE:] == recorded[PREAMBLE:]


def test_no_text_ends_its_cell() -> None:
    rows = [["|x|\n| y", Strong("1.5")], ["", "*"]]
    table = markdown_table(("a", "b"), rows)
    expected = ["| a | b |", "| --- | --- |", r"| \|x\| \| y | **1.5** |", "|  | * |"]
    assert table.splitlines() == expected
