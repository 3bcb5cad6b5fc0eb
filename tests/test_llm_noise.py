"""llm.train.noise, and what else a step must not do to the numbers: half precision, averages."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _tiny import (
    PAD_ID,
    TOKENIZER,
    assert_same_weights,
    make_policy,
    make_trainer,
    plain_sgd,
    train_rows,
    weights_of,
)
from transformers import AutoModelForCausalLM, MixtralConfig

from llm.loss.collate import collate_preference
from llm.loss.packing import pack_preference
from llm.run import main
from llm.train.noise import Dropout, EmbeddingNoise, row_lengths
from theory.cli import UserError
from theory.schedulers import Maxright, Mix, Sequential, Single
from theory.scheduling import Scheduler
from theory.tasks import Task

DROPPING = {"hidden_dropout": 0.3, "attention_dropout": 0.3}
LOG2 = pytest.approx(math.log(2.0), abs=1e-5)


def first_log(scheduler: Scheduler, where: Path, **options: Any) -> dict[str, float]:
    trainer = make_trainer(scheduler, where, model=make_policy(**DROPPING), max_steps=1, **options)
    trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize("task", Task)
def test_dropout_is_for_demonstrations(task: Task, tmp_path: Path) -> None:
    """The reference is the policy without dropout: DPO starts at log 2 or it is another loss."""
    name = f"{task.label}_loss"
    plain = make_trainer(Single(task), tmp_path, max_steps=1)
    plain.train()
    exact = plain.state.log_history[0][name]
    kept = first_log(Single(task), tmp_path, disable_dropout=False)[name]
    assert abs(kept - exact) > 1e-3
    default = first_log(Single(task), tmp_path)[name]
    assert default == (LOG2 if task == Task.DPO else kept)


def test_a_probe_of_dpo_is_without_dropout_too(tmp_path: Path) -> None:
    trainer = make_trainer(
        Maxright(0.5, (0.0, 0.0), refresh_every=1),
        tmp_path,
        model=make_policy(**DROPPING),
        max_steps=1,
    )
    trainer.train()
    assert trainer.schedule.values is not None
    assert float(trainer.schedule.values[Task.DPO]) == LOG2


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_what_the_backward_computes_again_has_the_dropout_of_its_forward(tmp_path: Path) -> None:
    """Mix steps on both at once: with checkpointed layers neither has dropout."""
    stepped = []
    for options in ({}, DROPPING):
        trainer = make_trainer(
            Mix(0.4),
            tmp_path,
            model=make_policy(**options),
            **plain_sgd(gradient_checkpointing=True),
        )
        trainer.train()
        stepped.append(trainer.model)
        assert trainer.dropout.on
    assert_same_weights(stepped[1], stepped[0], 1e-7)


def test_every_rate_is_switched_and_comes_back() -> None:
    model = make_policy(**DROPPING)
    dropout, rates = Dropout(model), [v for _, _, v in Dropout(model).rates]
    assert len(rates) >= 3, "of embeddings, attention, residuals"
    dropout.switch(False)
    assert Dropout(model).rates == []
    dropout.switch(True)
    assert [v for _, _, v in Dropout(model).rates] == rates


def test_noise_on_embeddings_knows_the_row_and_not_the_pack() -> None:
    rows = train_rows()[Task.DPO][:3]
    packed, padded = pack_preference(rows), collate_preference(rows, PAD_ID)
    prompts = [len(row["prompt_ids"]) for row in rows]
    expected = [
        length
        for row, prompt in zip(rows, prompts, strict=True)
        for length, count in (
            (prompt + len(row["chosen_ids"]), prompt + len(row["chosen_ids"])),
            (prompt + len(row["rejected_ids"]), len(row["rejected_ids"])),
        )
        for _ in range(count)
    ]
    assert row_lengths(packed)[0].tolist() == expected
    sides = ("chosen_ids", "rejected_ids")
    by_row = [[p + len(r[side])] for side in sides for r, p in zip(rows, prompts, strict=True)]
    assert row_lengths(padded).tolist() == by_row
    model, noise = make_policy(), EmbeddingNoise(5.0)
    noise.batch = packed
    with noise.on(model), torch.no_grad():
        embedded = model.get_input_embeddings().train()(packed["input_ids"])
        assert torch.equal(
            model.eval().get_input_embeddings()(packed["input_ids"]),
            model.get_input_embeddings().weight[packed["input_ids"]],
        )
    added = embedded - model.get_input_embeddings().weight[packed["input_ids"]]
    bound = 5.0 / (row_lengths(packed) * embedded.shape[-1]).sqrt()
    largest = (added.abs().amax(-1) / bound).detach()
    # Of 16 uniform draws: at most the bound, and below half of it once in 2^16.
    assert float(largest.max()) <= 1.0 + 1e-5
    assert float(largest.min()) > 0.5


def test_a_run_with_noise_on_embeddings_takes_another_step(tmp_path: Path) -> None:
    losses = []
    for alpha in (None, 5.0):
        trainer = make_trainer(Single(Task.SFT), tmp_path, max_steps=1, neftune_noise_alpha=alpha)
        trainer.train()
        losses.append(trainer.state.log_history[0]["sft_loss"])
        assert not trainer.model.get_input_embeddings()._forward_hooks
    assert abs(losses[0] - losses[1]) > 1e-4


# --- schedule-free optimisers


class Averaging(torch.optim.SGD):
    """As schedulefree's: in evaluation the weights are 1 larger than where it steps."""

    training = True

    def _move(self, training: bool) -> None:
        if training != self.training:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(-1.0 if training else 1.0)
        self.training = training

    def eval(self) -> None:
        self._move(False)

    def train(self) -> None:
        self._move(True)


