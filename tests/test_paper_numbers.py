"""The published numbers: consistent with one another, and what the six predictions say of them."""

from __future__ import annotations

import numpy as np
import pytest

from theory.predictions.end_points import end_points, excess, mix_metric
from theory.predictions.paper_numbers import (
    ALRIGHT_EXCESS,
    GAPS,
    LAM,
    ROUNDING,
    paper_verdicts,
    table,
)


def test_the_published_numbers_are_consistent_with_one_another() -> None:
    for gaps in GAPS.values():
        # Both gaps and the distance are rounded; the distance moves at most as far as the gaps.
        assert np.hypot(gaps.dpo, gaps.sft) == pytest.approx(gaps.ideal_distance, abs=3 * ROUNDING)


def test_what_the_published_numbers_say() -> None:
    by_key = {v.prediction: v for v in paper_verdicts()}
    assert {key: v.outcome for key, v in by_key.items()} == {
        "P1": "fails",
        "P2": "fails",
        "P3": "fails",
        "P4": "holds",
        "P5": "fails",
        "P6": "not decided",
    }
    assert any("published fact" in claim for claim in by_key["P1"].violated)
    assert by_key["P2"].margin == ALRIGHT_EXCESS.mean
    assert (by_key["P2"].low, by_key["P2"].high) == pytest.approx((-0.06, -0.04))
    assert by_key["P3"].margin == pytest.approx(-0.76)
    assert "times to a target" in by_key["P6"].note


def test_the_published_margins_follow_from_the_published_gaps() -> None:
    points = {p.algorithm: p for p in end_points(table())}
    for rival in ("mix", "maxright"):
        margin = excess(points[rival], points["alright"], mix_metric(LAM))
        direct = np.mean(GAPS[rival][:2]) - np.mean(GAPS["alright"][:2])
        assert margin.mean == pytest.approx(direct)
        assert margin.bound == pytest.approx(2 * ROUNDING)
