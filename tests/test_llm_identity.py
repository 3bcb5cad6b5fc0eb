"""Which checkpoints a run may continue: its own, or with --force_resume another's."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from dataclasses import fields, replace
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

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
    TOKENIZER,
    assert_same_weights,
    eval_rows,
    make_policy,
    make_trainer,
    short_run,
    train_rows,
)
from peft import LoraConfig, get_peft_model

from llm.compare.__main__ import main as compare
from llm.compare.pool import shared_fingerprint
from llm.data.encode import DropReport, Encoded
from llm.flags.arguments import DataArguments, JointArguments, ModelArguments, RunConfig
from llm.flags.parse import parse
from llm.loss.objectives import DPOObjective
from llm.model.reference import numerics
from llm.run import main
from llm.setup import Setup
from llm.single_runs import estimate_fingerprint
from llm.train.free import COMPARISON, OPTIMA, REFERENCE, RESUME, counting, differing
from llm.train.identity import describe_model, run_identity
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
    "noise": ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is not set, here 5.0"),
    "options of the decay": (
        {"lr_scheduler_kwargs": {"num_cycles": 2}},
        "lr_scheduler_kwargs.num_cycles is not set, here 2",
    ),
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
    [
        {"logging_steps": 3},
        {"save_strategy": "steps", "save_steps": 2},
        {"eval_strategy": "steps", "eval_steps": 2, "held_out": eval_rows()},
    ],
    ids=["logging", "saving", "evaluating"],
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
    with pytest.raises(UserError, match="its frozen weights is"):
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
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    identity = saved["stateful_callbacks"][STATE_KEY]["identity"]
    assert counting(parse(other).model, free=RESUME).items() <= identity.items()
    differ = r"its dpo loss is .*beta=0.1.*, here .*beta=0.2.*; its neftune_noise_alpha is not set"
    with pytest.raises(UserError, match=f"run: {differ}, here 50.0 "):
        main([*other, "--neftune_noise_alpha", "50"])
    assert "checkpoint-8 is damaged: manifest.json is missing" in capsys.readouterr().out
    assert json.loads((tmp_path / "joint_config.json").read_text())["training"]["beta"] == 0.1
    main([*other, "--force_resume", "true"])
    assert "--force_resume: the checkpoint's dpo loss is" in capsys.readouterr().out
    assert json.loads((tmp_path / "joint_config.json").read_text())["training"]["beta"] == 0.2
    assert len(json.loads((tmp_path / "schedule.json").read_text())["decisions"]) == 8


def test_forcing_what_is_not_resumed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--force_resume is not used without"):
        parse(short_run(tmp_path, "--force_resume", "true"))


@pytest.mark.usefixtures("short_base_training")
def test_a_comparison_trains_again_what_a_setting_has_changed(tmp_path: Path) -> None:
    flags = [*short_run(tmp_path)[:4], "--max_steps", "4", "--max_train_rows", "24", "--seeds", "1"]
    flags += ["--max_eval_rows", "8", "--algos", "mix", "--lams", "0.5", "--learning_rates", "1e-3"]
    flags += ["--budgets", "steps", "--jobs", "1", "--out", str(tmp_path)]
    kept = []
    for noise in ([], [], ["--neftune_noise_alpha", "50"]):
        compare([*flags, *noise])
        kept.append(len(list(tmp_path.glob("runs/*/result.json"))))
    assert kept == [3, 3, 6]  # one on each objective, one on both
    values = [json.loads(path.read_text()) for path in tmp_path.glob("runs/mix*/result.json")]
    assert values[0]["f_sft"] != values[1]["f_sft"]


# --- every setting

ARGUMENTS = (ModelArguments, DataArguments, JointArguments)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> JointTrainer:
    return other_trainer(tmp_path_factory.mktemp("every setting"), {})


@pytest.fixture(scope="module")
def setup(trainer: JointTrainer) -> Setup:
    report = DropReport(17, 17, 0)
    train, held_out = (
        {task: Encoded(rows[task], task.label, report) for task in Task}
        for rows in (train_rows(), eval_rows())
    )
    return Setup(TOKENIZER, make_policy, OBJECTIVES, train, held_out, "seed 0")


def of_resumed_run(config: RunConfig, setup: Setup, trainer: JointTrainer) -> Any:
    return run_identity(
        config.training,
        trainer.model,
        schedule=repr(trainer.scheduler),
        num_steps=STEPS,
        objectives=OBJECTIVES,
        streams=trainer.streams,
        train_rows=trainer.train_rows,
        value_rows={},
        settings=counting(config.model, config.data, free=RESUME),
    )


USES = {
    "resume": (of_resumed_run, RESUME),
    "comparison": (lambda config, setup, _: shared_fingerprint(config, setup), COMPARISON),
    "optima": (lambda config, setup, _: estimate_fingerprint(setup, config), OPTIMA),
    "reference": (lambda config, *_: numerics(config), REFERENCE),
}


def others(kind: Any, value: Any) -> list[Any]:
    """Values of the type `kind` (of a union: of its members), all other than `value`."""
    if members := get_args(kind):
        if get_origin(kind) in (Union, UnionType):
            return [other for each in members for other in others(each, value)]
        if get_origin(kind) is Literal:
            return [each for each in members if each != value]
    kind = get_origin(kind) or kind
    if issubclass(kind, Enum):
        return [each for each in kind if each != value]
    if kind is dict:
        return [{"a": {"b": 1}}, {"a": {"b": 2}}]
    made = {bool: not value, int: 7, float: 0.375, str: "another", list: ["another"]}
    return [] if kind is NoneType else [made[kind] if kind in made else kind()]


def changed(config: RunConfig) -> Iterator[tuple[str, list[RunConfig]]]:
    """Every field of every argument class, and the configuration with each other value of it."""
    for part in ("model", "data", "training"):
        arguments = getattr(config, part)
        kinds = get_type_hints(type(arguments))
        for name in (each.name for each in fields(arguments)):
            found = []
            for value in others(kinds[name], getattr(arguments, name)):
                other = copy.copy(arguments)  # as replace, which would check them together
                setattr(other, name, value)
                found.append(replace(config, **{part: other}))
            yield name, found


@pytest.mark.parametrize("use", USES)
def test_every_setting_counts_unless_it_is_named_as_free(
    use: str, setup: Setup, trainer: JointTrainer
) -> None:
    identity_of, free = USES[use]
    config = RunConfig(ModelArguments(), DataArguments(), trainer.args)
    mine, seen = repr(identity_of(config, setup, trainer)), 0
    for name, configs in changed(config):
        if use == "reference" and name not in get_type_hints(ModelArguments):
            continue
        assert configs, name
        told = {repr(identity_of(each, setup, trainer)) for each in configs} - {mine}
        assert name in free or len(told) == len(configs), name
        seen += bool(told)
    assert seen > (3 if use == "reference" else 40)


def test_what_is_free_is_a_setting_and_has_a_reason() -> None:
    settings = {each.name for arguments in ARGUMENTS for each in fields(arguments)}
    named = {name: reason for _, free in USES.values() for name, reason in free.items()}
    assert all(named.values())
    assert not named.keys() - settings


def test_a_file_of_settings_counts_by_its_content(tmp_path: Path, trainer: JointTrainer) -> None:
    path, told = tmp_path / "ds.json", []
    args = copy.copy(trainer.args)
    args.deepspeed = str(path)
    for rate in ("1", "2"):
        path.write_text(rate)
        os.utime(path, (1e9, 1e9))
        told.append(counting(args, free=RESUME))
    assert told[0] != told[1]


@pytest.mark.parametrize("change", [{"lora_alpha": 32}, {"use_rslora": True}, {"bias": "all"}])
def test_an_adapter_counts_by_its_whole_configuration(change: dict[str, Any]) -> None:
    options = {"r": 2, "target_modules": ["query_key_value", "dense"]}
    told = [
        describe_model(get_peft_model(make_policy(), LoraConfig(**options, **extra)))
        for extra in ({}, {}, change)
    ]
    assert told[0] == told[1]
    (name,) = change
    assert f"model adapter default.{name}" in differing(told[0], told[2])