def test_averages_are_what_is_evaluated_and_saved(tmp_path: Path) -> None:
    model = make_policy()
    trainer = make_trainer(Single(Task.SFT), tmp_path, model=model, max_steps=2)
    trainer.optimizer = Averaging(model.parameters(), lr=0.0)
    start = weights_of(model)
    trainer.train()
    with trainer.averaged_weights():
        inside = weights_of(model)
    for name, value in weights_of(model).items():
        torch.testing.assert_close(value, start[name])
        torch.testing.assert_close(inside[name], start[name] + 1.0)
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    for name, value in saved.items():
        torch.testing.assert_close(value, start[name] + 1.0)
    averaged = make_policy()
    averaged.load_state_dict(saved)
    rows = {Task.SFT: train_rows()[Task.SFT]}
    expected = make_trainer(Single(Task.SFT), tmp_path, model=averaged).held_out(rows)
    assert trainer.held_out(rows) == pytest.approx(expected)


def test_stages_with_a_schedule_free_optimiser_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no stages that start anew"):
        make_trainer(Sequential(2, "sft_then_dpo"), tmp_path, optim="schedule_free_adamw")


# --- models and flags


@pytest.mark.usefixtures("temporary_datasets_cache")
@pytest.mark.parametrize("algo", ["sft", "alright", "mix"])
def test_weights_in_bfloat16_train_on_a_cpu(
    algo: str, own: Callable[..., list[str]], tmp_path: Path
) -> None:
    main(own("--algo", algo, "--dtype", "bfloat16", "--learning_rate", "1e-2"))
    held_out = json.loads((tmp_path / "out" / "joint_summary.json").read_text())["held_out"]
    assert held_out["after"]["sft_loss"] < held_out["before"]["sft_loss"] - 0.1


@pytest.mark.usefixtures("temporary_datasets_cache")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_all_linear_layers_get_adapters(own: Callable[..., list[str]], tmp_path: Path) -> None:
    main(own("--algo", "sft", "--use_peft", "true", "--lora_target_modules", "all-linear"))
    record = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    names = {name.split(".")[-1] for name in record["target_modules"]}
    assert names == {"dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"}


@pytest.mark.usefixtures("temporary_datasets_cache")
def test_a_loss_of_the_router_that_would_be_left_out_is_refused(
    own: Callable[..., list[str]], tmp_path: Path
) -> None:
    config = MixtralConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        output_router_logits=True,
    )
    command = own("--algo", "sft")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="set output_router_logits to false"):
        main(command)
