"""llm.optima: the optimal losses from a file, by single runs, and when an estimate is stale."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from _tiny import short_run

import llm.optima
from llm.config import RunConfig, parse
from llm.optima import FILE, find_optimum, read_optimum
from llm.setup import Setup, prepare
from theory.cli import UserError
from theory.schedulers import Single
from theory.tasks import Task

pytestmark = pytest.mark.usefixtures("short_base_training")


def silent(*_: Any) -> None:
    """Say nothing."""


@pytest.fixture
def runs_on(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """The objectives that single runs train on from now on."""
    trained: list[Task] = []
    make_trainer = llm.optima.make_trainer

    def counted(
        setup: Any, config: Any, arguments: Any, scheduler: Single, *a: Any, **k: Any
    ) -> Any:
        trained.append(scheduler.task)
        return make_trainer(setup, config, arguments, scheduler, *a, **k)

    monkeypatch.setattr(llm.optima, "make_trainer", counted)
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


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.json", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=f"--optima {path}: {reason}"):
            read_optimum(path)


# --- none, auto


def test_maxright_without_optima_is_refused(tmp_path: Path) -> None:
    config = parse(short_run(tmp_path, "--algo", "maxright", "--optima", "none"))
    setup: Any = None
    with pytest.raises(UserError, match="maxright compares gaps and needs the optima"):
        find_optimum(setup, config, silent)


def test_none_gives_none(tmp_path: Path) -> None:
    setup: Any = None
    config = parse(short_run(tmp_path, "--optima", "none"))
    assert find_optimum(setup, config, silent) is None


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
        trainer = llm.optima.make_trainer(
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
    *("--lr_scheduler_type constant", "--sft_per_device_train_batch_size 4", "--eval_steps 2"),
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
    return llm.optima._fingerprint(setup, parse(short_run(Path("anywhere"), *flags)))


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
    monkeypatch.setattr(llm.optima, "_single_run", lambda setup, config, task: 2.0 + task)
    assert find_optimum(setup, config, silent) == (2.0, 3.0)
    assert json.loads((tmp_path / FILE).read_text())["sft"] == 3.0


def test_estimating_needs_the_data_of_both_objectives(setup: Setup, tmp_path: Path) -> None:
    config = parse(short_run(tmp_path))
    alone = replace(setup, train={Task.SFT: setup.train[Task.SFT]})
    with pytest.raises(UserError, match="estimating the optima needs dpo data as well"):
        find_optimum(alone, config, silent)
