"""llm.flags.parse: where values come from, and that nothing meaningless gets past it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from _asserts import refusal

from llm.flags.arguments import JointArguments
from llm.flags.parse import TINY_RECIPE, parse
from theory.cli import UserError
from theory.schedulers import REGISTRY
from theory.tasks import Task

ROOT = Path(__file__).parents[1]
CPU = ["--use_cpu", "true"]


def write_yaml(path: Path, values: Any) -> str:
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return str(path)


@pytest.fixture
def own(tmp_path: Path) -> list[str]:
    """The flags of a model and data of one's own; nothing opens them here."""
    for name in ("sft", "dpo"):
        (tmp_path / f"{name}.jsonl").touch()
    return [
        *("--model_name_or_path", "some/model"),
        *("--sft_dataset", str(tmp_path / "sft.jsonl")),
        *("--dpo_dataset", str(tmp_path / "dpo.jsonl")),
        *CPU,
    ]


# --- where values come from


def test_defaults_alone_are_the_embedded_recipe() -> None:
    config = parse(CPU)
    assert config.embedded
    assert config.training.algo == "alright"
    recipe = yaml.safe_load(TINY_RECIPE.read_text())
    assert config.training.max_steps == recipe["max_steps"]
    assert config.training.learning_rate == recipe["learning_rate"]
    assert config.output_dir == "runs/alright"
    assert config.training.logging_nan_inf_filter is False


def test_the_embedded_recipe_is_used_only_without_a_model_and_a_config(
    own: list[str], tmp_path: Path
) -> None:
    recipe = write_yaml(tmp_path / "own.yaml", {"lam": 0.25})
    dashed = ["--model-name-or-path", *own[1:]]
    for argv in (own, dashed, [*CPU, "--config", recipe], [*CPU, f"--config={recipe}"]):
        assert parse(argv).training.max_steps == -1  # transformers' default, not the recipe's
    assert parse([*CPU, "--config", str(TINY_RECIPE)]) == parse(CPU)


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    values = {"algo": "maxright", "lam": 0.25, "refresh_every": 3, "learning_rate": "1e-4"}
    recipe = write_yaml(tmp_path / "own.yaml", values)
    config = parse([*CPU, "--config", recipe, "--lam", "0.75"])
    assert config.training.algo == "maxright"
    assert config.training.lam == 0.75
    assert config.training.schedule == {"refresh_every": 3}
    assert config.training.learning_rate == 1e-4
    assert config.training.beta == 0.1


def test_a_file_holds_every_kind_of_value(tmp_path: Path) -> None:
    values = {
        "scale_steps": True,
        "algo": "maxright",
        "max_train_rows": 5,
        "output_dir": "a b",
        "max_eval_rows": None,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "report_to": ["none"],
    }
    config = parse([*CPU, "--config", write_yaml(tmp_path / "own.yaml", values)])
    assert config.training.schedule == {"scale_steps": True}
    assert config.data.max_train_rows == 5
    assert config.data.max_eval_rows is None
    assert config.output_dir == "a b"
    assert config.training.lr_scheduler_kwargs == {"min_lr_rate": 0.1}


def test_each_objective_may_have_its_own_batch_size_and_length(own: list[str]) -> None:
    flags = ["--per_device_train_batch_size", "4", "--dpo_per_device_train_batch_size", "2"]
    config = parse([*own, *flags, "--max_length", "64", "--sft_max_length", "32"])
    assert [config.training.batch_size(task) for task in (Task.DPO, Task.SFT)] == [2, 4]
    assert [config.max_length(task) for task in (Task.DPO, Task.SFT)] == [64, 32]


# --- what is refused


def test_several_gpus_in_one_process_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data parallelism by threads would cut packed batches apart."""
    monkeypatch.setattr(JointArguments, "n_gpu", 2)
    with pytest.raises(UserError, match="accelerate launch"):
        parse(CPU)


@pytest.mark.parametrize("algo", REGISTRY)
def test_an_algorithm_needs_the_data_that_it_trains_on(algo: str, own: list[str]) -> None:
    without = {Task.SFT: own[:2] + own[4:], Task.DPO: own[:4] + own[6:]}
    for task, argv in without.items():
        argv = [*argv, "--algo", algo]
        if task.other.label == algo:
            assert parse(argv).tasks == (task.other,)
        else:
            text = refusal(parse, argv)
            assert f"trains on {task.label}: give --{task.label}_dataset" in text


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"lamb": 0.5, "algoo": "mix"}, "unknown keys: algoo, lamb"),
        ({"help": True}, "unknown keys: help"),
        ({"config": "other.yaml"}, "unknown keys: config"),
        ("lam: [0.5\n", "not valid YAML"),
        ("- lam\n- 0.5\n", "must hold a mapping"),
        ("", "must hold a mapping"),
        ({"lam": 1.5}, "lam is 1.5"),
        ({"lam": "much"}, "--lam"),
        ({"algo": "sft", "lam": 0.5}, "--lam is not used by --algo sft"),
        ({"beta": 0}, "beta is 0"),
        ({"max_steps": [1, 2]}, "2"),
        ({"conflict": 0.5, "model_name_or_path": "some/model"}, "--conflict belongs"),
    ],
)
def test_values_of_a_config_are_checked(content: Any, named: str, tmp_path: Path) -> None:
    recipe = write_yaml(tmp_path / "own.yaml", content)
    assert named in refusal(parse, [*CPU, "--config", recipe])


def test_the_best_model_may_be_chosen_by_one_objective(own: list[str]) -> None:
    flags = ["--load_best_model_at_end", "true", "--save_strategy", "steps", "--eval_strategy"]
    flags += ["steps", "--save_steps", "10", "--eval_steps", "10"]
    config = parse([*own, *flags, "--metric_for_best_model", "eval_dpo_loss"])
    assert config.training.greater_is_better is False


def test_the_command_fails_with_one_line_and_no_traceback(tmp_path: Path) -> None:
    """The real process: the exit status and everything that it prints."""
    missing = tmp_path / "optima.json"
    done = subprocess.run(
        [sys.executable, "-m", "llm.run", "--lam", "2", "--optima", str(missing)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("python -m llm.run: error: lam is 2.0")
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_flag_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for flag in ("--config", "--optima", "--reference", "--conflict", "--refresh_every", "--cycle"):
        assert flag in printed
