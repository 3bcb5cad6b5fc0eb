"""llm.run end to end: every algorithm, what it leaves behind, own models and data, resuming."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _asserts import refusal
from _text import SHARED, needs_shared
from _tiny import short_run
from transformers import AutoModelForCausalLM, AutoTokenizer

import llm.run
from llm.loss.evaluate import evaluate_objective
from llm.run import main
from llm.setup import Setup, prepare
from theory.schedulers import REGISTRY
from theory.tasks import Task

pytestmark = pytest.mark.usefixtures("short_base_training", "datasets_cache")

FILES = {"joint_config.json", "joint_summary.json", "metrics.jsonl", "schedule.json"}
MODEL_FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for the module: the real data are converted once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Setup]:
    """What the runs of this test trained on."""
    setups: list[Setup] = []

    def recorded(*arguments: Any) -> Setup:
        setups.append(prepare(*arguments))
        return setups[-1]

    monkeypatch.setattr(llm.run, "prepare", recorded)
    return setups


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def log_lines(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def held_out_losses(output_dir: Path, setup: Setup) -> dict[str, float]:
    """The losses of the saved model, loaded as a user of transformers would."""
    model = AutoModelForCausalLM.from_pretrained(output_dir)
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    assert tokenizer.get_vocab() == setup.tokenizer.get_vocab()
    return {
        f"{task.label}_loss": evaluate_objective(
            model,
            setup.objectives[task],
            setup.held_out[task].rows,
            batch_size=7,
            pad_token_id=tokenizer.pad_token_id,
        )["loss"]
        for task in setup.held_out
    }


# --- every algorithm on the embedded corpus


@pytest.mark.parametrize("algo", REGISTRY)
def test_every_algorithm_runs_and_leaves_a_model(
    algo: str, tmp_path: Path, prepared: list[Setup], capsys: pytest.CaptureFixture[str]
) -> None:
    main(short_run(tmp_path, "--algo", algo, "--optima", "none" if algo != "maxright" else "auto"))
    (setup,) = prepared
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= FILES | MODEL_FILES
    assert not [name for name in names if name.endswith(".tmp")]
    assert read(tmp_path / "joint_config.json")["training"]["algo"] == algo

    summary, schedule = read(tmp_path / "joint_summary.json"), read(tmp_path / "schedule.json")
    assert summary["algo"] == algo
    trained_on = set(summary["steps"])
    assert trained_on == ({algo} if algo in ("sft", "dpo") else {"sft", "dpo"})
    assert len(schedule["decisions"]) == schedule["schedule"]["step"] == 8
    for label, steps in summary["steps"].items():
        taken = [pair for pair in schedule["decisions"] if pair[Task[label.upper()]] != 0.0]
        assert steps == schedule["steps_taken"][label] == len(taken)
        assert schedule["consumed"][label] == 8 * steps
    assert summary["rows"]["sft train"]["kept"] == summary["rows"]["dpo train"]["kept"] == 48

    # The saved model is the trained one: loaded anew it has the summary's losses.
    after, before = (summary["held_out"][moment] for moment in ("after", "before"))
    losses = held_out_losses(tmp_path, setup)
    assert losses == pytest.approx({name: after[name] for name in losses}, rel=1e-5)
    for label, steps in summary["steps"].items():
        assert (after[f"{label}_loss"] != before[f"{label}_loss"]) or steps == 0
    assert before["dpo_loss"] == pytest.approx(0.6931, abs=1e-4)

    lines = log_lines(tmp_path)
    evaluations = [line for line in lines if "eval_sft_loss" in line]
    assert [line["step"] for line in evaluations] == [4, 8]
    assert evaluations[-1]["eval_dpo_loss"] == pytest.approx(after["dpo_loss"], rel=1e-6)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8]

    printed = capsys.readouterr().out
    assert summary["schedule"]["description"] in printed
    assert f"{after['sft_loss']:.4f}" in printed
    assert f"{after['dpo_loss']:.4f}" in printed


def test_gaps_are_measured_against_the_estimated_optima(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(short_run(tmp_path, "--lam", "0.25"))
    summary = read(tmp_path / "joint_summary.json")
    optimum = read(tmp_path / "optima.json")
    assert summary["optimum"] == {label: optimum[label] for label in ("dpo", "sft")}
    after = summary["held_out"]["after"]
    gaps = [after[f"{label}_loss"] - optimum[label] for label in ("dpo", "sft")]
    combined = summary["combined"]["after"]
    mix = 0.25 * after["dpo_loss"] + 0.75 * after["sft_loss"]
    assert combined["f_mix"] == pytest.approx(mix, rel=1e-12)
    assert combined["ideal_distance"] == pytest.approx(sum(g * g for g in gaps) ** 0.5, rel=1e-9)
    printed = capsys.readouterr().out
    for gap in gaps:
        assert f"{gap:.4f}" in printed


def test_the_base_policy_does_not_depend_on_the_algorithm(
    tmp_path: Path, prepared: list[Setup]
) -> None:
    for algo in ("mix", "sft"):
        main(short_run(tmp_path / algo, "--algo", algo, "--optima", "none"))
    policies = [setup.new_policy().state_dict() for setup in prepared]
    torch.testing.assert_close(policies[0], policies[1], rtol=0, atol=0)
    assert prepared[0].held_out[Task.DPO].rows == prepared[1].held_out[Task.DPO].rows


def test_another_reference_is_not_the_policy(tmp_path: Path, prepared: list[Setup]) -> None:
    """The reference is a finished run: the policy no longer starts at log 2."""
    first, second = tmp_path / "first", tmp_path / "second"
    main(short_run(first, "--algo", "sft", "--optima", "none"))
    flags = ["--algo", "dpo", "--optima", "none", "--reference", str(first)]
    main(short_run(second, *flags))
    before = read(second / "joint_summary.json")["held_out"]["before"]
    assert abs(before["dpo_loss"] - 0.6931) > 1e-3
    row = prepared[1].held_out[Task.DPO].rows[0]
    assert row["ref_chosen_logps"] != prepared[0].held_out[Task.DPO].rows[0]["ref_chosen_logps"]


def test_the_reference_has_the_precision_of_the_training(tmp_path: Path) -> None:
    """A policy that stays where it is has no margin to itself, in bfloat16 too, at any moment."""
    flags = ["--algo", "dpo", "--bf16", "true", "--learning_rate", "1e-30", "--optima", "none"]
    main(short_run(tmp_path, *flags))
    held_out = read(tmp_path / "joint_summary.json")["held_out"]
    assert held_out["after"] == held_out["before"]
    assert held_out["after"]["dpo_reward_margin"] == 0.0
    evaluation = next(line for line in log_lines(tmp_path) if "eval_dpo_loss" in line)
    assert evaluation["eval_dpo_reward_margin"] == 0.0


# --- the output directory


def test_results_of_another_run_are_not_overwritten(tmp_path: Path) -> None:
    main(short_run(tmp_path, "--optima", "none"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    other = short_run(tmp_path, "--optima", "none", "--lam", "0.9")
    text = refusal(main, other)
    assert "holds the results of a run with other settings" in text
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert after == before
    main([*other, "--overwrite_output_dir", "true"])
    assert read(tmp_path / "joint_summary.json")["lam"] == 0.9


def test_the_same_command_does_the_same_again(tmp_path: Path) -> None:
    summaries = []
    for _ in range(2):
        main(short_run(tmp_path, "--optima", "none"))
        summaries.append(read(tmp_path / "joint_summary.json") | {"seconds": None})
        assert [line["step"] for line in log_lines(tmp_path) if "loss" in line] == [2, 4, 6, 8]
    assert summaries[0] == summaries[1]


# --- failures


@pytest.mark.parametrize("max_steps", ["8", "1"])
def test_a_loss_that_is_no_number_ends_the_run_with_one_line_and_no_model(
    max_steps: str, tmp_path: Path
) -> None:
    """After one step only the held-out loss can tell: its own loss came before the update."""
    flags = ["--learning_rate", "1e30", "--optima", "none", "--max_grad_norm", "0"]
    flags += ["--max_steps", max_steps, "--warmup_steps", "0"]
    text = refusal(main, short_run(tmp_path, "--algo", "sft", *flags))
    assert " is nan at step " in text
    assert "--learning_rate" in text
    kept = {"joint_config.json", "metrics.jsonl", "reference", "kl_samples.json"}
    assert {path.name for path in tmp_path.iterdir()} <= kept


# --- resuming


def test_a_killed_run_ends_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    """A finished run made to look as if it had been killed after its checkpoint at step 6."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    flags = ["--save_strategy", "steps", "--save_steps", "3", "--optima", "none"]
    flags += ["--algo", "sequential"]
    main(short_run(straight, *flags))
    shutil.copytree(straight, killed)
    for name in ("joint_summary.json", "schedule.json", "model.safetensors"):
        (killed / name).unlink()
    shutil.rmtree(killed / "checkpoint-8")
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": 0.')
    main(short_run(killed, *flags, "--resume_from_checkpoint", "true"))
    expected, actual = (
        read(path / "joint_summary.json") | {"seconds": None} for path in (straight, killed)
    )
    assert actual == expected
    for name in ("model.safetensors", "schedule.json"):
        assert (killed / name).read_bytes() == (straight / name).read_bytes()
    # No step is logged twice, and the line that the kill cut short is gone.
    losses = [
        [(line["step"], line["loss"]) for line in log_lines(path) if "loss" in line]
        for path in (killed, straight)
    ]
    assert losses[0] == losses[1]


