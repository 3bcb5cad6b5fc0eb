"""Which checkpoints a run may continue: its own, or with --force_resume another's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from _resume import (
    OPTIONS,
    SCHEDULERS,
    STEPS,
    interrupted,
    trained,
    with_adapters,
    with_dropout,
)
from _tiny import (
    OBJECTIVES,
    assert_same_weights,
    make_policy,
    make_trainer,
    short_run,
    train_rows,
)
from peft import LoraConfig, get_peft_model

from llm.flags.parse import parse
from llm.loss.objectives import DPOObjective
from llm.run import main
from llm.train.trainer import STATE_KEY, JointTrainer
from theory.cli import UserError
from theory.schedulers import (
    Alright,
    Mix,
    Single,
)
from theory.tasks import Task

# peft reads an attribute that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

# --- other settings

CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "lam": ({"scheduler": Alright(0.6, seed=4)}, "schedule is Alright"),
    "seed of the decisions": ({"scheduler": Alright(0.5, seed=5)}, "schedule is Alright"),
    "algorithm": ({"scheduler": Mix(0.5)}, "schedule is Alright"),
    "one objective": (
        {"scheduler": Single(Task.DPO), "tasks": [Task.DPO]},
        "schedule is .* its sft data is",
    ),
    "beta": ({"objectives": OBJECTIVES | {Task.DPO: DPOObjective(beta=0.2)}}, "dpo loss is .*0.1"),
    "fewer rows": ({"rows": {task: rows[1:] for task, rows in train_rows().items()}}, "dpo data"),
    "order of rows": (
        {"rows": train_rows() | {Task.SFT: train_rows()[Task.SFT][::-1]}},
        "sft data",
    ),
    "reference": (
        {
            "rows": train_rows()
            | {
                Task.DPO: [
                    row | {"ref_chosen_logps": row["ref_chosen_logps"] - 1.0}
                    for row in train_rows()[Task.DPO]
                ]
            }
        },
        "dpo reference",
    ),
    "data seed": ({"data_seed": 7}, "dpo order is seed 0, here seed 7"),
    "seed": ({"seed": 7, "data_seed": 0}, "seed is 0, here 7"),
    "learning rate": ({"learning_rate": 0.02}, "learning_rate is 0.01, here 0.02"),
    "length of the decay": ({"max_steps": 20}, "number of steps is 8, here 20"),
    "decay": ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type is linear, here cosine"),
    "warm-up": ({"warmup_steps": 3}, "warmup_steps is 2, here 3"),
    "clipping": ({"max_grad_norm": 0.5}, "max_grad_norm is 1.0, here 0.5"),
    "optimiser": ({"optim": "sgd"}, "optim is adamw"),
    "weight decay": ({"weight_decay": 0.2}, "weight_decay is 0.1, here 0.2"),
    "precision": ({"bf16": True}, "bf16 is False, here True"),
    "batch": ({"gradient_accumulation_steps": 2}, "dpo batch is 2 rows a step, here 4 rows a step"),
    "model": ({"model": make_policy(intermediate_size=48)}, "model is gpt_neox of"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of ALRIGHT after five steps."""
    return interrupted(Alright(0.5, seed=4), tmp_path_factory.mktemp("alright"))


