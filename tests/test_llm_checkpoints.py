"""Checkpoints are whole or absent; damage is found and named; a killed run ends as if unkilled."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm.checkpoints import (
    MANIFEST,
    STAGING,
    damage,
    intact,
    list_checkpoints,
    newest_intact,
    publish,
    rotate,
)
from theory.cli import UserError


def make_checkpoint(output_dir: Path, step: int) -> Path:
    staged = output_dir / STAGING / f"checkpoint-{step}"
    (staged / "deep").mkdir(parents=True)
    (staged / "weights.bin").write_bytes(bytes(range(256)) * 40 + step.to_bytes(4, "little"))
    (staged / "deep" / "state.json").write_text(json.dumps({"step": step}))
    return publish(staged, output_dir)


def quiet(_: str) -> None:
    pass


def test_a_published_checkpoint_is_intact_and_leaves_no_staging(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 5)
    assert checkpoint == tmp_path / "checkpoint-5"
    assert damage(checkpoint) is None
    assert not (tmp_path / STAGING).exists()
    assert set(json.loads((checkpoint / MANIFEST).read_text())) == {
        "weights.bin",
        os.path.join("deep", "state.json"),
    }


@pytest.mark.parametrize("position", [0, 4000, 10_243])
def test_one_flipped_bit_is_found_and_the_file_named(tmp_path: Path, position: int) -> None:
    path = make_checkpoint(tmp_path, 5) / "weights.bin"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    assert "weights.bin" in str(damage(tmp_path / "checkpoint-5"))


def test_truncated_missing_and_unsealed_files_are_found(tmp_path: Path) -> None:
    cut, missing, unsealed = (make_checkpoint(tmp_path, step) for step in (1, 2, 3))
    (cut / "weights.bin").write_bytes((cut / "weights.bin").read_bytes()[:-1])
    (missing / "deep" / "state.json").unlink()
    (unsealed / MANIFEST).write_text("{")
    assert "weights.bin" in str(damage(cut))
    assert "state.json is missing" in str(damage(missing))
    assert MANIFEST in str(damage(unsealed))


def test_resuming_falls_back_to_the_newest_intact_one_and_names_the_damaged(
    tmp_path: Path,
) -> None:
    good, bad = make_checkpoint(tmp_path, 9), make_checkpoint(tmp_path, 10)
    (bad / "weights.bin").write_bytes(b"")
    said: list[str] = []
    assert newest_intact(tmp_path, said.append) == good
    assert len(said) == 1
    assert "checkpoint-10" in said[0]
    assert "weights.bin" in said[0]
    with pytest.raises(UserError, match=r"checkpoint-10 is damaged: weights\.bin"):
        intact(bad)


def test_no_checkpoint_left_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no intact checkpoint"):
        newest_intact(tmp_path, quiet)


def test_checkpoints_are_listed_by_step_and_strangers_are_not(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-old").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-100",
    ]


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make_checkpoint(tmp_path, step)
    rotate(tmp_path, 2, [tmp_path / "checkpoint-1"])
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-4"]
    rotate(tmp_path, None)
    assert len(list_checkpoints(tmp_path)) == 2


def test_republishing_a_step_replaces_it(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 7)
    (tmp_path / "checkpoint-7" / "weights.bin").write_bytes(b"other")
    make_checkpoint(tmp_path, 7)
    assert damage(tmp_path / "checkpoint-7") is None


RUN = """
import sys
from llm import embedded
from llm.run import main
embedded.BASE_STEPS = 3
main(sys.argv[1:])
"""


def run_command(output_dir: Path, *extra: str) -> list[str]:
    flags = "--algo maxright --refresh_every 7 --max_steps 60 --save_strategy steps --save_steps 5"
    flags += " --eval_strategy no --max_train_rows 80 --max_eval_rows 16 --disable_tqdm true"
    flags += " --per_device_train_batch_size 4 --gradient_accumulation_steps 2"
    optima = output_dir.parent / "optima.json"
    optima.write_text('{"dpo": 0.3, "sft": 0.1}')
    options = [*flags.split(), "--optima", str(optima), "--output_dir", str(output_dir)]
    return [sys.executable, "-c", RUN, *options, *extra]


def weights_digest(output_dir: Path) -> str:
    return hashlib.sha256((output_dir / "model.safetensors").read_bytes()).hexdigest()


def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL after the third checkpoint has appeared (in the middle of MAXRIGHT's period)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    subprocess.run(run_command(straight), env=environment, check=True, capture_output=True)

    process = subprocess.Popen(
        run_command(killed), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(list_checkpoints(killed)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "joint_summary.json").exists(), "the run ended before it was killed"

    resume = run_command(killed, "--resume_from_checkpoint", "true")
    subprocess.run(resume, env=environment, check=True, capture_output=True)
    assert weights_digest(killed) == weights_digest(straight)
    schedules = [json.loads((d / "schedule.json").read_text()) for d in (straight, killed)]
    assert schedules[0] == schedules[1]
    newest = [list_checkpoints(d)[-1] / "optimizer.pt" for d in (straight, killed)]
    assert newest[0].read_bytes() == newest[1].read_bytes()
