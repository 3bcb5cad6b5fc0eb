"""Resuming: a run that was interrupted ends, bit for bit, as if it had not been.

Here in one process: training stops right after a checkpoint and a fresh trainer, of other initial
weights, continues. `test_llm_kill.py` kills real processes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from _resume import (
    AT,
    OPTIONS,
    SCHEDULERS,
    STEPS,
    VARIANTS,
    interrupted,
    trained,
    with_adapters,
)
from _tiny import (
    assert_moved,
    assert_same_weights,
    eval_rows,
    make_policy,
    make_trainer,
)
from safetensors.torch import load_file

from llm.train.callbacks import JsonLines
from llm.train.trainer import STATE_KEY
from theory.cli import UserError
from theory.schedulers import (
    REGISTRY,
    Alright,
    Mix,
    Single,
)
from theory.tasks import Task

# peft reads an attribute that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def test_every_algorithm_is_tested_here() -> None:
    assert {name.split(",")[0] for name in SCHEDULERS} >= set(REGISTRY)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_resumed_run_is_the_straight_run_bit_for_bit(
    name: str, variant: str, tmp_path: Path
) -> None:
    model, options = VARIANTS[variant]
    checkpoint = interrupted(SCHEDULERS[name], tmp_path, model=model(0), **options)
    saved = json.loads((checkpoint / "trainer_state.json").read_text())
    state = saved["stateful_callbacks"][STATE_KEY]
    assert state["schedule"]["step"] == len(state["decisions"]) == AT

    straight, continued = (
        make_trainer(SCHEDULERS[name], tmp_path, model=model(seed), **OPTIONS, **options)
        for seed in (0, 9)
    )
    expected, actual = trained(straight), trained(continued, checkpoint)
    assert len(actual["schedule"]["decisions"]) == STEPS
    assert len(actual["losses"]) == STEPS
    assert_same_weights(continued.model, straight.model)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert any(
        not torch.equal(value, start)
        for value, start in zip(straight.model.parameters(), model(0).parameters(), strict=True)
    )


def test_a_checkpoint_of_the_last_step_gets_no_other_step(tmp_path: Path) -> None:
    """In the middle of an epoch, at a rate that would move the weights."""
    options = OPTIONS | {"lr_scheduler_type": "constant", "model": with_adapters(0)}
    checkpoint = interrupted(Mix(0.5), tmp_path, save_steps=STEPS, **options)
    straight = make_trainer(Mix(0.5), tmp_path, **options | {"model": with_adapters(0)})
    trained(straight)
    again = make_trainer(Mix(0.5), tmp_path, **options | {"model": with_adapters(9)})
    again.train(str(checkpoint))
    assert again.state.global_step == len(again.decisions) == STEPS
    assert_same_weights(again.model, straight.model)
    shorter = make_trainer(Mix(0.5), tmp_path, **options | {"max_steps": STEPS - 1})
    with pytest.raises(UserError, match="is of step 8, beyond the 7 steps of this run"):
        shorter.train(str(checkpoint))


def test_a_resumed_run_logs_every_line_once(tmp_path: Path) -> None:
    """Also the evaluations of the start and of the checkpoint's step; later lines are dropped."""
    options = {**OPTIONS, "held_out": eval_rows(), "eval_strategy": "steps", "eval_steps": 1}
    options |= {"eval_on_start": True, "save_strategy": "steps", "save_steps": AT}
    lines = []
    for checkpoint in (None, str(tmp_path / f"checkpoint-{AT}")):
        trainer = make_trainer(Mix(0.5), tmp_path, model=with_adapters(0), **options)
        trainer.add_callback(JsonLines(tmp_path / "metrics.jsonl"))
        trainer.train(checkpoint)
        logs = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        lines.append([(log["step"], {n for n in log if "time_" not in n}) for log in logs])
    assert lines[1] == lines[0]
    assert len(lines[0]) == 1 + 2 * STEPS + 1


def test_dropout_is_drawn_anew_after_the_checkpoint(tmp_path: Path) -> None:
    """What the matrix above would not notice if dropout were off: the masks matter."""
    runs = []
    for seed in (0, 1):
        trainer = make_trainer(Mix(0.5), tmp_path, model=with_adapters(0), **OPTIONS)
        torch.manual_seed(seed)
        trainer.train()
        runs.append(trainer.state.log_history[-1]["train_loss"])
    assert runs[0] != runs[1]


def test_the_trained_head_of_gpt_neox_is_restored(tmp_path: Path) -> None:
    """Upstream's resume leaves it behind: the checkpoint calls it embed_out, the model lm_head."""
    checkpoint = interrupted(Single(Task.SFT), tmp_path)
    saved = load_file(checkpoint / "model.safetensors")
    assert "embed_out.weight" in saved  # else upstream has renamed it and the override can go
    fresh = make_trainer(Single(Task.SFT), tmp_path, model=make_policy(seed=9))
    fresh._load_from_checkpoint(str(checkpoint))
    assert torch.equal(fresh.model.lm_head.weight, saved["embed_out.weight"])
    assert_moved(fresh.model, make_policy())


def test_a_checkpoint_without_a_schedule_is_refused(tmp_path: Path) -> None:
    checkpoint = interrupted(Alright(0.5, seed=4), tmp_path)
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"][STATE_KEY]
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match="not written by this trainer"):
        make_trainer(Alright(0.5, seed=4), tmp_path, **OPTIONS).train(str(checkpoint))


def test_a_checkpoint_holds_plain_data(tmp_path: Path) -> None:
    trainer = make_trainer(SCHEDULERS["maxright"], tmp_path)
    trainer.train()
    state = trainer.state_to_json()
    assert json.loads(json.dumps(state)) == state