# --- a model and data of one's own


@pytest.mark.parametrize("algo", ["alright", "maxright"])
def test_own_files_and_an_own_model_train(
    algo: str, own: Callable[..., list[str]], tmp_path: Path, prepared: list[Setup]
) -> None:
    main(own("--algo", algo))
    out = tmp_path / "out"
    summary = read(out / "joint_summary.json")
    assert (summary["optimum"] is None) == (algo != "maxright")
    assert summary["rows"]["dpo held-out"]["kept"] == 10
    losses = held_out_losses(out, prepared[0])
    after = summary["held_out"]["after"]
    assert losses == pytest.approx({name: after[name] for name in losses}, rel=1e-5)
    assert sum(summary["steps"].values()) == 6


def test_one_objective_needs_the_data_of_that_objective_only(
    own: Callable[..., list[str]], tmp_path: Path
) -> None:
    argv = own("--algo", "sft")
    for name in ("dpo_dataset", "dpo_eval_dataset"):
        at = argv.index(f"--{name}")
        del argv[at : at + 2]
    main(argv)
    summary = read(tmp_path / "out" / "joint_summary.json")
    assert summary["steps"] == {"sft": 6}
    assert set(summary["held_out"]["after"]) == {"sft_loss", "sft_sequence_loss"}


def test_an_epoch_counts_the_longer_data_set(own: Callable[..., list[str]], tmp_path: Path) -> None:
    flags = ["--max_steps", "-1", "--num_train_epochs", "0.5", "--max_train_rows", "32"]
    main(own("--sft_per_device_train_batch_size", "2", *flags))
    summary = read(tmp_path / "out" / "joint_summary.json")
    assert sum(summary["steps"].values()) == 8  # half of 32 / 2


