"""llm.optima: the optimal losses from a file, by single runs, and when an estimate is stale."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _tiny import OBJECTIVES, PAD_ID, make_policy, short_run, train_rows

import llm.optima
import llm.single_runs
from llm.flags.arguments import RunConfig
from llm.flags.parse import parse
from llm.optima import (
    FILE,
    Estimate,
    budgets,
    find_optimum,
    read_optimum,
    settle,
    value_error_bias,
)
from llm.setup import Setup, prepare
from llm.single_runs import SingleRun, gradient_norm
from theory.cli import UserError
from theory.schedulers import Single
from theory.tasks import Task
from theory.theorems.bounds import wrong_optimum_bias

pytestmark = pytest.mark.usefixtures("short_base_training")


def silent(*_: Any) -> None:
    """Say nothing."""


@pytest.fixture
def runs_on(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """The objectives that single runs train on from now on."""
    trained: list[Task] = []
    make_trainer = llm.single_runs.make_trainer

    def counted(
        setup: Any, config: Any, arguments: Any, scheduler: Single, *a: Any, **k: Any
    ) -> Any:
        trained.append(scheduler.task)
        return make_trainer(setup, config, arguments, scheduler, *a, **k)

    monkeypatch.setattr(llm.single_runs, "make_trainer", counted)
    return trained


def prepared(tmp_path: Path, *flags: str) -> tuple[Setup, RunConfig]:
    config = parse(short_run(tmp_path, *flags))
    return prepare(config, silent), config


# --- from a file


def test_a_file_gives_the_losses_in_the_order_of_the_objectives(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"sft": 1.25, "dpo": 0.5, "note": "anything"}')
    assert read_optimum(path) == (0.5, 1.25)
    config = parse(short_run(tmp_path, "--optima", str(path)))
    setup: Any = None  # nothing is trained, so nothing is needed
    assert find_optimum(setup, config, silent) == (0.5, 1.25)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[0.5, 1.2]", "0.5", "null", '{"dpo": 0.5}', '{"dpo": 0.5, "sft": null}'),
        *('{"dpo": 0.5, "sft": "low"}', '{"dpo": NaN, "sft": 1.2}'),
        '{"dpo": 0.5, "sft": Infinity}',
    ],
)
def test_a_bad_file_is_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(UserError, match="must be JSON with two losses") as caught:
        read_optimum(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    with pytest.raises(UserError, match=f"--optima {tmp_path}: Is a directory"):
        read_optimum(tmp_path)


# --- none, auto


def test_none_gives_none_and_is_refused_where_gaps_are_compared(tmp_path: Path) -> None:
    setup: Any = None
    assert find_optimum(setup, parse(short_run(tmp_path, "--optima", "none")), silent) is None
    config = parse(short_run(tmp_path, "--algo", "maxright", "--optima", "none"))
    with pytest.raises(UserError, match="maxright compares gaps and needs the optima"):
        find_optimum(setup, config, silent)


@pytest.mark.parametrize(("algo", "estimated"), [("alright", False), ("maxright", True)])
def test_auto_estimates_for_an_own_model_only_where_it_must(
    algo: str, estimated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sft", "dpo"):
        (tmp_path / f"{name}.jsonl").touch()
    own = ["--model_name_or_path", "some/model", "--algo", algo, "--use_cpu", "true"]
    own += [f"--{name}_dataset={tmp_path / name}.jsonl" for name in ("sft", "dpo")]
    monkeypatch.setattr(llm.optima, "_estimated", lambda *_: (0.5, 1.2))
    setup: Any = None
    optimum = find_optimum(setup, parse(own), silent)
    assert optimum == ((0.5, 1.2) if estimated else None)


# --- estimates


def test_an_estimate_is_the_lowest_held_out_loss_of_a_run_on_one_objective(
    tmp_path: Path, runs_on: list[Task]
) -> None:
    setup, config = prepared(tmp_path)
    optimum = find_optimum(setup, config, silent)
    assert optimum is not None
    assert runs_on == [Task.DPO, Task.SFT]
    written = json.loads((tmp_path / FILE).read_text())
    assert (written["dpo"], written["sft"]) == optimum
    for task in Task:
        trainer = llm.single_runs.make_trainer(
            setup, config, config.training, Single(task), [task], evaluated=[task]
        )
        name = f"{task.label}_loss"
        losses = [trainer.held_out()[name]]
        trainer.train()
        losses += [
            log[f"eval_{name}"] for log in trainer.state.log_history if f"eval_{name}" in log
        ]
        assert len(losses) == 3  # before, after 4 and after 8 steps
        assert optimum[task] == pytest.approx(min(losses), rel=1e-6)
        assert optimum[task] < losses[0]


def test_an_estimate_is_reused(tmp_path: Path, runs_on: list[Task]) -> None:
    setup, config = prepared(tmp_path)
    first = find_optimum(setup, config, silent)
    assert len(runs_on) == 2
    said: list[str] = []
    again = prepared(tmp_path, "--algo", "maxright", "--lam", "0.3")
    assert find_optimum(*again, said.append) == first
    assert len(runs_on) == 2
    assert said == [f"optima: read from {tmp_path / FILE}"]


CHANGES_THE_DATA = [
    *("--seed 1", "--conflict 0.5", "--max_length 12"),
    *("--max_train_rows 40", "--max_eval_rows 10"),
]
CHANGES_THE_RUN = [
    *("--beta 0.2", "--loss_type ipo", "--label_smoothing 0.1", "--learning_rate 0.01"),
    *("--weight_decay 0.5", "--warmup_steps 4", "--max_grad_norm 0.1", "--max_steps 6"),
    *("--lr_scheduler_type cosine", "--sft_per_device_train_batch_size 4", "--eval_steps 2"),
    *("--gradient_accumulation_steps 2", "--data_seed 3"),
]
CHANGES_NOTHING = [
    *("--algo maxright --refresh_every 3", "--lam 0.9", "--output_dir elsewhere"),
    *("--logging_steps 1", "--save_strategy steps --save_steps 4"),
]


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    """What the short run without further flags trains on; prepared once for the module."""
    if not _PREPARED:
        _PREPARED.append(prepared(tmp_path)[0])
    return _PREPARED[0]


_PREPARED: list[Setup] = []


def fingerprint(setup: Setup, *flags: str) -> str:
    return llm.single_runs.estimate_fingerprint(setup, parse(short_run(Path("anywhere"), *flags)))


@pytest.mark.parametrize("flags", CHANGES_THE_DATA)
def test_an_estimate_is_stale_when_the_data_change(
    flags: str, setup: Setup, tmp_path: Path
) -> None:
    other, _ = prepared(tmp_path, *flags.split())
    # The flags of the run are the same: only what was prepared differs.
    assert fingerprint(other) != fingerprint(setup)


@pytest.mark.parametrize("flags", CHANGES_THE_RUN)
def test_an_estimate_is_stale_when_the_single_runs_change(flags: str, setup: Setup) -> None:
    assert fingerprint(setup, *flags.split()) != fingerprint(setup)


@pytest.mark.parametrize("flags", CHANGES_NOTHING)
def test_an_estimate_outlives_what_it_does_not_depend_on(flags: str, setup: Setup) -> None:
    assert fingerprint(setup, *flags.split()) == fingerprint(setup)


@pytest.mark.parametrize("content", ["{", "[]", '{"dpo": 0.1, "sft": 0.1}', '{"fingerprint": "x"}'])
def test_a_stale_estimate_is_made_anew(
    content: str, setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse(short_run(tmp_path))
    (tmp_path / FILE).write_text(content)
    monkeypatch.setattr(llm.optima, "single_run", lambda *a, **k: run_to(2.0 + a[2]))
    assert find_optimum(setup, config, silent) == (2.0, 3.0)
    assert json.loads((tmp_path / FILE).read_text())["sft"] == 3.0


def run_to(best: float, steps: int = 8, rate: float = 0.1) -> SingleRun:
    return SingleRun(steps, rate, start=5.0, best=best, end=best)


def test_estimating_needs_the_data_of_both_objectives(setup: Setup, tmp_path: Path) -> None:
    config = parse(short_run(tmp_path))
    alone = replace(setup, train={Task.SFT: setup.train[Task.SFT]})
    with pytest.raises(UserError, match="estimating the optima needs dpo data as well"):
        find_optimum(alone, config, silent)


# --- whose optima a file holds


def test_the_optima_of_another_problem_are_refused(setup: Setup, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    config = parse(short_run(tmp_path / "out", "--optima", str(path)))
    record = {"dpo": 0.25, "sft": 0.5, "problem": llm.single_runs.problem(setup, config)}
    path.write_text(json.dumps(record))
    assert find_optimum(setup, config, silent) == (0.25, 0.5)
    other = parse(short_run(tmp_path / "out", "--optima", str(path), "--beta", "0.3"))
    setup = prepare(other, silent)
    with pytest.raises(UserError, match="measured with another dpo loss; estimate anew") as caught:
        find_optimum(setup, other, silent)
    assert "\n" not in str(caught.value)
    del record["problem"]  # two bare losses: the user's own word
    path.write_text(json.dumps(record))
    assert find_optimum(setup, other, silent) == (0.25, 0.5)


def test_the_problem_names_what_differs(setup: Setup, tmp_path: Path) -> None:
    def differing(*flags: str, prepare_anew: bool = False) -> set[str]:
        config = parse(short_run(tmp_path, *flags))
        theirs = llm.single_runs.problem(prepare(config, silent) if prepare_anew else setup, config)
        mine = llm.single_runs.problem(setup, parse(short_run(tmp_path)))
        return {name for name in mine if mine[name] != theirs[name]}

    assert differing("--learning_rate", "0.1", "--max_steps", "5", "--lam", "0.1") == set()
    assert differing("--loss_type", "ipo", prepare_anew=True) == {"dpo loss"}
    assert differing("--max_eval_rows", "10", prepare_anew=True) == {"dpo data", "sft data"}
    assert differing("--seed", "3", prepare_anew=True) >= {"model", "dpo data", "sft data"}


# --- the command


def test_budgets_double_up_to_the_cap() -> None:
    assert budgets(600, 3) == [75, 150, 300, 600]
    assert budgets(7, 2) == [2, 4, 7]
    assert budgets(2, 3) == [1, 2]


OPTIONS = argparse.Namespace(
    stationarity=0.01, doublings=4, learning_rates=[0.1, 0.2, 0.3], gradient_rows=0
)


def settled_on(losses: dict[int, list[float]], monkeypatch: pytest.MonkeyPatch) -> Estimate:
    """`settle` where a run of so many steps ends at the losses given for the three rates."""

    def kept_run(
        setup: Any, config: Any, task: Any, steps: int, rate: float, rows: int
    ) -> tuple[SingleRun, bool]:
        return run_to(losses[steps][OPTIONS.learning_rates.index(rate)], steps, rate), False

    monkeypatch.setattr(llm.optima, "kept_run", kept_run)
    monkeypatch.setattr(llm.optima, "total_steps", lambda *_: 160)
    setup: Any = None
    config = parse(short_run(Path("anywhere")))
    return settle(setup, config, Task.SFT, OPTIONS, silent)


def test_the_budget_doubles_until_two_doublings_bring_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From 5.0 down to 1.0: a share of 0.01 is 0.04 nats."""
    losses = {10: [4.0, 3.0, 9.0], 20: [1.1, 1.2, 9.0], 40: [1.5, 1.08, 9.0], 80: [1.06, 1.09, 9.0]}
    estimate = settled_on(losses, monkeypatch)
    assert (estimate.loss, estimate.steps, estimate.learning_rate) == (1.06, 80, 0.1)
    assert estimate.stationary
    assert estimate.last_improvement == pytest.approx(0.02)
    assert estimate.relative_improvement == pytest.approx(0.02 / (5.0 - 1.06))
    assert len(estimate.runs) == 12
    # A cap that is reached before the loss settles is said.
    capped = settled_on({10 * 2**k: [4.0 - 0.5 * k, 4.5, 4.5] for k in range(5)}, monkeypatch)
    assert not capped.stationary
    assert (capped.loss, capped.steps) == (2.0, 160)
    assert capped.relative_improvement == pytest.approx(0.5 / 3.0)
    # A longer run that comes out worse does not undo a better one.
    worse = settled_on({10: [1.0, 2.0, 2.0], 20: [1.4] * 3, 40: [1.3] * 3}, monkeypatch)
    assert (worse.loss, worse.steps) == (1.0, 40)
    assert worse.last_improvement == worse.relative_improvement == 0.0


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.5, 1.0])
def test_the_cost_of_wrong_optima_covers_every_error_up_to_the_last_gains(lam: float) -> None:
    errors = {Task.DPO: 0.02, Task.SFT: 0.05}
    bias = value_error_bias(lam, errors)
    grid = [
        wrong_optimum_bias(lam, (dpo, sft))
        for dpo in np.linspace(0.0, errors[Task.DPO], 5)
        for sft in np.linspace(0.0, errors[Task.SFT], 5)
    ]
    assert bias == pytest.approx(max(grid))


