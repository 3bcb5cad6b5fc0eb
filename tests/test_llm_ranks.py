"""Several processes, started by `accelerate launch`: the same run as one process, to rounding.

One launch per way to distribute (a launch costs seconds); `_ranks.py` is what it launches.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _ranks import RUNS, SHARDED, on_one_process
from _tiny import OBJECTIVES, PAD_ID, eval_rows
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from transformers import AutoModelForCausalLM

from llm.flags.parse import parse
from llm.loss.evaluate import evaluate_objective
from llm.train.checkpoints import damage
from llm.train.trainer import JointTrainer
from theory.cli import UserError
from theory.tasks import Task

# Eight steps with a learning rate of 0.3 whose sums are taken in another order.
ROUNDING = 1e-5
RECIPES = Path(__file__).parents[1] / "llm" / "recipes" / "accelerate"


def launch(output_dir: Path, *flags: str) -> list[dict[str, Any]]:
    """What each of two processes leaves."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    launcher += ["--main_process_port", "0"]  # any free port
    program = [str(Path(__file__).parent / "_ranks.py"), str(output_dir)]
    done = subprocess.run(
        [*launcher, *flags, *program],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=RECIPES.parents[2],  # the recipes of DeepSpeed name a file from there
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(output_dir / f"rank{rank}.pt") for rank in range(2)]


def assert_same_run(actual: dict[str, Any], alone: JointTrainer) -> None:
    """Weights, decisions, counters, probes and every logged mean."""
    torch.testing.assert_close(
        actual["weights"], alone.model.state_dict(), rtol=ROUNDING, atol=ROUNDING
    )
    state = alone.state_to_json()
    # Exact but for a schedule that weighs by inner products, which are summed in another order.
    np.testing.assert_allclose(
        actual["state"]["decisions"], state["decisions"], rtol=ROUNDING, atol=ROUNDING
    )
    for name in ("consumed", "steps_taken", "probed_at"):
        assert actual["state"][name] == state[name], name
    logs = [log for log in alone.state.log_history if "loss" in log]
    for mine, theirs in zip(actual["logs"], logs, strict=True):
        losses = {name: theirs[name] for name in theirs if name.endswith("loss")}
        assert {name: mine[name] for name in losses} == pytest.approx(losses, rel=ROUNDING)
        # Metrics are sums of log-probabilities of order 50.
        names = {name for name in theirs if name.startswith(("dpo_", "sft_"))}
        assert {name: mine[name] for name in names} == pytest.approx(
            {name: theirs[name] for name in names}, rel=1e-4, abs=1e-4
        )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    flags = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
    return launch(tmp_path_factory.mktemp("ranks"), *flags, "--dynamo_backend", "no")


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_like_one_with_the_same_global_batch(
    name: str, ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    alone = on_one_process(name, tmp_path, ranks=2)
    alone.train()
    assert min(alone.steps_taken.values()) > 0  # both objectives took part
    for rank in ranks:
        assert_same_run(rank[name], alone)


@pytest.mark.parametrize("name", RUNS)
def test_every_rank_takes_the_same_decisions(name: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[name]["state"] for rank in ranks)
    assert first == second
    torch.testing.assert_close(ranks[0][name]["weights"], ranks[1][name]["weights"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("recipe", "files"),
    [
        ("fsdp2", ["pytorch_model_fsdp_0", "optimizer_0"]),
        ("zero2", ["global_step5", "model.safetensors"]),
        ("zero3", ["global_step5", "model.safetensors"]),
    ],
)
def test_shards_train_like_one_process_and_resume_bit_for_bit(
    recipe: str, files: list[str], tmp_path: Path
) -> None:
    """The committed recipe, launched: training, sealed checkpoint, resume, final model."""
    if recipe.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    first, _ = launch(tmp_path, "--config_file", str(RECIPES / f"{recipe}.yaml"))
    alone = on_one_process(SHARDED, tmp_path / "alone", ranks=2)
    alone.train()
    assert_same_run(first["straight"], alone)
    held_out = alone.held_out(eval_rows())
    assert first["straight"]["held out"] == pytest.approx(held_out, rel=1e-4, abs=1e-4)

    assert damage(tmp_path / "checkpoint-5") is None
    assert {path.name for path in (tmp_path / "checkpoint-5").iterdir()} >= set(files)
    straight, resumed = first["straight"], first["resumed"]
    assert resumed["state"] == straight["state"]
    losses = [[log["loss"] for log in run["logs"]] for run in (straight, resumed)]
    assert losses[0] == losses[1]
    torch.testing.assert_close(resumed["weights"], straight["weights"], rtol=0, atol=0)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loss = evaluate_objective(
        model, OBJECTIVES[Task.SFT], eval_rows()[Task.SFT], batch_size=4, pad_token_id=PAD_ID
    )["loss"]
    assert loss == pytest.approx(held_out["sft_loss"], rel=1e-4)


# --- the recipes


@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3"])
def test_the_launcher_knows_every_key_of_a_recipe(name: str) -> None:
    """accelerate takes unknown keys inside a plugin's section without a word."""
    path = RECIPES / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses unknown keys of the first level
    known = {action.dest for action in launch_command_parser()._actions}
    for section in (config.fsdp_config, config.deepspeed_config):
        assert set(section) <= known
    command = launch_command_parser().parse_args(["--config_file", str(path), "run.py"])
    args, _, _ = _validate_launch_command(command)
    assert (args.use_fsdp, args.use_deepspeed) == (name == "fsdp2", name != "fsdp2")


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_takes_what_the_run_decides_from_the_run(stage: int) -> None:
    path = RECIPES / f"zero{stage}.json"
    config = HfDeepSpeedConfig(str(path))
    assert (config.is_zero2(), config.is_zero3()) == (stage == 2, stage == 3)
    keys = ("bf16.enabled", "fp16.enabled", "gradient_clipping", "gradient_accumulation_steps")
    assert {config.get_value(key) for key in keys} == {"auto"}
    yaml_config = load_config_from_file(str(path.with_suffix(".yaml")))
    assert (RECIPES.parents[2] / yaml_config.deepspeed_config["deepspeed_config_file"]) == path


def test_what_would_spoil_the_reference_is_refused(
    own: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights on one rank only, or another precision in the launcher than in the run."""
    parse(own())
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match="pass --bf16 true"):
        parse(own())
    parse(own("--bf16", "true"))
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(UserError, match=r"fsdp_cpu_ram_efficient_loading .* set it to false"):
        parse(own())
