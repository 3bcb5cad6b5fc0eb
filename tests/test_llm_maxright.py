"""MAXRIGHT in the trainer: its probes, and where its values come from (llm.train.values)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _tiny import (
    BATCH_SIZES,
    assert_same_weights,
    eval_rows,
    make_policy,
    make_trainer,
    train_rows,
)
from _training import first_batch, loss_on
from transformers import TrainerCallback

from llm.flags.parse import parse
from llm.train.trainer import JointTrainer
from llm.train.values import set_aside, share_of_rank, split_values
from theory.cli import UserError
from theory.schedulers import (
    Maxright,
    Mix,
    Single,
)
from theory.tasks import Task


class Watch(TrainerCallback):
    """Keeps a copy of the schedule's values after every step."""

    def __init__(self) -> None:
        self.trainer: JointTrainer
        self.values: list[list[float]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        values = self.trainer.schedule.values
        assert values is not None
        self.values.append(values.tolist())


@pytest.mark.parametrize(("refresh_every", "probes"), [(1, 10), (3, 4), (10, 1), (50, 1)])
def test_maxright_probes_once_per_period(refresh_every: int, probes: int, tmp_path: Path) -> None:
    trainer = make_trainer(Maxright(0.5, (0.0, 0.0), refresh_every=refresh_every), tmp_path)
    trainer.train()
    assert trainer.probes == probes == math.ceil(10 / refresh_every)


@pytest.mark.parametrize("lam", [0.2, 0.9])
def test_maxright_steps_on_the_larger_weighted_gap(lam: float, tmp_path: Path) -> None:
    """At step 0 the losses are those of the initial policy on the next batches of each stream."""
    optimum = (0.1, 1.0)
    trainer = make_trainer(Maxright(lam, optimum, refresh_every=4), tmp_path)
    watch = Watch()
    watch.trainer = trainer
    trainer.add_callback(watch)
    with torch.no_grad():
        model = make_policy().eval()
        losses = [loss_on(model, task, first_batch(trainer, task)).item() for task in Task]
    heights = [
        weight * (loss - best)
        for weight, loss, best in zip((lam, 1 - lam), losses, optimum, strict=True)
    ]
    trainer.train()
    first = Task.DPO if heights[Task.DPO] >= heights[Task.SFT] else Task.SFT
    assert trainer.decisions[0][first] == 1.0
    # The step's own loss replaces the probed one, on the same batch: they agree without dropout.
    assert watch.values[0] == pytest.approx(losses, rel=1e-6)
    for before, after, decision in zip(
        watch.values[:3], watch.values[1:4], trainer.decisions[1:4], strict=True
    ):
        chosen = [w * (v - b) for w, v, b in zip((lam, 1 - lam), before, optimum, strict=True)]
        task = Task.DPO if chosen[0] >= chosen[1] else Task.SFT
        assert decision[task] == 1.0
        assert after[task.other] == before[task.other]  # stale until the next probe
        assert after[task] != before[task]  # renewed by the step itself
    last = [log for log in trainer.state.log_history if "loss" in log][-1]
    task = Task.DPO if trainer.decisions[-1][Task.DPO] else Task.SFT
    assert trainer.schedule.values[task] == pytest.approx(last["loss"], rel=1e-6)


def test_maxright_takes_both_objectives_when_their_gaps_cross(tmp_path: Path) -> None:
    trainer = make_trainer(
        Maxright(0.85, (0.0, 0.0), refresh_every=2), tmp_path, max_steps=30, learning_rate=3e-2
    )
    trainer.train()
    assert min(trainer.steps_taken.values()) > 0


def test_a_probe_consumes_no_rows_and_moves_no_weights(tmp_path: Path) -> None:
    """MAXRIGHT that always selects SFT trains bit for bit like SFT alone."""
    probed = make_trainer(Maxright(0.0, (0.0, 0.0), refresh_every=1), tmp_path)
    probed.train()
    alone = make_trainer(Single(Task.SFT), tmp_path)
    alone.train()
    assert probed.probes == 10
    assert probed.streams[Task.DPO].consumed == 0
    assert_same_weights(probed.model, alone.model)


def test_a_probe_covers_every_micro_batch_of_the_step(tmp_path: Path) -> None:
    scheduler = Maxright(0.5, (0.0, 0.0), refresh_every=1)
    whole = make_trainer(
        scheduler,
        tmp_path,
        max_steps=1,
        batch_sizes={task: 2 * n for task, n in BATCH_SIZES.items()},
    )
    parts = make_trainer(scheduler, tmp_path, max_steps=1, gradient_accumulation_steps=2)
    whole.train()
    parts.train()
    np.testing.assert_allclose(parts.schedule.values, whole.schedule.values, rtol=1e-6)


@pytest.mark.parametrize(("micro_batches", "forwards"), [(1, 3 + 2), (2, 2 * (4 + 3))])
def test_the_forward_of_a_probe_is_the_forward_of_the_step(
    micro_batches: int, forwards: int, tmp_path: Path
) -> None:
    """Of 3 steps the first and the third probe: with one micro-batch only the loser costs more."""
    model = make_policy()
    calls: list[None] = []
    model.register_forward_hook(lambda *_: calls.append(None))
    trainer = make_trainer(
        Maxright(0.5, (0.0, 0.0), refresh_every=2),
        tmp_path,
        model=model,
        max_steps=3,
        gradient_accumulation_steps=micro_batches,
    )
    trainer.train()
    assert trainer.probes == 2
    assert len(calls) == forwards


# --- values of rows set aside


def held_out_values(output_dir: Path, scheduler: Maxright, **options: Any) -> JointTrainer:
    """A trainer that probes on the held-out rows."""
    return make_trainer(scheduler, output_dir, value_rows=eval_rows(), **options)


def test_held_out_values_are_those_of_the_same_rows_at_every_probe(tmp_path: Path) -> None:
    """And they stay between the probes, whatever the stepped batches say."""
    trainer = held_out_values(tmp_path, Maxright(0.8, (0.1, 1.0), refresh_every=3), max_steps=6)
    watch = Watch()
    watch.trainer = trainer
    trainer.add_callback(watch)
    model, rows = make_policy().eval(), eval_rows()
    with torch.no_grad():
        losses = [loss_on(model, task, rows[task]).item() for task in Task]
    trainer.train()
    assert watch.values[0] == pytest.approx(losses, rel=1e-6)
    assert watch.values[0] == watch.values[1] == watch.values[2]
    assert watch.values[3] == watch.values[5]
    assert watch.values[3] != watch.values[0]
    assert trainer.decisions[0] == trainer.decisions[1] == trainer.decisions[2]


def test_averaged_held_out_values_renew_at_probes_only(tmp_path: Path) -> None:
    scheduler = Maxright(0.8, (0.1, 1.0), refresh_every=2, value_ema=0.25)
    exact, averaged = (
        held_out_values(tmp_path, each, max_steps=3)
        for each in (replace(scheduler, value_ema=1.0), scheduler)
    )
    with torch.no_grad():
        first = [loss_on(make_policy().eval(), t, eval_rows()[t]).item() for t in Task]
    exact.train()
    averaged.train()
    assert averaged.decisions == exact.decisions  # so both probes were made at the same weights
    old, new = np.array(first), exact.schedule.values
    np.testing.assert_allclose(averaged.schedule.values, old + 0.25 * (new - old), rtol=1e-6)


def test_a_run_on_held_out_values_resumes_bit_for_bit(tmp_path: Path) -> None:
    scheduler = Maxright(0.8, (0.1, 1.0), refresh_every=3, value_ema=0.5)
    straight = held_out_values(tmp_path, scheduler, save_strategy="steps", save_steps=4)
    straight.train()
    continued = held_out_values(tmp_path, scheduler, model=make_policy(seed=9))
    continued.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_weights(continued.model, straight.model)
    assert continued.state_to_json() == straight.state_to_json()
    others = make_trainer(scheduler, tmp_path)
    with pytest.raises(UserError, match="value rows is"):
        others.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_rows_set_aside_are_neither_trained_on_nor_reported() -> None:
    rows = train_rows()[Task.SFT]
    rows = [*rows, dict(rows[3]), dict(rows[3])]  # three copies of one row
    for seed in range(6):
        kept, aside = set_aside(rows, 5, seed, "sft")
        contents = [[str(row) for row in part] for part in (kept, aside)]
        assert len(aside) == 5
        assert not set(contents[0]) & set(contents[1])
        assert set(contents[0]) | set(contents[1]) == {str(row) for row in rows}
        assert set_aside(rows, 5, seed, "sft") == (kept, aside)
    assert set_aside(rows, 5, 0, "sft") != set_aside(rows, 5, 1, "sft")
    with pytest.raises(UserError, match="--value_rows 19 leaves none of the 19 sft rows"):
        set_aside(rows, 19, 0, "sft")


def test_only_maxright_sets_rows_aside() -> None:
    arguments = parse(
        ["--use_cpu=true", "--algo=maxright", "--value_source=held_out", "--value_rows=3"]
    ).training
    rows = train_rows()
    assert split_values(arguments, Mix(0.5), rows) == (rows, {})
    kept, aside = split_values(arguments, Maxright(0.5, (0.0, 0.0)), rows)
    assert {task: len(part) for task, part in aside.items()} == dict.fromkeys(Task, 3)
    assert {task: len(part) for task, part in kept.items()} == {
        task: len(part) - 3 for task, part in rows.items()
    }


def test_the_ranks_share_the_probed_rows() -> None:
    rows = [row | {"number": i} for i, row in enumerate(train_rows()[Task.SFT])]
    parts = [share_of_rank(rows, 4, rank, 3) for rank in range(3)]
    numbers = [row["number"] for part in parts for batch in part for row in batch]
    assert sorted(numbers) == list(range(len(rows)))
    assert max(len(batch) for part in parts for batch in part) <= 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--value_rows", "8"), "--value_rows is not used without --value_source held_out"),
        (("--value_source", "held_out", "--value_rows", "0"), "must be at least 1"),
        (("--value_source", "fresh"), "--value_source is fresh; it is one of train, held_out"),
        (
            ("--algo", "alright", "--value_source", "train"),
            "--value_source is not used by --algo alright",
        ),
    ],
)
def test_a_value_flag_that_means_nothing_is_refused(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(["--use_cpu", "true", "--algo", "maxright", *flags])