def test_without_evaluation_sets_the_same_share_is_held_out_every_time(
    own: Callable[..., list[str]], prepared: list[Setup], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        main(own("--held_out", "0.2", evaluation_sets=False))
    printed = capsys.readouterr().out
    first, second = prepared
    for task in Task:
        assert (len(first.train[task].rows), len(first.held_out[task].rows)) == (32, 8)
        assert first.train[task].rows == second.train[task].rows
        assert first.held_out[task].rows == second.held_out[task].rows
        assert f"{task.label}: no evaluation set named, 8 rows held out" in printed


# --- real data and a real model


def real_run(output_dir: Path, *flags: str) -> dict[str, Any]:
    """The summary of a run of TinyStories-656k on real text."""
    data = SHARED / "data"
    sources = ["--model_name_or_path", str(SHARED / "models" / "tinystories-656k")]
    for task, name in (("sft", "sft"), ("dpo", "preference")):
        sources += [f"--{task}_dataset", str(data / f"{name}_train.parquet")]
        sources += [f"--{task}_eval_dataset", str(data / f"{name}_eval.parquet")]
    short = ["--max_train_rows", "64", "--max_eval_rows", "16", "--max_steps", "4"]
    short += ["--per_device_train_batch_size", "2", "--learning_rate", "1e-3", "--use_cpu", "true"]
    quiet = ["--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true"]
    main([*sources, *short, *quiet, "--output_dir", str(output_dir), *flags])
    summary: dict[str, Any] = read(output_dir / "joint_summary.json")
    for name, report in summary["rows"].items():
        assert report["total"] == (64 if name.endswith("train") else 16)
        assert report["kept"] + sum(report["dropped"].values()) == report["total"]
    return summary


@needs_shared
@pytest.mark.parametrize("algo", REGISTRY)
def test_a_pretrained_model_trains_on_real_data(
    algo: str, tmp_path: Path, prepared: list[Setup]
) -> None:
    summary = real_run(tmp_path, "--algo", algo, "--max_length", "48")
    assert summary["rows"]["dpo train"]["truncated"] > 0
    losses = held_out_losses(tmp_path, prepared[0])
    after = summary["held_out"]["after"]
    assert losses == pytest.approx({name: after[name] for name in losses}, rel=1e-5)
    assert sum(summary["steps"].values()) == (8 if algo == "mix" else 4)


@needs_shared
def test_dropped_rows_are_counted_in_the_summary(tmp_path: Path) -> None:
    """The prompts of the real pairs do not fit into 24 tokens when their start is kept."""
    flags = ("--max_length", "64", "--truncation_mode", "keep_start", "--max_dropped_share", "1")
    summary = real_run(tmp_path, *flags)
    assert summary["rows"]["dpo train"]["dropped"]["no response token left by truncation"] > 0
