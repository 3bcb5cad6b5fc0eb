"""The HTML page: whole, self-contained, escaped, and with the numbers that were recorded."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _text import write_jsonl
from _tiny import TOKENIZER, make_policy, short_run

from llm.compare.__main__ import main as compare
from llm.data import embedded
from llm.flags.parse import parse
from llm.report.__main__ import FILE, main, report
from llm.report.command import OTHERWISE, command
from llm.report.figures import curve, decisions_figure, dpo_shares, losses_figure, window_means
from llm.report.page import drawn, environment
from llm.report.record import read_run
from llm.run import CONFIG_FILE
from llm.run import main as run
from llm.train.free import NOT_PART_OF_A_RUN
from theory.tables import Strong

VOID = {"meta", "link", "br", "img", "hr"}
NASTY = "<script>alert('x')</script> & \"quoted\""


class Page(HTMLParser):
    """Collects what a page says, and complains about elements that do not close."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        (found,) = [row for row in self.rows if row and row[0] == name]
        return found[1:]


def assert_self_contained(source: str, page: Page) -> None:
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe")]
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href"):
                assert str(value).startswith("#"), (tag, value)
    assert not re.search(r"url\((?!#)|@import", source)
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))  # the drawings do not take each other's definitions
    used = re.findall(r"url\(#([^)]*)\)|href=\"#([^\"]*)\"", source)
    assert {first or second for first, second in used} <= set(names)


