"""f_DPO* and f_SFT*: the losses that each objective reaches when it is trained alone.

The paper's estimate (arXiv 2410.15483, section 6): one run per objective from the same initial
policy. The number kept is the lowest held-out loss along that run. It is an estimate: a joint run
can come out below it, and a gap is then negative.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llm.config import RunConfig
from llm.data import fingerprint
from llm.setup import Setup, make_trainer, total_steps
from theory.cli import UserError
from theory.records import read_json, write_json
from theory.schedulers import make_scheduler
from theory.tasks import Task

Optimum = tuple[float, float]
FILE = "optima.json"
TRAINED_BY = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"),
    *("max_grad_norm", "gradient_accumulation_steps", "world_size", "bf16", "fp16"),
    *("seed", "data_seed", "eval_strategy", "eval_steps"),
)
"""Settings of a run that its lowest held-out loss depends on."""


def find_optimum(setup: Setup, config: RunConfig, say: Callable[[str], None]) -> Optimum | None:
    """(f_DPO*, f_SFT*) as `--optima` says: from a file, estimated, or None."""
    source = config.training.optima
    if source == "auto":
        needed = config.embedded or config.training.algo == "maxright"
        source = "estimate" if needed else "none"
    if source == "none":
        if config.training.algo == "maxright":
            raise UserError("--optima none: maxright compares gaps and needs the optima")
        return None
    if source == "estimate":
        return _estimated(setup, config, say)
    return read_optimum(Path(source))


def read_optimum(path: Path) -> Optimum:
    """Read (f_DPO*, f_SFT*) from an optima.json."""
    try:
        data = read_json(path)
        dpo, sft = float(data["dpo"]), float(data["sft"])
        if not math.isfinite(dpo + sft):
            raise ValueError("a loss is not finite")
    except OSError as error:
        raise UserError(f"--optima {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'--optima {path} must be JSON with two losses: {{"dpo": 0.3, "sft": 1.2}}'
        ) from error
    return dpo, sft


def _estimated(setup: Setup, config: RunConfig, say: Callable[[str], None]) -> Optimum:
    missing = [task.label for task in Task if task not in setup.train]
    if missing:
        raise UserError(f"estimating the optima needs {' and '.join(missing)} data as well")
    path = Path(config.output_dir) / FILE
    key = _fingerprint(setup, config)
    if _fingerprint_in(path) == key:
        say(f"optima: read from {path}")
        return read_optimum(path)
    dpo, sft = (_single_run(setup, config, task) for task in Task)
    write_json(path, {"dpo": dpo, "sft": sft, "fingerprint": key, "estimated_by": "single runs"})
    return dpo, sft


def _fingerprint_in(path: Path) -> str | None:
    """Of the estimate in `path`; None for a file that holds no estimate."""
    try:
        data = read_json(path)
    except (OSError, ValueError):
        return None
    return data.get("fingerprint") if isinstance(data, dict) else None


def _single_run(setup: Setup, config: RunConfig, task: Task) -> float:
    """The lowest held-out loss along a run on `task` alone."""
    arguments = replace(
        config.training,
        algo=task.label,
        max_steps=total_steps(setup, config),
        output_dir=str(Path(config.output_dir) / "optima" / task.label),
        save_strategy="no",
        report_to=[],
        load_best_model_at_end=False,
        resume_from_checkpoint=None,
    )
    description = f"optimum of {task.label}: a run on it alone"
    scheduler = make_scheduler(task.label)
    trainer = make_trainer(
        setup, config, arguments, scheduler, [task], evaluated=[task], description=description
    )
    name = f"{task.label}_loss"
    losses = [trainer.held_out()[name]]
    trainer.train()
    losses += [log[f"eval_{name}"] for log in trainer.state.log_history if f"eval_{name}" in log]
    losses.append(trainer.held_out()[name])
    return min(losses)


def _fingerprint(setup: Setup, config: RunConfig) -> str:
    """Changes with the data, the model, the losses or how the single runs are trained."""
    training = config.training
    identity: dict[str, Any] = {
        "data": [
            fingerprint(part[task]) for part in (setup.train, setup.held_out) for task in Task
        ],
        "model": asdict(config.model),
        "loss": [training.beta, training.loss_type, training.label_smoothing],
        "steps": total_steps(setup, config),
        "batches": [training.batch_size(task) for task in Task],
        "training": {name: str(getattr(training, name)) for name in TRAINED_BY},
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
