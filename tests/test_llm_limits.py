"""Numbers, combinations and machines that a run cannot have: one line, before a model is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from _asserts import refusal
from _tiny import make_policy
from test_llm_config import write_yaml

from llm import optima, run
from llm.compare.settings import parse as parse_comparison
from llm.flags.limits import LIMITS
from llm.flags.machine import least_bytes
from llm.flags.parse import parse
from theory.cli import UserError
from theory.gap_experiment import main as gap_experiment

CPU = ["--use_cpu", "true"]
REFUSED = """
--max_steps 0 | --max_steps is 0
--max_steps -2 | --max_steps is -2
--max_steps -1 --num_train_epochs 0 | --num_train_epochs is 0
--max_steps -1 --num_train_epochs inf | --num_train_epochs is inf
--max_grad_norm nan | --max_grad_norm is nan
--max_grad_norm -1 | --max_grad_norm is -1
--weight_decay -0.1 | --weight_decay is -0.1
--learning_rate nan | --learning_rate is nan
--learning_rate -1 | --learning_rate is -1
--adam_beta1 1 | --adam_beta1 is 1
--adam_beta2 -0.5 | --adam_beta2 is -0.5
--adam_epsilon inf | --adam_epsilon is inf
--warmup_steps inf | --warmup_steps is inf
--neftune_noise_alpha -5 | --neftune_noise_alpha is -5
--gradient_accumulation_steps 0 | --gradient_accumulation_steps is 0
--per_device_eval_batch_size 0 | --per_device_eval_batch_size is 0
--seed -1 | --seed is -1
--data_seed -1 | --data_seed is -1
--ddp_timeout 0 | --ddp_timeout is 0
--lora_alpha 0 --model_name_or_path m | --lora_alpha is 0
--save_steps 0 | --save_steps is 0
--save_steps nan | --save_steps is nan
--eval_steps 0 | --eval_steps is 0
--eval_steps -3 | --eval_steps is -3
--eval_delay -1 | --eval_delay is -1
--logging_steps -1 | --logging_steps is -1
--save_steps 5 --save_total_limit 0 | --save_total_limit is 0
--save_steps 5 --save_strategy epoch | --save_steps is not used with --save_strategy epoch
--eval_steps 5 --eval_strategy no | --eval_steps is not used with --eval_strategy no
--logging_steps 5 --logging_strategy epoch | --logging_steps is not used with
--num_train_epochs 3 | --num_train_epochs is not used with --max_steps 600
--lr_scheduler_type constant --warmup_steps 3 | --warmup_steps is not used with
--optim sgd --adam_beta1 0.5 | --adam_beta1 is not used with --optim sgd
--optim_args a=1 | --optim_args is not used with --optim adamw
--optim_target_modules all-linear | --optim_target_modules is not used with --optim
--eval_strategy no --eval_delay 2 | --eval_delay is not used with --eval_strategy no
--metric_for_best_model dpo_loss | --metric_for_best_model is not used with
--save_total_limit 3 | --save_total_limit is not used with --save_strategy
--activation_checkpointing_kwargs {} | --activation_checkpointing_kwargs is not used with
--hub_model_id me/model | --hub_model_id is not used with --push_to_hub false
--report_to tensorboard --trackio_space_id a | --trackio_space_id is not used with
--run_name mine | --run_name is not used with --report_to none
--config a.yaml --config b.yaml | --config is given twice
--config a.yaml --config=b.yaml | --config is given twice
--lerning_rate 1 | did you mean --learning_rate?
--save-step=1 | did you mean --save-steps?
--quite_another 1 | unrecognized arguments: --quite_another 1 (see
"""


@pytest.mark.parametrize("line", REFUSED.strip().splitlines())
def test_what_no_run_can_obey_is_refused(line: str) -> None:
    flags, named = line.split("|")
    assert named.strip() in refusal(parse, [*CPU, *flags.split()])


def test_every_limit_has_a_line() -> None:
    assert [name for name in LIMITS if f"--{name} " not in REFUSED] == []


@pytest.mark.parametrize("kind", ["save", "eval"])
def test_naming_a_number_of_steps_means_steps(kind: str, tmp_path: Path) -> None:
    flags = [f"--{kind}_steps", "50"]
    other = write_yaml(tmp_path / "other.yaml", {f"{kind}_strategy": "epoch", "max_steps": 9})
    same = write_yaml(tmp_path / "same.yaml", {f"{kind}_steps": 50, "max_steps": 9})
    for argv in (flags, [*flags, "--config", other], ["--config", same]):
        training = parse([*CPU, *argv]).training
        assert getattr(training, f"{kind}_strategy") == "steps"
        assert getattr(training, f"{kind}_steps") == 50
    # The command line wins over a file that is in order by itself.
    training = parse([*CPU, "--config", same, f"--{kind}_strategy", "no"]).training
    assert getattr(training, f"{kind}_strategy") == "no"


def test_the_command_line_may_take_away_what_a_setting_of_a_file_is_for(tmp_path: Path) -> None:
    own = write_yaml(tmp_path / "own.yaml", {"num_train_epochs": 3, "run_name": "mine"})
    argv = [*CPU, "--config", own, "--max_steps", "9", "--report_to", "none"]
    assert parse(argv).training.max_steps == 9
    assert "--run_name is not used" in refusal(parse, argv[:-2])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("lam: 0.1\nbeta: 0.1\nlam: 0.2\n", "the key lam stands there twice"),
        ("schedule:\n  split: 0.1\n  split: 0.2\n", "the key split stands there twice"),
        ("save_steps: 5\nsave_strategy: 'no'\n", "--save_steps is not used with"),
        ("lerning_rate: 1\n", "did you mean learning_rate?"),
        ("report_to: [none, --lam, '0.9']\n", "one value too many: --lam, 0.9"),
    ],
)
def test_a_file_says_one_thing(text: str, named: str, tmp_path: Path) -> None:
    assert named in refusal(parse, [*CPU, "--config", write_yaml(tmp_path / "own.yaml", text)])


def test_a_value_of_a_file_is_no_flag(tmp_path: Path) -> None:
    values = {"output_dir": "--lam", "lora_target_modules": ["a", "--beta", "9"]}
    values |= {"use_peft": True, "model_name_or_path": "m", "sft_dataset": "some/rows"}
    own = write_yaml(tmp_path / "own.yaml", values | {"algo": "sft"})
    config = parse([*CPU, "--config", own])
    assert config.output_dir == "--lam"
    assert config.model.lora_target_modules == ["a", "--beta", "9"]
    assert config.training.beta == 0.1


@pytest.mark.parametrize(
    ("main", "typed", "meant"),
    [
        (parse_comparison, "--tuning_seed", "--tuning_seeds"),
        (optima.main, "--gradient_row", "--gradient_rows"),
        (gap_experiment, "--seds", "--seeds"),
    ],
)
def test_every_command_guesses_at_a_typo(main: Any, typed: str, meant: str) -> None:
    assert f"did you mean {meant}" in refusal(main, [typed, "1"])


# --- the machine


class Disk(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is prepared: whatever is refused is refused before a model is loaded."""
    monkeypatch.setattr(run, "prepare", None)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--report_to comet_ml", "comet_ml is not installed"),
        ("--report_to tensorbord", "did you mean tensorboard?"),
        ("--push_to_hub true --hub_token hf_x", "HF_HUB_OFFLINE is set"),
        ("--push_to_hub true", "--push_to_hub needs a token"),
        ("--output_dir /dev/null/run", "--output_dir /dev/null/run cannot be created"),
        ("--output_dir /dev/null", "--output_dir /dev/null exists and is not a directory"),
    ],
)
def test_what_would_fail_late_fails_at_once(
    flags: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.flags.machine.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        "llm.flags.machine.get_available_reporting_integrations", lambda: ["tensorboard"]
    )
    argv = [*CPU, "--output_dir", str(tmp_path / "out"), *flags.split()]
    assert named in refusal(run.main, argv)