# -------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs of several kinds, the same one as if killed, and one that has just begun."""
    root = tmp_path_factory.mktemp("runs")
    (root / "optima.json").write_text('{"dpo": 0.3, "sft": 0.1}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm.data.embedded.BASE_STEPS", 4)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", root / "cache")
        optima = ("--optima", str(root / "optima.json"))
        flags = (*optima, "--refresh_every", "3", "--save_strategy", "steps", "--save_steps", "4")
        run(short_run(root / "maxright", "--algo", "maxright", *flags))
        run(short_run(root / "sequential", "--algo", "sequential", "--optima", "none"))
        _own_data(root)
    killed = shutil.copytree(root / "maxright", root / "killed")
    for name in ("joint_summary.json", "schedule.json", "README.md"):
        (killed / name).unlink()
    shutil.rmtree(killed / "checkpoint-8")
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "dpo_lo')
    (root / "begun").mkdir()
    shutil.copy(root / "maxright" / CONFIG_FILE, root / "begun")
    return {path.name: path for path in root.iterdir() if path.is_dir()}


def _own_data(root: Path) -> None:
    """A run on files whose names are markup, with rows that are dropped."""
    make_policy().save_pretrained(root / "model")
    TOKENIZER.save_pretrained(root / "model")
    corpus = embedded.generate_corpus(train_rows=40, eval_rows=10)
    rows = [*corpus.sft_train, {"prompt": "a lamp", "completion": " "}]
    data = root / "<img src=x onerror=alert(1)>"
    data.mkdir()
    flags = ["--model_name_or_path", str(root / "model"), "--sft_dataset"]
    flags += [write_jsonl(data / "sft.jsonl", rows), "--max_steps", "4", "--algo", "sft"]
    flags += ["--max_dropped_share", "0.5", "--use_cpu", "true", "--disable_tqdm", "true"]
    flags += ["--report_to", "none", "--save_strategy", "no", "--output_dir", str(root / "own")]
    run(flags)


@lru_cache
def source_of(folder: Path) -> str:
    return report(folder)


def page_of(folder: Path) -> Page:
    return Page(source_of(folder))


@pytest.mark.parametrize("name", ["maxright", "sequential", "own", "killed", "begun"])
def test_the_page_is_whole_and_needs_nothing_else(name: str, runs: dict[str, Path]) -> None:
    source = source_of(runs[name])
    assert source.startswith("<!DOCTYPE html>")
    assert_self_contained(source, Page(source))


def test_the_page_has_the_numbers_of_the_summary(runs: dict[str, Path]) -> None:
    summary = json.loads((runs["maxright"] / "joint_summary.json").read_text())
    page = page_of(runs["maxright"])
    before, after = (summary["held_out"][moment]["sft_loss"] for moment in ("before", "after"))
    shown = [f"{value:.4g}" for value in (before, after, 0.1, after - 0.1)]
    assert page.row("f_SFT (nats/token)") == shown
    distance = summary["combined"]["after"]["ideal_distance"]
    assert page.row("ideal distance")[1] == f"{distance:.4g}"
    for task in ("dpo", "sft"):
        counts = (summary["steps"][task], summary["tokens"][task])
        assert page.row(task.upper())[:2] == [str(count) for count in counts]
    assert f"{summary['probes']} probes" in page.text
    assert "by MAXRIGHT, lam 0.5" in page.text
    assert "Unfinished" not in page.text


def test_dropped_rows_are_told_with_their_reason_and_their_file(runs: dict[str, Path]) -> None:
    page = page_of(runs["own"])
    source, total, kept, truncated, dropped, _ = page.row("sft train")
    held_out = page.row("sft held-out")
    assert source.endswith("sft.jsonl")
    assert int(total) + int(held_out[1]) == 41
    assert int(dropped) + int(held_out[4]) == 1
    assert int(kept) == int(total) - int(dropped)
    assert truncated == "0"
    assert "1 dropped, empty response" in page.text
    assert "preferences" not in page.text  # nothing was trained on them
    assert "onerror=alert(1)" in page.text
    assert "<img" not in source_of(runs["own"])


def test_a_killed_run_gets_a_page_that_says_so(runs: dict[str, Path]) -> None:
    page = page_of(runs["killed"])
    assert "Unfinished: no summary was written; the last log line is of step 8 of 8." in page.text
    assert "As of the newest checkpoint." in page.text
    state = read_run(runs["killed"]).state
    assert state is not None
    assert len(state["decisions"]) == 4  # of checkpoint-4
    assert page.row("DPO")[0] == str(state["steps_taken"]["dpo"])
    assert "the last log line is of step 0 of 8" in page_of(runs["begun"]).text


def test_probes_are_where_the_schedule_makes_them(runs: dict[str, Path]) -> None:
    record = read_run(runs["maxright"])
    assert record.probes == [0, 3, 6]
    assert record.state is not None
    assert record.probes == record.state["probed_at"]
    assert read_run(runs["sequential"]).probes == []


def test_a_schedule_is_called_what_the_record_calls_it(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(runs["own"], tmp_path / "own")
    summary = json.loads((folder / "joint_summary.json").read_text())
    summary["schedule"] = {"label": NASTY, "description": "every step on SFT"}
    (folder / "joint_summary.json").write_text(json.dumps(summary))
    assert page_of(runs["own"]).text.count("own: SFT alone") == 2
    page = page_of(folder)
    assert page.text.count(f"own: {NASTY}") == 2
    assert "Schedule: every step on SFT." in page.text


@pytest.mark.parametrize("name", ["maxright", "sequential", "own"])
def test_the_shown_command_means_the_same_run(name: str, runs: dict[str, Path]) -> None:
    record = read_run(runs[name])
    words = shlex.split(command(record).replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "llm.run"]
    again = parse([*words[3:], "--output_dir", str(runs[name])])
    training = json.loads(json.dumps(again.training.to_dict(), default=str))
    differing = {
        key
        for key, value in record.training.items()
        if key not in NOT_PART_OF_A_RUN and training[key] != value
    }
    assert differing <= OTHERWISE
    assert again.data.sft_dataset == record.config["data"]["sft_dataset"]


# -------------------------------------------------------------------------------------- comparisons


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of one algorithm and one seed: its intervals have no ends."""
    out = tmp_path_factory.mktemp("comparison") / "compared"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm.data.embedded.BASE_STEPS", 4)
        flags = ["--algos", "alright", "mix", "--lams", "0.5", "--seeds", "1", "--jobs", "1"]
        flags += ["--learning_rates", "1e-3", "--max_steps", "4", "--eval_steps", "2"]
        flags += ["--max_train_rows", "40", "--max_eval_rows", "12", "--use_cpu", "true"]
        compare([*flags, "--out", str(out)])
    return out


def test_the_page_of_a_comparison_has_its_table_and_figures(comparison: Path) -> None:
    page = page_of(comparison)
    assert_self_contained(source_of(comparison), page)
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 3
    summary = json.loads((comparison / "summary.json").read_text())
    for entry in summary["settings"]:
        shown = f"{entry['f_sft']['mean']:.3f}"
        assert any(shown in row for row in page.rows), entry
    assert all(warning in page.text for warning in summary["warnings"])
    assert "on the embedded problem" in page.text
    assert "(one seed: no intervals)" in page.text
    assert "No run failed." in page.text
    assert "None yet: python -m llm.validate" in page.text


def test_a_comparison_tells_rivals_failures_and_every_text_as_it_is(
    comparison: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(comparison, tmp_path / "changed")
    summary = json.loads((folder / "summary.json").read_text())
    (best, rival), far = summary["settings"][:2], summary["settings"][0] | {"knob": 0.9}
    best["ideal_distance"] = {"mean": 0.1, "low": 0.0, "high": 0.2}
    rival["ideal_distance"] = {"mean": 0.3, "low": 0.19, "high": 0.41}
    far["ideal_distance"] = {"mean": 0.5, "low": 0.4, "high": 0.6}
    summary |= {"settings": [best, rival, far], "problem": NASTY, "warnings": [NASTY]}
    summary["failures"] = [{"stage": "tuning", "run": "mix-0.5", "reason": NASTY}]
    (folder / "summary.json").write_text(json.dumps(summary))
    page = page_of(folder)
    assert "0.1 ± 0.1 away (the intervals of 1 other setting overlap with it)." in page.text
    assert page.row("mix-0.5") == ["tuning", NASTY]
    assert page.text.count(NASTY) == 3
    assert "<script" not in source_of(folder)


def test_an_unfinished_comparison_shows_the_runs_it_kept(comparison: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(comparison, tmp_path / "killed")
    (folder / "summary.json").unlink()
    page = page_of(folder)
    kept = len(list((folder / "runs").glob("*/result.json")))
    assert f"Unfinished: {kept} runs are kept" in page.text
    assert len(page.rows) == kept + 1


def test_the_verdicts_of_a_validation_are_shown(runs: dict[str, Path], tmp_path: Path) -> None:
    found = tmp_path / "validation.json"
    causes = [
        {"cause": "clipping", "ruled_out": True, "evidence": "shift 0"},
        {"cause": "few steps", "ruled_out": False, "evidence": "still falling"},
    ]
    findings = {
        "predictions": [
            {"name": "P1", "statement": NASTY, "interval": [0.1, 0.25], "verdict": "holds"},
            {"name": "P2", "verdict": "fails", "ruled_out": causes},
        ],
        "quantities": [],
        "hypotheses": [{"name": "H1", "low": None, "high": 2.0, "verdict": "", "draws": 77}],
    }
    found.write_text(json.dumps(findings))
    source = report(runs["begun"], found)
    page = Page(source)
    assert page.row("P1") == [NASTY, "0.1 to 0.25", "holds", "-"]
    told = "clipping ruled out (shift 0); few steps not ruled out (still falling)"
    assert page.row("P2") == ["-", "-", "fails", told]
    shown, everything = (row for row in page.rows if row[0] == "H1")
    assert shown == ["H1", "-∞ to 2"]
    assert everything == ["H1", "", "77", "-∞ to 2"]
    assert '<span class="bad">fails</span>' in source
    assert "Quantities" not in page.text


# -------------------------------------------------------------------------------------- the command


def test_the_page_is_written_where_it_is_asked_for(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(runs["sequential"])])
    out = tmp_path / "new" / "page.html"
    main([str(runs["sequential"]), "--out", str(out)])
    assert (runs["sequential"] / FILE).read_text() == out.read_text()
    assert str(out) in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]


# ------------------------------------------------------------------------- pieces of page and plots


@pytest.mark.parametrize("value", [NASTY, [NASTY], {NASTY: NASTY}, ["a", {"b": NASTY}]])
def test_every_kind_of_value_is_escaped_everywhere(value: Any) -> None:
    source = """{% from "parts.html.jinja" import details, figure, table %}
    {{ table((nasty, value), [(nasty, value), (strong, nasty)], {nasty: nasty}) }}
    {% call details(nasty) %}{{ value }}{% endcall %}
    {% call figure(drawing) %}{{ value }}{% endcall %}"""
    content = {"nasty": NASTY, "strong": Strong(NASTY), "drawing": drawn(losses_figure([]))}
    html = environment().from_string(source).render(value=value, **content)
    page = Page(html)
    assert "<script" not in html
    assert page.text.count(NASTY) >= 9
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags
    assert tags.count("strong") == 1


def test_columns_of_numbers_stand_to_the_right() -> None:
    table = environment().get_template("parts.html.jinja").module.table
    rows = [("a", 1.5, "2 ± 0.1", "x" * 30), ("b", None, Strong("3"), "-")]
    page = Page(table(("name", "n", "m", "text"), rows))
    assert page.rows == [["name", "n", "m", "text"], ["a", "1.5", "2 ± 0.1", "x" * 30],
                         ["b", "-", "3", "-"]]  # fmt: skip
    classes = [attributes.get("class") for tag, attributes in page.tags if tag in ("td", "th")]
    assert classes == 3 * ["short", "number", "number", None]


def test_windows_weigh_to_the_mean_of_all_steps() -> None:
    values = np.random.default_rng(0).random(137)
    edges, means = window_means(values, 40)
    sizes = np.diff(edges)
    assert (edges[0], edges[-1], len(means)) == (0, 137, 40)
    assert sizes.max() - sizes.min() <= 1
    assert np.average(means, weights=sizes) == pytest.approx(values.mean(), abs=1e-12)
    assert window_means(values[:3], 40)[1].tolist() == values[:3].tolist()


def test_the_share_of_dpo_is_its_share_of_the_weights() -> None:
    decisions = [[0.3, 0.7], [1.0, 0.0], [0.0, 2.0], [2.0, 0.0]]
    np.testing.assert_allclose(dpo_shares(decisions), [0.3, 1.0, 0.0, 1.0])
    axis = decisions_figure(decisions, probes=[0, 2]).axes[0]
    (ticks,) = [line for line in axis.lines if line.get_marker() == "|"]
    assert list(ticks.get_xdata()) == [0, 2]


def test_a_curve_has_the_later_of_two_values_and_no_value_that_is_none() -> None:
    lines: list[dict[str, Any]] = [
        {"step": 4, "x": 1.0},
        {"step": 2, "x": 3.0},
        {"step": 4, "x": 2.0},
        {"step": 6, "x": math.nan},
        {"step": 8},
    ]
    steps, values = curve(lines, "x")
    assert (steps.tolist(), values.tolist()) == ([2.0, 4.0], [3.0, 2.0])
