"""llm.compare with real runs: what a record is, that seeds change the order only, and resuming."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from _tiny import own_sources
from transformers import AutoModelForCausalLM

import llm.compare.pool
import llm.compare.workers
from llm.compare.__main__ import main
from llm.compare.plan import Experiment, measured_on
from llm.compare.pool import Pool, shared_fingerprint
from llm.compare.runs import Run, configure, line_run, train
from llm.compare.settings import CompareConfig, parse
from llm.compare.workers import Workers
from llm.data.checks import with_leaks_noted
from llm.loss.evaluate import evaluate_objective
from llm.run import new_trainer
from llm.setup import Setup, prepare
from theory.schedulers import ORDERS
from theory.tasks import Task

OPTIMUM = (0.3, 0.1)
SHORT = ("--max_steps", "8", "--eval_steps", "4", "--logging_steps", "4", "--warmup_steps", "0")
TIMES = ["seconds", "seconds_per_step"]


@pytest.fixture
def comparison(tmp_path: Path) -> list[str]:
    """The command line of a comparison of short runs on a saved tiny model."""
    sources = [f"--{name}={source}" for name, source in own_sources(tmp_path).items()]
    shared = ("--eval_strategy", "steps", "--kl_rows", "0", "--beta", "0.5", "--seeds", "2")
    grid = ("--lams", "0.25", "0.5", "--splits", "0.5", "--learning_rates", "1e-3", "1e-2")
    quiet = ("--use_cpu", "true", "--disable_tqdm", "true", "--jobs", "1")
    return [*sources, *quiet, *SHORT, *shared, *grid, "--out", str(tmp_path / "compare")]


@pytest.fixture
def config(comparison: list[str]) -> CompareConfig:
    return parse(comparison)


@pytest.fixture
def setup(config: CompareConfig) -> Setup:
    return prepare(config.run, lambda _: None)


def a_run(line: str = "alright", knob: float = 0.5, **fields: Any) -> Run:
    fields = {"steps": 8, "learning_rate": 1e-2, "seed": 0} | fields
    algorithm = "sequential" if line in ORDERS else line
    return line_run(algorithm, line, knob, OPTIMUM, **fields)


# --- a run


@pytest.mark.parametrize("line", ["sft_then_dpo", "mix", "maxright"])
def test_a_record_holds_the_losses_that_llm_run_reaches(
    line: str, config: CompareConfig, setup: Setup, tmp_path: Path
) -> None:
    run = a_run(line, seed=3)
    record = train(setup, config.run, run, tmp_path / "run", keep_model=True)
    trainer = new_trainer(setup, configure(config.run, run, tmp_path / "again"), run.optimum)
    trainer.train()
    losses = trainer.held_out()
    assert (record["f_dpo"], record["f_sft"]) == (losses["dpo_loss"], losses["sft_loss"])
    assert record["steps"] == {task.label: n for task, n in trainer.steps_taken.items()}
    assert record["tokens"] == {task.label: n for task, n in trainer.tokens_seen.items()}
    assert record["probes"] == (line == "maxright")  # 8 steps, a probe every 10
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    rows, pad = setup.held_out[Task.SFT].rows, setup.tokenizer.pad_token_id
    options: dict[str, Any] = {"batch_size": 4, "pad_token_id": pad}
    loss = evaluate_objective(saved, setup.objectives[Task.SFT], rows, **options)["loss"]
    assert loss == pytest.approx(record["f_sft"], rel=1e-5)  # float32, other batches


def test_a_path_starts_at_the_base_model_and_stops_at_the_boundary(
    config: CompareConfig, setup: Setup, tmp_path: Path
) -> None:
    record = train(setup, config.run, a_run("sft_then_dpo", 0.75), tmp_path, keep_model=False)
    path = record["path"]
    assert [point["step"] for point in path] == [0, 4, 6, 8]  # every 4, and after 3/4 of 8
    assert path[0]["f_dpo"] == pytest.approx(0.693147, abs=1e-5)  # log 2: its own reference
    assert [point["sft_steps"] for point in path] == [0, 4, 6, 6]
    assert [point["dpo_steps"] for point in path] == [0, 0, 0, 2]
    assert record["stage_end"] == path[2]
    assert path[2]["dpo_tokens"] == 0 < path[3]["dpo_tokens"]
    seconds = [point["seconds"] for point in path]
    assert seconds == sorted(seconds)
    without = train(
        setup, config.run, a_run("sft_then_dpo", 0.75, path=False), tmp_path, keep_model=False
    )
    assert [point["step"] for point in without["path"]] == [0, 6, 8]
    assert (without["f_dpo"], without["f_sft"]) == (record["f_dpo"], record["f_sft"])


def test_a_seed_changes_the_order_and_the_decisions_but_not_the_problem(
    config: CompareConfig, setup: Setup, tmp_path: Path
) -> None:
    first, second, again = (
        train(setup, config.run, a_run(seed=seed), tmp_path, keep_model=False) for seed in (1, 2, 1)
    )
    assert first["path"][0]["f_sft"] == second["path"][0]["f_sft"]
    assert first["f_sft"] != second["f_sft"]
    assert first["f_sft"] == again["f_sft"]


def test_a_run_that_diverges_is_a_record_with_its_reason(
    config: CompareConfig, setup: Setup, tmp_path: Path
) -> None:
    wild = replace(config.run.training, max_grad_norm=0.0)
    record = train(
        setup, replace(config.run, training=wild), a_run(learning_rate=1e30), tmp_path, False
    )
    assert "lower --learning_rate" in record["failed"]
    assert "\n" not in record["failed"]


# --- keeping runs


def test_finished_runs_are_kept_and_damaged_or_other_ones_are_not(
    config: CompareConfig, setup: Setup
) -> None:
    runs = [a_run(seed=seed) for seed in (0, 1)]
    workers = Workers(config, setup)
    pool = Pool(config, setup, workers)
    first = pool.run("stage", runs)
    assert pool.run("stage", [*runs, runs[0]]) == [*first, first[0]]
    assert pool.trained == 2
    results = sorted(config.out.glob("runs/*/result.json"))
    results[0].write_text(results[0].read_text()[:-20])
    pool = Pool(config, setup, workers)
    again = pool.run("stage", runs)
    assert pool.trained == 1
    assert [r["f_sft"] for r in again] == [r["f_sft"] for r in first]
    pool = Pool(replace(config, keep_models=True), setup, workers)
    pool.run("stage", runs)
    assert pool.trained == 2  # no model was kept
    assert not list(config.out.glob(".*"))  # one job needs no other process


def test_losses_of_rows_that_are_trained_on_are_called_so(setup: Setup) -> None:
    assert measured_on(setup) == "held-out"
    same = {task: with_leaks_noted(rows, rows) for task, rows in setup.train.items()}
    assert measured_on(replace(setup, held_out=same)) == "training"
    half = same | {Task.SFT: setup.held_out[Task.SFT]}
    assert measured_on(replace(setup, held_out=half)) == "held-out"


@pytest.mark.usefixtures("same_threads")
def test_replaced_settings_reach_every_process(config: CompareConfig, setup: Setup) -> None:
    """As the studies of llm.validate replace them: the same bits in one process and in two."""
    torch.set_num_threads(1)  # as the command and every worker: the order of a sum is in its bits
    runs, flags = [a_run(seed=seed) for seed in (0, 1)], {"max_grad_norm": 0.0, "weight_decay": 0.5}
    found = {}
    for jobs in (1, 2):
        own = replace(config, jobs=jobs, out=config.out / str(jobs))
        with closing(Workers(own, setup)) as workers:
            found[jobs] = Pool(own, setup, workers, flags).run("arm", runs)
            found[-jobs] = Pool(own, setup, workers).run("plain", runs)
    values = {jobs: [record["f_sft"] for record in records] for jobs, records in found.items()}
    assert values[2] == values[1]
    assert values[-2] == values[-1]
    assert values[1] != values[-1]
    assert not list(config.out.glob("*/.prepared"))


def test_what_decides_a_result_is_in_its_name(
    config: CompareConfig, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = shared_fingerprint(config.run, setup)
    keys = {a_run().key(mine), a_run(seed=1).key(mine), a_run(steps=9).key(mine)}
    assert len(keys | {a_run(learning_rate=1e-3).key(mine), a_run().key("other")}) == 5

    def with_training(**changes: Any) -> str:
        training = replace(config.run.training, **changes)
        return shared_fingerprint(replace(config.run, training=training), setup)

    assert with_training(logging_steps=1, output_dir="elsewhere") == mine
    others = {with_training(beta=0.2), with_training(weight_decay=0.5), with_training(bf16=True)}
    others |= {
        with_training(schedule={"refresh_every": 3}),
        with_training(per_device_train_batch_size=3),
    }
    monkeypatch.setattr(llm.compare.pool, "code_digest", lambda: "of other code")
    others.add(shared_fingerprint(config.run, setup))
    assert len(others | {mine}) == 7


# --- the command


def results_of(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / "results.parquet").drop(columns=TIMES)


def wait_until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def test_killed_and_started_again_the_comparison_ends_with_the_same_table(
    comparison: list[str], tmp_path: Path
) -> None:
    """Two processes until SIGKILL, one process for the rest, against one process from the start."""
    out, straight = tmp_path / "compare", tmp_path / "straight"
    comparison += ["--algos", "mix", "maxright", "--lams", "0.5"]  # 16 runs
    with subprocess.Popen(
        [sys.executable, "-m", "llm.compare", *comparison, "--jobs", "2"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            wait_until(lambda: len(list(out.glob("runs/*/result.json"))) >= 5)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            workers = [int(pid) for pid in children.read_text().split()]
        finally:
            process.kill()
    assert len(workers) >= 2
    kept = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}
    assert not (out / "results.csv").exists()

    main(comparison)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # taken, not trained again
    main([*comparison, "--out", str(straight)])
    pd.testing.assert_frame_equal(results_of(out), results_of(straight))
    wait_until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers))


def test_the_command_goes_on_after_a_run_that_diverges(
    comparison: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    experiments: list[Experiment] = []
    run_experiment = llm.compare.__main__.run_experiment

    def recorded(*arguments: Any) -> Experiment:
        experiments.append(run_experiment(*arguments))
        return experiments[-1]

    def sabotaged(setup: Setup, run: Any, which: Run, *rest: Any) -> Any:
        wild = which.line == "mix" and which.seed == 1
        tried = replace(which, learning_rate=1e30) if wild else which
        return train(setup, run, tried, *rest) | {"run": asdict(which)}

    monkeypatch.setattr(llm.compare.workers, "train", sabotaged)
    monkeypatch.setattr(llm.compare.__main__, "run_experiment", recorded)
    main([*comparison, "--max_grad_norm", "0", "--lams", "0.5", "--orders", "sft_then_dpo"])
    out = tmp_path / "compare"
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["failures"]) == 2  # one per budget
    table = (out / "table.md").read_text()
    assert "Mix (1 failed)" in table
    assert "runs failed" in capsys.readouterr().out
    (tried,) = experiments
    assert tried.costs.pair == pytest.approx(pair_tokens(comparison), rel=0.05)  # of drawn rows
    frame = pd.read_csv(out / "results.csv")
    assert len(frame) == sum(len(records) for records in tried.runs.values())


def pair_tokens(comparison: list[str]) -> float:
    """Tokens of a DPO step over those of an SFT step (one batch size), from the data."""
    setup = prepare(parse(comparison).run, lambda _: None)
    tokens = {
        task: sum(len(ids) for row in setup.train[task].rows
                  for name, ids in row.items() if name.endswith("_ids"))
        for task in Task
    }  # fmt: skip
    rows = {task: len(setup.train[task].rows) for task in Task}
    return tokens[Task.DPO] / rows[Task.DPO] / (tokens[Task.SFT] / rows[Task.SFT])
