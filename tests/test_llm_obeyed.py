"""llm.flags.obeyed: a setting of transformers acts here, or is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _tiny import arguments, assert_same_weights, eval_rows, make_policy, make_trainer
from transformers import TrainingArguments

from llm.flags import obeyed
from llm.flags.obeyed import NOT_HERE, OBEYED
from llm.train.trainer import JointTrainer
from theory.cli import UserError
from theory.schedulers import Single
from theory.tasks import Task

FIELDS = {each.name: each for each in dataclasses.fields(TrainingArguments)}


def another(name: str) -> Any:
    """A value of the field's type that is not its default."""
    default = FIELDS[name].default
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 1
    return "other"


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - OBEYED.keys()))
def test_a_field_outside_the_table_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"does not obey --{name}") as caught:
        arguments(tmp_path, use_cpu=False, **{name: another(name)})
    assert "\n" not in str(caught.value)


def test_what_the_table_has_not_heard_of_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a field of a newer transformers would be."""
    arguments(tmp_path, weight_decay=0.5)
    monkeypatch.delitem(obeyed.OBEYED, "weight_decay")
    with pytest.raises(UserError, match="--weight_decay"):
        arguments(tmp_path, weight_decay=0.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hub_strategy", "checkpoint"),
        ("hub_strategy", "all_checkpoints"),
        ("optim", "galore_adamw_layerwise"),
        ("debug", "tpu_metrics_debug"),
    ],
)
def test_a_value_that_would_be_ignored_is_refused(name: str, value: str, tmp_path: Path) -> None:
    assert name in NOT_HERE
    with pytest.raises(UserError, match=f"does not obey --{name}"):
        arguments(tmp_path, **{name: value})


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_what_transformers_sets_itself_is_no_wish(strategy: str, tmp_path: Path) -> None:
    """A copy holds what transformers has made of the defaults on this device."""
    first = arguments(tmp_path, eval_strategy=strategy)
    assert first.do_eval is (strategy == "steps")
    assert first.dataloader_pin_memory is False
    assert dataclasses.replace(first, max_steps=3).do_eval is first.do_eval
    if strategy == "steps":
        with pytest.raises(UserError, match="--do_eval"):
            dataclasses.replace(first, eval_strategy="no")


def trained(output_dir: Path, **settings: Any) -> JointTrainer:
    """After four steps of SFT."""
    held_out = {Task.SFT: eval_rows()[Task.SFT]}
    trainer = make_trainer(
        Single(Task.SFT),
        output_dir,
        tasks=(Task.SFT,),
        held_out=held_out,
        **({"max_steps": 4} | settings),
    )
    trainer.train()
    return trainer


def option(name: str) -> Callable[[JointTrainer], Any]:
    return lambda trainer: trainer.optimizer.param_groups[0][name]


def steps_with(key: str) -> Callable[[JointTrainer], list[int]]:
    return lambda trainer: [line["step"] for line in trainer.state.log_history if key in line]


def rates(trainer: JointTrainer) -> list[float]:
    lines = trainer.state.log_history
    return [round(line["learning_rate"], 6) for line in lines if "learning_rate" in line]


def saved(trainer: JointTrainer) -> list[str]:
    return sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*"))


def saved_optimizers(trainer: JointTrainer) -> int:
    return len(list(Path(trainer.args.output_dir).glob("checkpoint-*/optimizer.pt")))


STEPS = {"save_strategy": "steps", "save_steps": 1}
ACTS: dict[str, tuple[dict[str, Any], Callable[[JointTrainer], Any], Any]] = {
    "adam_betas": ({"adam_beta1": 0.5, "adam_beta2": 0.6}, option("betas"), (0.5, 0.6)),
    "adam_epsilon": ({"adam_epsilon": 0.25}, option("eps"), 0.25),
    "weight_decay": ({"weight_decay": 0.125}, option("weight_decay"), 0.125),
    "optim_args": ({"optim": "sgd", "optim_args": "momentum=0.75"}, option("momentum"), 0.75),
    "warmup": (
        {"warmup_steps": 2, "lr_scheduler_type": "linear", "learning_rate": 1.0},
        rates,
        [0.0, 0.5, 1.0, 0.5],
    ),
    "kwargs of the schedule": (
        {
            "lr_scheduler_type": "polynomial",
            "lr_scheduler_kwargs": {"power": 2.0, "lr_end": 0.0},
            "learning_rate": 1.0,
        },
        rates,
        [1.0, 0.5625, 0.25, 0.0625],
    ),
    "logging_steps": ({"logging_steps": 2}, steps_with("loss"), [2, 4]),
    "logging_first_step": (
        {"logging_steps": 4, "logging_first_step": True},
        steps_with("loss"),
        [1, 4],
    ),
    "eval_steps": (
        {"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 3},
        steps_with("eval_sft_loss"),
        [4],
    ),
    "eval_on_start": ({"eval_on_start": True}, steps_with("eval_sft_loss"), [0]),
    "save_steps": (STEPS | {"save_steps": 2}, saved, ["checkpoint-2", "checkpoint-4"]),
    "save_total_limit": (STEPS | {"save_total_limit": 2}, saved, ["checkpoint-3", "checkpoint-4"]),
    "save_only_model": (STEPS | {"save_only_model": True}, saved_optimizers, 0),
    "skip_memory_metrics": (
        {"skip_memory_metrics": False},
        steps_with("train_mem_cpu_alloc_delta"),
        [4],
    ),
    "gradient_accumulation_steps": (
        {"gradient_accumulation_steps": 3},
        lambda trainer: trainer.streams[Task.SFT].consumed,
        4 * 3 * 3,
    ),
    "data_seed": ({"data_seed": 7}, lambda trainer: trainer.streams[Task.SFT].seed, 7),
    "seed": ({"seed": 9}, lambda trainer: trainer.streams[Task.SFT].seed, 9),
    "activation checkpoints": (
        {"activation_checkpointing": True},
        lambda trainer: trainer.model.is_activation_checkpointing,
        True,
    ),
    "full_determinism": (
        {"full_determinism": True},
        lambda _: torch.are_deterministic_algorithms_enabled(),
        True,
    ),
}


@pytest.mark.parametrize("name", ACTS)
def test_an_obeyed_setting_acts(name: str, tmp_path: Path) -> None:
    settings, seen, expected = ACTS[name]
    assert settings.keys() <= OBEYED.keys()
    try:
        found = seen(trained(tmp_path / "with", **settings))
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == expected
    assert seen(trained(tmp_path / "without", **_needed(settings))) != expected


def _needed(settings: dict[str, Any]) -> dict[str, Any]:
    """What a setting needs beside it."""
    return {n: v for n, v in settings.items() if n in ("save_strategy", "optim", "learning_rate")}


@pytest.mark.parametrize("bf16", [False, True])
def test_bf16_is_the_type_of_the_products(bf16: bool, tmp_path: Path) -> None:
    types = set()
    model = make_policy()
    model.gpt_neox.layers[0].mlp.dense_h_to_4h.register_forward_hook(
        lambda module, args, output: types.add(output.dtype)
    )
    trainer = make_trainer(Single(Task.SFT), tmp_path, model=model, max_steps=1, bf16=bf16)
    trainer.train()
    assert types == {torch.bfloat16 if bf16 else torch.float32}


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's, in its tracing
def test_torch_compile_compiles_the_model_of_the_step(tmp_path: Path) -> None:
    compiled = trained(tmp_path, torch_compile_backend="eager", max_steps=1)
    assert isinstance(compiled.model_wrapped, torch._dynamo.eval_frame.OptimizedModule)
    # One step of Adam moves every weight by about the learning rate, 1e-2.
    assert_same_weights(compiled.model, trained(tmp_path, max_steps=1).model, 1e-4)


def test_debug_watches_for_overflows(tmp_path: Path) -> None:
    trainer = trained(tmp_path, debug="underflow_overflow", max_steps=1)
    assert all(module._forward_hooks for module in trainer.model.gpt_neox.layers)
