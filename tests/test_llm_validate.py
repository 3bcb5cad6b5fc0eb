"""A validation: verdicts on constructed comparisons, their causes, the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from _line import comparison, moved, results
from _tiny import own_sources

from llm.validate.__main__ import main
from llm.validate.predictions import comparison_quantities, lower_bounds, predict
from llm.validate.quantities import measured
from llm.validate.report import markdown
from llm.validate.source import Comparison
from theory.records import read_json


def dear_mix() -> pd.DataFrame:
    frame = results()
    frame.loc[frame["line"] == "mix", "seconds_per_step"] *= 2.0
    return frame


VIOLATIONS = {
    "P1": lambda: moved("mix", lambda lam: 0.9 if lam == 0.5 else lam),
    "P2": lambda: moved("alright", lambda lam: 1.0 - lam),
    "P3": lambda: moved("maxright", lambda lam: 0.5),
    "P4": lambda: moved("mix", lambda lam: 1.3),
    "P5": lambda: moved("maxright", lambda lam: 1.2),
    "P6": dear_mix,
}


def verdicts_of(found: Comparison) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in predict(found, {})}


def test_runs_that_minimise_what_they_should_satisfy_every_prediction(tmp_path: Path) -> None:
    found = verdicts_of(comparison(tmp_path, results()))
    assert {name: entry["verdict"] for name, entry in found.items()} == dict.fromkeys(
        VIOLATIONS, "holds"
    )
    assert all(entry["ruled_out"] == [] for entry in found.values())


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violated_prediction_fails_and_its_causes_are_examined(name: str, tmp_path: Path) -> None:
    entry = verdicts_of(comparison(tmp_path, VIOLATIONS[name]()))[name]
    assert entry["verdict"] == "fails"
    causes = {cause["cause"]: cause["ruled_out"] for cause in entry["ruled_out"]}
    if name == "P6":  # counted in tokens, the costs are in the ratios: the seconds are to blame
        assert causes["other steps than planned"]
        assert causes["load of the machine"]
    else:  # the paths are flat, the rates inside their grid, and nothing is clipped by itself
        assert causes["too few steps"]
        assert causes["learning rate"]
        assert causes["clipping"]


def test_causes_that_nothing_speaks_against_are_not_ruled_out(tmp_path: Path) -> None:
    frame = VIOLATIONS["P3"]()
    tuning = {"chosen": dict.fromkeys(set(frame["line"]), 1e-3), "lines": {}}
    found = comparison(tmp_path, frame, tuning=tuning)
    falling = found.paths.assign(f_sft=found.paths["f_sft"] + 9.0 * (found.paths["step"] == 80))
    falling_runs = Comparison(found.folder, found.command, found.summary, found.results, falling)
    causes = {c["cause"]: c["ruled_out"] for c in verdicts_of(falling_runs)["P3"]["ruled_out"]}
    assert not causes["learning rate"]  # never tuned
    assert not causes["lock-out"]  # values from training batches
    assert not causes["too few steps"]  # f_Mix still falls by nats


def test_quantities_of_a_comparison_meet_the_closed_forms(tmp_path: Path) -> None:
    found = comparison(tmp_path, results())
    by_name = {q.name: q for q in comparison_quantities(found)}
    # -d f_SFT / d f_DPO from x = 1/4 to 1/2: (1/4 - 1/16) / (9/16 - 1/4) = 0.6; jitter moves the
    # changes of 0.4 by about 2e-3.
    slope = by_name["slope, mix lam=0.25 -> 0.5"]
    assert slope.measured == pytest.approx(0.6, abs=0.01)
    assert slope.verdict == "holds"
    line = by_name["slope of log(delta_DPO/delta_SFT) on logit(lam)"]
    assert line.measured == pytest.approx(-1.0, abs=0.01)
    cost = by_name["cost of alright lam=0.5 over mix lam=0.25"]
    assert cost.theory == pytest.approx(0.5)
    assert cost.measured == pytest.approx(0.5, rel=0.01)
    assert all(q.measured < 0.01 for q in lower_bounds(found))


def test_the_command_runs_compares_studies_writes_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = [f"--{name}={source}" for name, source in own_sources(tmp_path).items()]
    shared += ["--use_cpu", "true", "--disable_tqdm", "true", "--max_steps", "6"]
    shared += ["--logging_steps", "1"]
    out = tmp_path / "validate"
    study = ["--comparison", str(tmp_path / "compare"), "--out", str(out), "--study_seeds", "2"]
    study += ["--study_steps", "4", "--periods", "1", "2"]
    study += ["--probe_rows", "6", "--krylov_steps", "2"]
    compare = ["--run", "--lams", "0.3", "0.6", "--splits", "0.5", "--seeds", "2", "--jobs", "1"]
    compare += ["--learning_rates", "1e-2", "--budgets", "steps", *shared]
    main([*study, *compare])
    record = read_json(out / "validation.json")
    assert [entry["name"] for entry in record["predictions"]] == list(VIOLATIONS)
    assert len(record["hypotheses"]) == 9
    sources = {quantity["source"] for quantity in record["quantities"]}
    assert {"P2", "P6", "curvature (T8)", "switches (T7)", "clipping", "lock-out"} <= sources
    for name in ("config.json", "table.md", "validate.png", "validate.svg", "validate.json"):
        assert (out / name).stat().st_size > 0

    def never(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("llm.compare.workers.train", never)
    (out / "validation.json").unlink()
    main(study)
    assert read_json(out / "validation.json") == record


def test_a_finished_comparison_is_judged_without_training_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "compare", tmp_path / "out"
    comparison(folder, VIOLATIONS["P3"]())
    main(["--comparison", str(folder), "--out", str(out), "--studies", "none"])
    assert "fails        P3" in capsys.readouterr().out
    rows = [line for line in (out / "table.md").read_text().splitlines() if line[:1] == "|"]
    judged = [line for line in rows if line.startswith("| P3: ")]
    assert len(judged) == 1
    assert "**fails**" in judged[0]
    panels = {entry["panel"] for entry in read_json(out / "validate.json")["numbers"]}
    assert panels == {"(a)"}  # the panels of the studies are empty


def test_the_table_escapes_the_bars_of_absolute_values() -> None:
    quantity = measured("T8", "|grad f|", 1.0, [1.0, 2.0])
    record = {"problem": "x", "predictions": [], "hypotheses": [], "quantities": [vars(quantity)]}
    record["measured_on"] = "held-out"
    assert r"| T8 | \|grad f\| | 1 | 1.5 [-4.85, 7.85] |" in markdown(record)