def other_trainer(output_dir: Path, changes: dict[str, Any], **extra: Any) -> JointTrainer:
    options = {"model": with_dropout(0), "scheduler": Alright(0.5, seed=4), **OPTIONS, **changes}
    trainer = make_trainer(options.pop("scheduler"), output_dir, **options)
    for name, value in extra.items():
        setattr(trainer.args, name, value)
    return trainer


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_of_another_run_is_refused(
    change: str, checkpoint: Path, tmp_path: Path
) -> None:
    """Before any of it is loaded: other shapes would make torch stumble."""
    changes, named = CHANGES[change]
    with pytest.raises(UserError, match=f"belongs to another run: its .*{named}") as caught:
        other_trainer(tmp_path, changes).train(resume_from_checkpoint=str(checkpoint))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [{"logging_steps": 3}, {"save_strategy": "steps", "save_steps": 2}],
    ids=["logging", "saving"],
)
def test_what_does_not_shape_the_weights_is_free(
    changes: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    straight = other_trainer(tmp_path, {})
    trained(straight)
    continued = other_trainer(tmp_path, changes)
    continued.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(continued.model, straight.model)


def test_micro_batches_may_be_cut_otherwise(tmp_path: Path) -> None:
    """Four rows a step as 4 or as 2 x 2: the same rows, sums in another order (no dropout)."""
    sizes = {Task.DPO: 4, Task.SFT: 4}
    options = {"model": make_policy(), "batch_sizes": sizes}
    checkpoint = interrupted(Mix(0.5), tmp_path, **options)
    straight = other_trainer(tmp_path, {**options, "scheduler": Mix(0.5), "model": make_policy()})
    trained(straight)
    halves = {task: size // 2 for task, size in sizes.items()}
    changes = {"batch_sizes": halves, "gradient_accumulation_steps": 2, "model": make_policy()}
    continued = other_trainer(tmp_path, {"scheduler": Mix(0.5), **changes})
    continued.train(resume_from_checkpoint=str(checkpoint))
    assert continued.state_to_json()["consumed"] == straight.state_to_json()["consumed"]
    # Three AdamW steps of at most 0.01: rounding moves a weight by a small part of them.
    assert_same_weights(continued.model, straight.model, 1e-4)


def test_a_run_with_a_constant_learning_rate_may_be_continued_for_longer(tmp_path: Path) -> None:
    constant = {"lr_scheduler_type": "constant_with_warmup", "model": with_dropout(0)}
    checkpoint = interrupted(Alright(0.5, seed=4), tmp_path, **constant)
    straight, longer = (
        other_trainer(tmp_path, {**constant, "model": with_dropout(0), "max_steps": 12})
        for _ in range(2)
    )
    expected, actual = trained(straight), trained(longer, checkpoint)
    assert len(actual["losses"]) == 12
    assert actual["losses"] == expected["losses"]
    assert_same_weights(longer.model, straight.model)


def test_a_share_of_warm_up_ties_even_a_constant_rate_to_the_number_of_steps(
    tmp_path: Path,
) -> None:
    share = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.5}
    checkpoint = interrupted(Alright(0.5, seed=4), tmp_path, **share)
    longer = other_trainer(tmp_path, {**share, "max_steps": 12})
    with pytest.raises(UserError, match="number of steps is 8, here 12"):
        longer.train(resume_from_checkpoint=str(checkpoint))


def test_another_base_model_under_the_same_adapter_is_refused(tmp_path: Path) -> None:
    """Only the adapter is in the checkpoint: nothing else would notice."""
    checkpoint = interrupted(Mix(0.5), tmp_path, model=with_adapters(0))
    other = get_peft_model(
        make_policy(seed=3),
        LoraConfig(r=2, lora_dropout=0.3, target_modules=["query_key_value", "dense"]),
    )
    with pytest.raises(UserError, match=r"its model is .* frozen weights"):
        other_trainer(tmp_path, {"scheduler": Mix(0.5), "model": other}).train(str(checkpoint))


# --- forced


@pytest.mark.parametrize("change", ["beta", "seed", "fewer rows", "algorithm", "one objective"])
def test_a_forced_resume_says_what_differs_and_goes_on(
    change: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, _ = CHANGES[change]
    trainer = other_trainer(tmp_path, changes, force_resume=True)
    mine, saved = trainer._identity, json.loads((checkpoint / "trainer_state.json").read_text())
    theirs = saved["stateful_callbacks"][STATE_KEY]["identity"]
    differ = {name for name in mine | theirs if mine.get(name) != theirs.get(name)}
    trainer.train(resume_from_checkpoint=str(checkpoint))
    lines = [line for line in capsys.readouterr().out.splitlines() if "--force_resume" in line]
    assert {line.split("checkpoint's ")[1].split(" is ")[0] for line in lines} == differ
    assert len(lines) == len(differ) > 0
    assert trainer.state.global_step == len(trainer.decisions) == STEPS


def test_a_forced_change_to_maxright_probes_at_once(checkpoint: Path, tmp_path: Path) -> None:
    """Step 5 lies between two probes: the values that MAXRIGHT would remember are not there."""
    scheduler = replace(SCHEDULERS["maxright"], refresh_every=7)
    trainer = other_trainer(tmp_path, {"scheduler": scheduler}, force_resume=True)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.probes == 2  # on arrival and at step 7
    assert trainer.state.global_step == STEPS


# --- from the command line


@pytest.mark.usefixtures("short_base_training")
def test_a_killed_run_goes_on_under_other_settings_only_if_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--save_strategy", "steps", "--save_steps", "4", "--optima", "none"]
    main(short_run(tmp_path, *flags))
    for name in ("joint_summary.json", "checkpoint-8/manifest.json"):  # killed in its last steps
        (tmp_path / name).unlink()
    other = short_run(tmp_path, *flags, "--beta", "0.2", "--resume_from_checkpoint", "true")
    with pytest.raises(UserError, match=r"its dpo loss is .*beta=0.1.*, here .*beta=0.2"):
        main(other)
    assert "checkpoint-8 is damaged: manifest.json is missing" in capsys.readouterr().out
    assert json.loads((tmp_path / "joint_config.json").read_text())["training"]["beta"] == 0.1
    main([*other, "--force_resume", "true"])
    assert "--force_resume: the checkpoint's dpo loss is" in capsys.readouterr().out
    assert json.loads((tmp_path / "joint_config.json").read_text())["training"]["beta"] == 0.2
    assert len(json.loads((tmp_path / "schedule.json").read_text())["decisions"]) == 8


def test_forcing_what_is_not_resumed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--force_resume is not used without"):
        parse(short_run(tmp_path, "--force_resume", "true"))
