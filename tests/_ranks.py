"""Runs that are launched on several processes, and what they leave for the tests to compare.

    accelerate launch --num_processes 2 tests/_ranks.py OUT

A launch costs seconds (every process imports torch), so one launch makes all of `RUNS`. The file
`OUT/rank0.pt` maps the name of each run to what `results` collects, `rank1.pt` the same, ...
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState

if __name__ == "__main__":  # launched by path: the package and the helpers are not installed
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from _gram import MinNorm
from _tiny import BATCH_SIZES, arguments, eval_rows, make_policy, make_trainer

from llm.train.trainer import JointTrainer
from theory.schedulers import Alright, Maxright, Mix

SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.3, "max_steps": 8}
"""Plain steps: AdamW would blow rounding up where a gradient is nearly zero."""
RUNS: dict[str, dict[str, Any]] = {
    "mix": {"scheduler": Mix(0.3)} | SGD,
    "both gradients": {"scheduler": MinNorm(with_losses=True)} | SGD,
    "alright": {"scheduler": Alright(0.5, seed=4)} | SGD,
    "maxright": {"scheduler": Maxright(0.85, (0.0, 0.0), refresh_every=3)} | SGD,
    "maxright, accumulation": {
        "scheduler": Maxright(0.85, (0.0, 0.0), refresh_every=3),
        "gradient_accumulation_steps": 2,
        "clipping": "per_step",  # the only one that DeepSpeed knows
    }
    | SGD,
    "mix, accumulation": {"scheduler": Mix(0.3), "gradient_accumulation_steps": 2} | SGD,
}


SHARDED = "maxright, accumulation"


def on_one_process(name: str, output_dir: Path, ranks: int) -> JointTrainer:
    """The run `name` on this process alone, with the global batch of `ranks` processes."""
    sizes = {task: ranks * size for task, size in BATCH_SIZES.items()}
    return make_trainer(**RUNS[name], output_dir=output_dir, batch_sizes=sizes)


def results(trainer: JointTrainer) -> dict[str, Any]:
    """Weights, decisions and counters, log lines with a loss: plain data for `torch.save`."""
    state = trainer.state_to_json()
    del state["identity"]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {"weights": weights, "state": state, "logs": logs}


def launched(output_dir: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, options in RUNS.items():
        trainer = make_trainer(**options, output_dir=output_dir / name)
        trainer.train()
        yield name, results(trainer)


def sharded(output_dir: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A run in shards, the same again from its checkpoint, and the model that it leaves."""
    options = RUNS[SHARDED] | {"save_strategy": "steps", "save_steps": 5}
    straight = make_trainer(**options, output_dir=output_dir)
    straight.train()
    assert straight.is_fsdp_enabled or straight.is_deepspeed_enabled
    yield "straight", results(straight) | {"held out": straight.held_out(eval_rows())}
    resumed = make_trainer(**options, output_dir=output_dir, model=make_policy(seed=9))
    resumed.train(resume_from_checkpoint=str(output_dir / "checkpoint-5"))
    yield "resumed", results(resumed)
    resumed.save_model(str(output_dir / "model"))


def shard_on_cpu() -> None:
    """accelerate shards on GPUs only; FSDP2 itself runs on gloo. So call the ranks GPUs."""
    set_device = PartialState.set_device

    def renamed(self: Any) -> None:
        set_device(self)
        self.distributed_type = DistributedType.MULTI_GPU

    PartialState.set_device = renamed


if __name__ == "__main__":
    out = Path(sys.argv[1])
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    assert arguments(out).world_size > 1
    shards = {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & set(os.environ)
    done = dict(sharded(out) if shards else launched(out))
    torch.save(done, out / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # its threads must not outlive the interpreter
