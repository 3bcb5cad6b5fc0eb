"""Real runs of `llm.run` that die of SIGKILL at a chosen moment, and are then resumed.

    python tests/_kill.py OUT

Leaves OUT/straight, a run that nobody kills, and one directory per name in `MOMENTS`. Every run is
a process of its own, forked from this one, which has imported torch once and never trains.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run by path: the package and the helpers are not installed
    sys.path[:0] = [str(Path(__file__).parents[1])]

import torch

import llm.run
import llm.train.checkpoints
from llm.data import embedded
from llm.run import main
from llm.train.trainer import JointTrainer

FATAL = "checkpoint-9"
"""The checkpoint that most moments are about: the third; 6 is then the newest that is whole."""
FLAGS = (
    *("--algo", "maxright", "--refresh_every", "4", "--gradient_accumulation_steps", "2"),
    *("--max_steps", "12", "--save_strategy", "steps", "--save_steps", "3"),
    *("--save_total_limit", "2", "--eval_strategy", "no", "--logging_steps", "1"),
    *("--max_train_rows", "40", "--max_eval_rows", "8", "--per_device_train_batch_size", "4"),
    *("--lr_scheduler_type", "constant"),  # at a rate of zero a step too many would not show
    *("--use_cpu", "true", "--disable_tqdm", "true", "--kl_rows", "0"),
)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_step() -> None:
    """Between the two micro-batches of step 8."""
    compute_loss, calls = JointTrainer.compute_loss, []

    def fatal(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) > 3 + 15:  # three steps of the base model come first, without accumulation
            die()
        return compute_loss(*args, **kwargs)

    JointTrainer.compute_loss = fatal


def in_a_file() -> None:
    """Half of the optimiser's state is written."""
    save = torch.save

    def fatal(data: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(data, path, *args, **kwargs)
        if str(path).endswith(f"{FATAL}/optimizer.pt"):
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    torch.save = fatal


def before_the_seal() -> None:
    """Every file is written, the manifest is not."""
    publish = llm.train.checkpoints.publish

    def fatal(staged: Path, output_dir: Path) -> Path:
        if staged.name == FATAL:
            die()
        return publish(staged, output_dir)

    llm.train.checkpoints.publish = fatal


def before_the_rename() -> None:
    """Sealed, but still in the staging folder."""
    replace = os.replace

    def fatal(source: Any, target: Any) -> None:
        if Path(target).name == FATAL:
            die()
        replace(source, target)

    os.replace = fatal


def while_an_old_one_is_deleted() -> None:
    """The newest is whole; of the oldest, which has to make room, some files are gone."""
    rmtree = shutil.rmtree

    def fatal(path: Any, *args: Any, **kwargs: Any) -> None:
        if Path(path).name == "checkpoint-3":
            (Path(path) / "optimizer.pt").unlink()
            die()
        rmtree(path, *args, **kwargs)

    shutil.rmtree = fatal


def behind_the_last_step() -> None:
    """All is trained, logged and saved; the summary is not."""
    llm.run.finish = lambda *_: die()


MOMENTS: dict[str, Callable[[], None]] = {
    "in a step": in_a_step,
    "in a file": in_a_file,
    "before the seal": before_the_seal,
    "before the rename": before_the_rename,
    "while an old one is deleted": while_an_old_one_is_deleted,
    "behind the last step": behind_the_last_step,
}


def run(output_dir: Path, *extra: str, prepare: Callable[[], None] | None = None) -> int:
    """The exit status of a forked run, as `os.waitpid` tells it."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    log = os.open(output_dir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if prepare is not None:
        prepare()
    optima = str(output_dir.parent / "optima.json")
    try:
        main([*FLAGS, "--optima", optima, "--output_dir", str(output_dir), *extra])
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def everything(out: Path) -> None:
    embedded.BASE_STEPS = 3
    (out / "optima.json").write_text('{"dpo": 0.3, "sft": 0.1}')
    assert run(out / "straight") == 0
    for name, prepare in MOMENTS.items():
        status = run(out / name, prepare=prepare)
        assert os.WIFSIGNALED(status), name
        assert os.WTERMSIG(status) == signal.SIGKILL, name
        shutil.copytree(out / name, out / f"{name}, killed")
        assert run(out / name, "--resume_from_checkpoint", "true") == 0, name


if __name__ == "__main__":
    everything(Path(sys.argv[1]))
