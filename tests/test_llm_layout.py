"""Layouts in a run, and their flags: packed where the model takes it, padded elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from _tiny import (
    OBJECTIVES,
    arguments,
    make_policy,
    make_trainer,
    plain_sgd,
    short_run,
    train_rows,
    weights_of,
)

import llm.loss.objectives
import llm.setup
from llm.flags.parse import parse
from llm.loss.objectives import DPOObjective, SFTObjective
from llm.loss.packing import CPU_TOKENS, row_tokens, split_rows, tokens_per_forward
from llm.run import main
from llm.setup import prepare
from theory.cli import UserError
from theory.records import read_json
from theory.schedulers import Alright, Mix
from theory.scheduling import Scheduler
from theory.tasks import Task

pytestmark = pytest.mark.usefixtures("short_base_training")

PADDED = {Task.DPO: DPOObjective(packing=False), Task.SFT: SFTObjective(packing=False)}
BASE = ["--model_name_or_path", "m", "--sft_dataset", "a", "--dpo_dataset", "b"]


def test_packed_and_padded_runs_are_the_same_run(tmp_path: Path) -> None:
    trainers = [
        make_trainer(Mix(0.4), tmp_path, objectives=objectives, max_steps=6)
        for objectives in (OBJECTIVES, PADDED)
    ]
    for trainer in trainers:
        trainer.train()
    packed, padded = (weights_of(trainer.model) for trainer in trainers)
    # Six AdamW steps of 1e-2: rounding of 1e-7 in a gradient near zero can turn a step around, so
    # that weights differ by a share of a step although the losses agree.
    for name, value in packed.items():
        torch.testing.assert_close(value, padded[name], rtol=1e-3, atol=1e-3)
    losses = [
        [log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in trainers
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_run_says_that_it_pads_where_the_model_cannot_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = "its attention is of another kind"
    monkeypatch.setattr(llm.setup, "layout_problem", lambda *_, **__: why)
    said: list[str] = []
    setup = prepare(parse(short_run(tmp_path)), said.append)
    assert not any(objective.packing for objective in setup.objectives.values())
    assert f"batches are padded, not packed: the embedded model: {why}" in said
    with pytest.raises(UserError, match="max_tokens_per_batch needs packing"):
        prepare(
            parse([*_without_rows(short_run(tmp_path)), "--max_tokens_per_batch", "99"]),
            said.append,
        )


def _without_rows(flags: list[str]) -> list[str]:
    at = flags.index("--per_device_train_batch_size")
    return flags[:at] + flags[at + 2 :]


@pytest.mark.parametrize("packing", [True, False])
def test_packing_is_as_the_flag_says(packing: bool, tmp_path: Path) -> None:
    setup = prepare(parse([*short_run(tmp_path), "--packing", str(packing)]), lambda _: None)
    assert {objective.packing for objective in setup.objectives.values()} == {packing}


def test_a_budget_of_tokens_fills_the_micro_batches(tmp_path: Path) -> None:
    budget = 100
    trainer = make_trainer(Alright(0.5), tmp_path, model=make_policy(), max_tokens_per_batch=budget)
    assert max(map(row_tokens, train_rows()[Task.SFT])) <= budget
    sizes = []
    collate = SFTObjective.collate

    def spy(self: Any, rows: Any, pad: int) -> Any:
        sizes.append(sum(map(row_tokens, rows)))
        return collate(self, rows, pad)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SFTObjective, "collate", spy)
        trainer.train()
    assert sizes
    assert (
        budget - max(map(row_tokens, train_rows()[Task.SFT])) < min(sizes) <= max(sizes) <= budget
    )
    assert "tokens a step" in trainer.state_to_json()["identity"]["sft batch"]


def test_a_run_by_tokens_from_the_command_line(tmp_path: Path) -> None:
    main([*_without_rows(short_run(tmp_path, "--optima", "none")), "--max_tokens_per_batch", "128"])
    summary = read_json(tmp_path / "joint_summary.json")
    # 8 steps of one micro-batch of at most 128 tokens; a row has about 20.
    assert 8 * 100 < sum(summary["tokens"].values()) <= 8 * 128


@pytest.mark.parametrize("scheduler", [Mix(0.4), Alright(0.5)])
def test_parts_of_a_micro_batch_make_the_step_of_the_whole(
    scheduler: Scheduler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = llm.loss.objectives.response_logps

    def spy(model: Any, batch: Any) -> Any:
        seen.append(batch["input_ids"].numel())
        return forward(model, batch)

    monkeypatch.setattr(llm.loss.objectives, "response_logps", spy)
    losses, moved, most = [], [], []
    for budget in (10_000, 60):
        seen.clear()
        trainer = make_trainer(
            scheduler,
            tmp_path,
            **plain_sgd(max_tokens_per_forward=budget, gradient_accumulation_steps=2),
        )
        before = weights_of(trainer.model)
        trainer.train()
        after = weights_of(trainer.model)
        moved.append({name: after[name] - before[name] for name in after})
        losses.append(trainer.state.log_history[0]["loss"])
        most.append(max(seen))
    longest = max(row_tokens(row) for rows in train_rows().values() for row in rows)
    assert longest <= 60
    assert most[1] <= 60 < most[0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # sums of float32 in another order
    for name, value in moved[0].items():
        # plain SGD with rate 1: the step is the gradient
        torch.testing.assert_close(value, moved[1][name], rtol=1e-4, atol=1e-6)


def test_rows_are_split_in_order_and_to_the_brim() -> None:
    rows = [{"prompt_ids": [0] * n} for n in (3, 4, 2, 9, 1, 1)]
    parts = split_rows(rows, 7)
    assert [[len(row["prompt_ids"]) for row in part] for part in parts] == [
        [3, 4],
        [2],
        [9],
        [1, 1],
    ]
    assert split_rows(rows, None) == [rows]


def test_only_one_process_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tmp_path, max_tokens_per_forward=5)
    assert tokens_per_forward(args) == 5
    assert tokens_per_forward(arguments(tmp_path)) == CPU_TOKENS
    monkeypatch.setattr(type(args), "world_size", 2)
    assert tokens_per_forward(args) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_tokens_per_batch", "0"], "must be at least 1"),
        (["--max_tokens_per_batch", "9", "--packing", "false"], "not used with --packing false"),
        (
            ["--max_tokens_per_batch", "9", "--dpo_per_device_train_batch_size", "2"],
            "--dpo_per_device_train_batch_size is not used with --max_tokens_per_batch",
        ),
        (["--max_tokens_per_forward", "0"], "must be at least 1"),
        (["--max_tokens_per_forward", "9", "--packing", "false"], "not used with --packing false"),
        (["--attn_implementation", "eager"], "--attn_implementation is not used by packed"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse([*BASE, *flags])


def test_padded_batches_take_any_attention() -> None:
    config = parse([*BASE, "--packing", "false", "--attn_implementation", "eager"])
    assert config.model.attn_implementation == "eager"
