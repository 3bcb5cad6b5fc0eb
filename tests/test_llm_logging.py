"""What a run logs: names, means, counts, shares of the time, and trackers that show them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _tiny import eval_rows, make_policy, make_trainer, plain_sgd, short_run
from _training import first_batch, loss_on

from llm.run import main
from llm.train.callbacks import JsonLines
from llm.train.trainer import JointTrainer
from theory.schedulers import Alternate, Importance, Maxright, Mix
from theory.tasks import Task


def train_logs(trainer: JointTrainer) -> list[dict[str, float]]:
    """The log lines of a training."""
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


# --- means


def test_the_step_loss_is_the_weighted_sum_of_the_logged_losses(tmp_path: Path) -> None:
    logs = train_logs(make_trainer(Mix(0.3), tmp_path, gradient_accumulation_steps=2))
    assert len(logs) == 10
    for log in logs:
        expected = 0.3 * log["dpo_loss"] + 0.7 * log["sft_loss"]
        assert log["loss"] == pytest.approx(expected, rel=1e-6)


def test_logged_means_do_not_depend_on_how_often_is_logged(tmp_path: Path) -> None:
    often, (summary,) = (
        train_logs(make_trainer(Alternate(0.5, 2), tmp_path, logging_steps=n)) for n in (1, 10)
    )
    for name in ("dpo_loss", "sft_loss", "dpo_reward_margin", "dpo_grad_norm", "sft_grad_norm"):
        values = [log[name] for log in often if name in log]
        assert len(values) == 5
        assert summary[name] == pytest.approx(np.mean(values), rel=1e-5, abs=1e-7)
    assert (summary["dpo_steps"], summary["sft_steps"]) == (5, 5)


# --- gradient norms


@pytest.mark.parametrize("limit", [0.0, 0.01])
def test_the_gradient_norm_is_unweighted_and_from_before_clipping(
    limit: float, tmp_path: Path
) -> None:
    scheduler = Importance(0.3, 0.999, seed=0)  # DPO, with a weight of 0.3
    trainer = make_trainer(scheduler, tmp_path, **plain_sgd(max_grad_norm=limit))
    by_hand = make_policy()
    loss_on(by_hand, Task.DPO, first_batch(trainer, Task.DPO)).backward()
    gradients = [p.grad for p in by_hand.parameters()]
    expected = float(torch.nn.utils.get_total_norm(gradients))
    (log,) = train_logs(trainer)
    assert log["dpo_grad_norm"] == pytest.approx(expected, rel=1e-5)
    assert log["grad_norm"] == pytest.approx(0.3 / 0.999 * expected, rel=1e-5)
    assert expected > 0.01
    assert "sft_grad_norm" not in log


def test_a_step_on_both_objectives_has_no_norm_of_one(tmp_path: Path) -> None:
    for log in train_logs(make_trainer(Mix(0.5), tmp_path, max_steps=2)):
        assert log["grad_norm"] > 0.0
        assert not log.keys() & {"dpo_grad_norm", "sft_grad_norm"}


# --- counts


def test_tokens_are_those_of_the_drawn_rows(tmp_path: Path) -> None:
    trainer = make_trainer(Mix(0.5), tmp_path, max_steps=4, logging_steps=3)
    expected = [
        {f"{task.label}_tokens": _tokens(first_batch(trainer, task, steps)) for task in Task}
        for steps in (3, 4)
    ]
    (log,) = train_logs(trainer)
    assert {name: log[name] for name in expected[0]} == expected[0]
    # The last step was not logged, and counts.
    assert {f"{task.label}_tokens": n for task, n in trainer.tokens_seen.items()} == expected[1]


def _tokens(rows: list[dict[str, Any]]) -> int:
    return sum(len(ids) for row in rows for key, ids in row.items() if key.endswith("_ids"))


# --- shares of the time


def test_the_shares_of_the_time_add_up_to_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 4}
    scheduler = Maxright(0.5, (0.0, 0.0), refresh_every=2)
    logs = train_logs(make_trainer(scheduler, tmp_path, held_out=eval_rows(), **options))
    names = {"data", "forward", "backward", "optimizer", "probes", "evaluation", "other"}
    assert len(logs) == 2
    for log in logs:
        shares = {name: value for name, value in log.items() if name.startswith("time_")}
        assert shares.keys() == {f"time_{name}" for name in names}
        assert min(shares.values()) > 0.0
        assert sum(shares.values()) == pytest.approx(1.0)
    (log,) = train_logs(make_trainer(Mix(0.5), tmp_path, max_steps=1))
    assert not log.keys() & {"time_probes", "time_evaluation"}  # what never ran is not shown


# --- where the log goes


@pytest.mark.usefixtures("short_base_training")
def test_tensorboard_shows_every_value_under_its_name(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    flags = ("--algo", "alright", "--report_to", "tensorboard", "--optima", "none")
    out = tmp_path / "out"
    main(short_run(out, *flags, "--kl_rows", "8"))
    (folder,) = (out / "runs").iterdir()
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    shown: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step":
                where = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
                shown.setdefault(where, []).append((line["step"], pytest.approx(value, rel=1e-6)))
    assert set(events.Tags()["scalars"]) == set(shown)
    for name, points in shown.items():
        assert [(event.step, event.value) for event in events.Scalars(name)] == points
    expected = {f"train/{task.label}_{name}" for task in Task for name in ("steps", "tokens")}
    expected |= {f"eval/dpo_{name}" for name in ("loss", "reward_accuracy", "reward_margin")}
    expected |= {"eval/dpo_chosen_logps", "eval/dpo_rejected_logps", "eval/sft_loss"}
    expected |= {"eval/kl_reference", "eval/kl_reference_se", "eval/kl_reference_per_token"}
    expected |= {"train/dpo_loss", "train/dpo_reward_accuracy", "train/dpo_chosen_logps"}
    expected |= {"train/dpo_grad_norm", "train/sft_grad_norm", "train/time_forward"}
    assert expected <= set(shown)
    summary = json.loads((out / "joint_summary.json").read_text())
    assert summary["clipping"] == "global"
    assert summary["seconds"]["phases"]["forward"] > 0.0
    assert "kl_reference" in summary["held_out"]["after"]


def test_every_log_line_is_one_line_of_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    trainer = make_trainer(Alternate(0.5, 2), tmp_path, logging_steps=2)
    trainer.add_callback(JsonLines(path))
    logs = train_logs(trainer)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line for line in lines if "loss" in line] == logs