@pytest.mark.parametrize("task", Task)
def test_the_gradient_norm_is_that_of_the_mean_over_all_rows(task: Task) -> None:
    """In batches of different numbers of tokens, against one batch and torch.autograd."""
    rows, model, objective = train_rows()[task][:7], make_policy(), OBJECTIVES[task]
    loss = objective(model, objective.collate(rows, PAD_ID)).total / objective.items(rows)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5
    actual = gradient_norm(model, objective, rows, batch_size=3, pad_token_id=PAD_ID)
    assert actual == pytest.approx(expected, rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_command_leaves_optima_that_a_run_reads(
    tmp_path: Path, runs_on: list[Task], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--doublings", "2", "--learning_rates", "1e-3", "1e-2", "--gradient_rows", "16"]
    flags += ["--stationarity", "0"]  # to the cap
    argv = [*short_run(tmp_path, "--max_steps", "4", "--eval_steps", "2"), *flags]
    llm.optima.main(argv)
    assert len(runs_on) == 2 * 3 * 2  # objectives, budgets, learning rates
    written = json.loads((tmp_path / FILE).read_text())
    for task in Task:
        estimate = written["stationarity"][task.label]
        assert written[task.label] == min(run["best"] for run in estimate["runs"])
        assert [run["steps"] for run in estimate["runs"]] == [1, 1, 2, 2, 4, 4]
        assert 0.0 < estimate["gradient"] < math.inf
    assert "optima too high by the last gains" in capsys.readouterr().out

    # Interrupted before its last run: the others are kept.
    (tmp_path / FILE).unlink()
    (tmp_path / "optima" / "sft" / "4-steps-0.01.json").unlink()
    llm.optima.main(argv)
    assert len(runs_on) == 13
    assert json.loads((tmp_path / FILE).read_text()) == written
    assert capsys.readouterr().out.count(", kept") == 11

    # Twice the steps: what has been run so far is the shorter budgets.
    llm.optima.main([*argv, "--max_steps", "8"])
    assert len(runs_on) == 13 + 2 * 2

    config = parse(short_run(tmp_path / "run", "--optima", str(tmp_path / FILE)))
    written = json.loads((tmp_path / FILE).read_text())
    assert find_optimum(prepare(config, silent), config, silent) == (written["dpo"], written["sft"])


def test_the_command_has_a_directory_of_its_own() -> None:
    _, config = llm.optima._parse(["--use_cpu", "true"])
    assert config.output_dir == llm.optima.OUTPUT_DIR
    _, config = llm.optima._parse(["--use_cpu", "true", "--output_dir", "mine", "--lam", "0.3"])
    assert config.output_dir == "mine"
    assert config.training.lam == 0.3


def test_too_few_steps_to_judge_by_are_refused(setup: Setup, tmp_path: Path) -> None:
    config = parse(short_run(tmp_path, "--max_steps", "2"))
    with pytest.raises(UserError, match="2 is too few steps to double twice"):
        settle(setup, config, Task.DPO, OPTIONS, silent)