@pytest.mark.usefixtures("untouched")
def test_a_hub_that_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> None:
        raise OSError("401 Unauthorized\nfor this token")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("llm.flags.machine.HfApi.whoami", refuse)
    argv = [*CPU, "--output_dir", str(tmp_path), "--push_to_hub", "true", "--hub_token", "hf_x"]
    assert "the hub does not let us in: 401 Unauthorized" in refusal(run.main, argv)


@pytest.mark.usefixtures("untouched")
def test_too_little_disk_is_said_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32: the weights once for the model, three times for a checkpoint under Adam."""
    policy = make_policy()
    policy.save_pretrained(tmp_path / "m")
    model = 4 * sum(p.numel() for p in policy.parameters())
    own = [*CPU, "--model_name_or_path", str(tmp_path / "m"), "--sft_dataset", "some/rows"]
    own += ["--algo", "sft", "--output_dir", str(tmp_path / "out"), "--max_steps", "100"]
    for flags, checkpoints in (
        (["--save_strategy", "no"], 0),
        (["--save_steps", "30"], 4),
        (["--save_steps", "0.5"], 2),
        (["--save_steps", "30", "--save_total_limit", "1"], 2),
        (["--save_steps", "30", "--resume_from_checkpoint", "true"], 1),
    ):
        assert least_bytes(parse([*own, *flags])) == model * (1 + 3 * checkpoints)
        light = [*flags, *(["--save_only_model", "true"] if checkpoints else [])]
        assert least_bytes(parse([*own, *light])) == model * (1 + checkpoints)
    assert least_bytes(parse([*own, "--use_peft", "true"])) == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(0, 0, 13 * model - 1))
    assert "take at least 0.0 GiB and 0.0 GiB are free" in refusal(
        run.main, [*own, "--save_steps", "30"]
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(0, 0, 13 * model))
    with pytest.raises(TypeError):  # goes on to what `untouched` has taken away
        run.main([*own, "--save_steps", "30"])
    with pytest.raises(UserError, match="is not used"):
        parse([*own, "--save_strategy", "no", "--save_only_model", "true"])
