"""f_DPO* and f_SFT*: the losses that each objective reaches when it is trained alone.

The paper's estimate (arXiv 2410.15483, section 6): one run per objective from the same initial
policy. The number kept is the lowest held-out loss along that run. It is an estimate: a joint run
can come out below it, and a gap is then negative.
"""

from __future__ import annotations

import hashlib
import json
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
        return float(data["dpo"]), float(data["sft"])
    except OSError as error:
        raise UserError(f"--optima {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'--optima {path} must be JSON with two losses: {{"dpo": 0.3, "sft": 1.2}}'
        ) from error


def _estimated(setup: Setup, config: RunConfig, say: Callable[[str], None]) -> Optimum:
    missing = [task.label for task in Task if task not in setup.train]
    if missing:
        raise UserError(f"estimating the optima needs {' and '.join(missing)} data as well")
    path = Path(config.output_dir) / FILE
    key = _fingerprint(setup, config)
    if path.exists() and read_json(path).get("fingerprint") == key:
        say(f"optima: read from {path}")
        return read_optimum(path)
    dpo, sft = (_single_run(setup, config, task) for task in Task)
    write_json(path, {"dpo": dpo, "sft": sft, "fingerprint": key, "estimated_by": "single runs"})
    return dpo, sft


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
        "training": [
            total_steps(setup, config),
            training.learning_rate,
            str(training.lr_scheduler_type),
            str(training.optim),
            training.gradient_accumulation_steps,
            [training.batch_size(task) for task in Task],
            training.seed,
        ],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
