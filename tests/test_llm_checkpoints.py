"""Checkpoints are whole or absent; damage is found and named; a killed run ends as if unkilled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from _kill import MOMENTS

from llm.train.checkpoints import (
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


# --- SIGKILL


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `_kill.py` leaves: real runs, killed and resumed."""
    out = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "_kill.py"), str(out)],
        env=environment | {"TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    logs = "".join(path.read_text()[-1500:] for path in out.glob("*.log"))
    assert done.returncode == 0, done.stderr[-1500:] + logs
    return out


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(moment: str, killed: Path) -> None:
    """In the middle of MAXRIGHT's period, across gradient accumulation; files are compared."""
    before, after, straight = killed / f"{moment}, killed", killed / moment, killed / "straight"
    assert not (before / "joint_summary.json").exists()
    newest = {"while an old one is deleted": 9, "behind the last step": 12}.get(moment, 6)
    assert [damage(path) for path in list_checkpoints(before)[-2:]][-1] is None
    assert list_checkpoints(before)[-1].name == f"checkpoint-{newest}"

    for name in ("model.safetensors", "schedule.json", "checkpoint-12/optimizer.pt"):
        assert (after / name).read_bytes() == (straight / name).read_bytes(), name
    assert not (after / STAGING).exists()
    logs = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (after, straight)
    ]
    lines = [[(log["step"], log.get("loss")) for log in found] for found in logs]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 12 + 1  # and the end


def test_a_kill_leaves_nothing_half_written_under_a_checkpoints_name(killed: Path) -> None:
    """Except the oldest one, caught in its deletion: and that is found out."""
    for moment in MOMENTS:
        for checkpoint in list_checkpoints(killed / f"{moment}, killed"):
            deleted = moment == "while an old one is deleted" and checkpoint.name == "checkpoint-3"
            assert (damage(checkpoint) is not None) == deleted
