"""llm.compare without training: what is run, at which rate and budget, and what is made of it.

`Pretend` answers every run with a record that follows from the run by a formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from llm.compare.cost import CostModel
from llm.compare.plan import (
    Experiment,
    choose_rates,
    equal_compute,
    find_optima,
    progress_of,
    run_tuning,
)
from llm.compare.results import (
    comparison_table,
    paths_table,
    predictions_optima,
    predictions_table,
    tuning_table,
    weight_of,
)
from llm.compare.runs import Record, Run, line_run
from llm.compare.settings import CompareConfig, parse
from llm.compare.summary import summarise
from llm.compare.table import markdown, report
from theory.cli import UserError
from theory.costs import Costs
from theory.predictions import verdicts
from theory.schedulers import ORDERS
from theory.tasks import Task

PAIR = 1.5
COSTS = CostModel(Costs(sft=3.0, dpo=3.0 * PAIR, probe=1.0 + PAIR), reuse=True, pair=PAIR)
OPTIMUM = (0.3, 0.1)
STEPS = 40
PERIOD = 10


def dpo_steps(run: Run) -> int:
    return run.steps if run.algorithm in ("mix", "dpo") else round(weight_of(run) * run.steps)


def pretend(run: Run) -> Record:
    """Losses that fall with the weight of their objective; the best rate is 1e-2 for every line.

    Counts as a trainer would have them. Runs on one objective reach `OPTIMUM` at rates above 1e-3.
    """
    record: Record = {"run": asdict(run), "failed": None, "held_out": {}, "stage_end": None}
    if run.algorithm in ("dpo", "sft"):
        start, best = 0.7, OPTIMUM[Task[run.algorithm.upper()]]
        end = best if run.learning_rate > 1e-3 else 0.5 * (start + best)
        names = [f"f_{task.label}" for task in Task]
        path = [dict.fromkeys(names, start) | {"step": 0}, dict.fromkeys(names, end) | {"step": 1}]
        return record | {"path": path, **dict.fromkeys(names, end)}
    weight = weight_of(run)
    off = 0.01 * abs(math.log10(run.learning_rate / 1e-2)) + 1e-3 * run.seed % 0.01
    losses = {"f_dpo": 0.9 - 0.5 * weight + off, "f_sft": 0.3 + 0.5 * weight + off}
    dpo = dpo_steps(run)
    steps = {"dpo": dpo, "sft": run.steps if run.algorithm == "mix" else run.steps - dpo}
    if run.line in ORDERS:
        first = f"f_{ORDERS[run.line][0].label}"
        record["stage_end"] = {first: losses[first] - 0.25}
    return record | losses | {
        "path": [losses | {"step": 0}, losses | {"step": run.steps}],
        "steps": steps,
        "tokens": {"dpo": 15 * steps["dpo"], "sft": 10 * steps["sft"]},
        "rows": {"dpo": 2 * steps["dpo"], "sft": 2 * steps["sft"]},
        "probes": math.ceil(run.steps / PERIOD) if run.algorithm == "maxright" else 0,
        "probe_dpo_wins": round(weight * math.ceil(run.steps / PERIOD))
        if run.algorithm == "maxright"
        else 0,
        "seconds": 0.01 * run.steps,
    }  # fmt: skip


class Pretend:
    def __init__(self, answer: Callable[[Run], Record] = pretend) -> None:
        self.answer, self.seen = answer, [] if answer is None else list[tuple[str, Run]]()

    def run(self, stage: str, runs: Sequence[Run]) -> list[Record]:
        self.seen += [(stage, run) for run in runs]
        return [self.answer(run) for run in runs]


@pytest.fixture
def config(tmp_path: Path) -> CompareConfig:
    flags = ["--use_cpu", "true", "--learning_rates", "1e-3", "1e-2", "1e-1"]
    return parse([*flags, "--out", str(tmp_path), "--max_steps", str(STEPS)])


def experiment(config: CompareConfig, answer: Callable[[Run], Record] = pretend) -> Experiment:
    pool = Pretend(answer)
    singles, optimum = find_optima(config, None, pool, STEPS)  # type: ignore[arg-type]
    tuning = run_tuning(config, pool, STEPS, optimum)
    progress = progress_of(singles, optimum)
    rates = choose_rates(config, tuning, progress)
    runs = [
        line_run(
            *(config.algorithm_of[line], line, knob, optimum),
            steps=STEPS,
            learning_rate=rates[line],
            seed=seed,
        )
        for line in config.lines
        for knob in config.knobs(line)
        for seed in config.seeds
    ]
    by_steps = pool.run("equal steps", runs)
    planned = equal_compute(by_steps, COSTS, STEPS, {"refresh_every": PERIOD})
    by_compute = pool.run("equal compute", planned)
    both = {"steps": tuple(by_steps), "compute": tuple(by_compute)}
    return Experiment(optimum, STEPS, singles, progress, tuning, rates, both, COSTS)


# --- optima and tuning


def test_the_optimum_is_the_lowest_loss_along_any_run_on_that_objective_alone(
    config: CompareConfig,
) -> None:
    def dips(run: Run) -> Record:
        record = pretend(run)
        if run.algorithm == "dpo" and run.learning_rate == 1e-2:
            record["path"].insert(1, {"f_dpo": 0.2, "f_sft": 0.0, "step": 1})
        return record

    singles, optimum = find_optima(config, None, Pretend(dips), STEPS)  # type: ignore[arg-type]
    assert optimum == (0.2, OPTIMUM[Task.SFT])  # f_SFT = 0 was met by a run on DPO: no estimate
    assert len(singles) == 2 * len(config.learning_rates)


def test_a_file_of_optima_spares_the_single_runs(config: CompareConfig, tmp_path: Path) -> None:
    (tmp_path / "optima.json").write_text('{"dpo": 0.25, "sft": 0.05}')
    config.run.training.optima = str(tmp_path / "optima.json")
    pool = Pretend()
    assert find_optima(config, None, pool, STEPS) == ((), (0.25, 0.05))  # type: ignore[arg-type]
    assert not pool.seen


def test_every_line_is_tuned_over_the_same_grid_on_seeds_of_its_own(config: CompareConfig) -> None:
    pool = Pretend()
    run_tuning(config, pool, STEPS, OPTIMUM)
    runs = [run for _, run in pool.seen]
    for line in config.lines:
        own = [run for run in runs if run.line == line]
        assert [run.learning_rate for run in own] == list(config.learning_rates)
        assert {run.knob for run in own} == {0.5}
        assert {run.steps for run in own} == {STEPS}
    assert not {run.seed for run in runs} & set(config.seeds)
    assert {run.optimum for run in runs if run.algorithm == "maxright"} == {OPTIMUM}
    assert {run.optimum for run in runs if run.algorithm != "maxright"} == {None}


def test_the_rate_with_the_lowest_f_mix_wins(config: CompareConfig) -> None:
    assert set(experiment(config).rates.values()) == {1e-2}


def test_a_rate_that_does_not_train_cannot_win(config: CompareConfig) -> None:
    """At 1e-3 a run on one objective goes half of the way to f* (see `pretend`)."""

    def lazy(run: Run) -> Record:
        record = pretend(run)
        if run.learning_rate == 1e-3 and run.algorithm not in ("dpo", "sft"):
            record |= {"f_dpo": 0.0, "f_sft": 0.0}
        return record

    tried = experiment(config, lazy)
    assert tried.progress == pytest.approx({1e-3: 0.5, 1e-2: 1.0, 1e-1: 1.0})
    assert set(tried.rates.values()) == {1e-2}
    summary = summarise(config, tried, comparison_table(config, tried))
    assert sum("only 50% of the way" in warning for warning in summary["warnings"]) == 5
    unrestricted = replace(config, least_progress=0.0)
    assert set(experiment(unrestricted, lazy).rates.values()) == {1e-3}
    impossible = experiment(replace(config, least_progress=1.0), lambda run: lazy(run) | {
        "path": [{"f_dpo": 0.7, "f_sft": 0.7}, {"f_dpo": 0.5 + run.learning_rate, "f_sft": 0.6 -
        run.learning_rate}]} if run.algorithm in ("dpo", "sft") else lazy(run))  # fmt: skip
    assert set(impossible.rates.values()) == {1e-3}  # no rate passes, so all count


def failing(where: Callable[[Run], bool]) -> Callable[[Run], Record]:
    def answer(run: Run) -> Record:
        return {"run": asdict(run), "failed": "the loss is nan"} if where(run) else pretend(run)

    return answer


def test_a_rate_that_diverges_loses_and_all_of_them_are_an_error(config: CompareConfig) -> None:
    joint = failing(lambda r: r.learning_rate == 1e-2 and r.line in ("mix", "alright", "maxright"))
    rates = experiment(config, joint)
    assert {rates.rates[line] for line in ORDERS} == {1e-2}
    assert {rates.rates[line] for line in ("mix", "alright", "maxright")} == {1e-1}
    with pytest.raises(UserError, match="mix diverged at every learning rate"):
        experiment(config, failing(lambda run: run.algorithm == "mix"))
    with pytest.raises(UserError, match="one objective diverged at every learning rate"):
        experiment(config, failing(lambda run: run.algorithm == "sft"))


# --- budgets


def test_equal_compute_spends_what_sequential_training_spends(config: CompareConfig) -> None:
    """Counted from the steps and probes of each run, to half a step (and half a probe) of its."""
    budget = STEPS * (COSTS.step(Task.DPO) + COSTS.step(Task.SFT)) / 2
    for record in experiment(config).runs["compute"]:
        run = Run.from_json(record["run"])
        # `pretend` rounds the DPO steps of a run, and probes come in whole numbers.
        slack = COSTS.step(Task.DPO) + COSTS.costs.probe
        assert COSTS.total(record) == pytest.approx(budget, abs=slack), run.label


def test_only_runs_that_another_budget_changes_are_run_again(config: CompareConfig) -> None:
    tried = experiment(config)
    steps, compute = ({Run.from_json(r["run"]) for r in tried.runs[b]} for b in tried.runs)
    shared = {(run.line, run.knob) for run in steps & compute}
    assert {("dpo_then_sft", 0.5), ("sft_then_dpo", 0.5), ("alright", 0.5)} <= shared
    assert not {line for line, _ in shared} & {"mix"}
    mix = {run.steps for run in compute if run.algorithm == "mix"}
    assert mix == {STEPS // 2}  # a step of Mix costs what two steps of the sequence cost


# --- tables


def test_the_table_holds_gaps_and_the_rise_of_the_first_objective(config: CompareConfig) -> None:
    table = comparison_table(config, experiment(config)).set_index(["budget", "line", "knob"])
    row = table.loc[("steps", "sft_then_dpo", 0.25)].iloc[0]
    assert row["weight"] == 0.75
    gaps = row[["gap_dpo", "gap_sft"]].to_numpy(dtype=float)
    np.testing.assert_allclose(gaps, [row["f_dpo"] - 0.3, row["f_sft"] - 0.1])
    assert row["ideal_distance"] == pytest.approx(np.hypot(*gaps))
    assert row["f_mix"] == pytest.approx(0.75 * row["f_dpo"] + 0.25 * row["f_sft"])
    assert row["rise"] == pytest.approx(0.25)
    assert table.loc[("steps", "mix", 0.5), "rise"].isna().all()


def test_failed_runs_are_counted_and_not_averaged(config: CompareConfig) -> None:
    broken = failing(lambda run: run.line == "mix" and run.knob == 0.25 and run.seed == 1)
    tried = experiment(config, broken)
    results = comparison_table(config, tried)
    summary = summarise(config, tried, results)
    entry = summary["settings"][6]
    assert (entry["line"], entry["knob"], entry["seeds"], entry["failed"]) == ("mix", 0.25, 2, 1)
    assert entry["f_dpo"]["mean"] == pytest.approx(
        np.mean([pretend(replace(Run.from_json(r["run"]), seed=s))["f_dpo"]
                 for r in tried.runs["steps"][18:19] for s in (0, 2)])
    )  # fmt: skip
    assert summary["failures"][0]["reason"] == "the loss is nan"
    assert "(1 failed)" in markdown(summary)
    assert predictions_table(results)["f_dpo"].notna().all()


def test_the_summary_states_forgetting_undercut_optima_and_the_border(
    config: CompareConfig,
) -> None:
    low = replace(config, learning_rates=(1e-2, 1e-1))
    tried = experiment(low, lambda run: pretend(run) | (
        {"f_sft": 0.08} if run.line == "alright" and run.knob == 0.25 else {}))  # fmt: skip
    summary = summarise(low, tried, comparison_table(low, tried))
    rises = [entry["rise"]["mean"] for entry in summary["forgetting"]]
    assert rises == pytest.approx([0.25] * 12)  # two orders, three splits, two budgets
    assert {entry["objective"] for entry in summary["forgetting"]} == {"dpo", "sft"}
    assert summary["optima"]["undercut"]["sft"] == {"runs": 6, "most": pytest.approx(0.02)}
    assert summary["optima"]["undercut"]["dpo"]["runs"] == 0
    warnings = " ".join(summary["warnings"])
    assert "6 runs ended below f_SFT*" in warnings
    assert "mix: the best learning rate 0.01 is at the border" in warnings
    assert predictions_optima(summary)[:4] == (0.3, 0.1, 0.0, pytest.approx(0.02))
    assert all(warning in report(summary) for warning in summary["warnings"])


def test_the_predictions_of_the_theory_read_the_table(config: CompareConfig) -> None:
    tried = experiment(config)
    results = comparison_table(config, tried)
    summary = summarise(config, tried, results)
    for budget in ("steps", "compute"):
        table = predictions_table(results, budget)
        found = {v.prediction: v for v in verdicts(table, predictions_optima(summary))}
        assert list(found) == ["P1", "P2", "P3", "P4", "P5", "P6"]
        assert all(verdict.claims > 0 for verdict in found.values())
    # `pretend` trades a nat for a nat, which lies between the odds of neighbouring lam around 1/2;
    # and it lets a step of Mix take as long as one of ALRIGHT, against the cost model.
    assert (found["P2"].outcome, found["P6"].outcome) == ("holds", "fails")


def test_paths_and_tuning_keep_every_run(config: CompareConfig) -> None:
    tried = experiment(config)
    paths, tuning = paths_table(tried), tuning_table(tried)
    assert len(paths) == 2 * sum(len(records) for records in tried.runs.values())
    assert len(tuning) == len(tried.singles) + len(tried.tuning)
    chosen = tuning[(tuning["stage"] == "tuning") & (tuning["line"] == "mix")]
    assert chosen.loc[chosen["f_mix"].idxmin(), "learning_rate"] == tried.rates["mix"]
