"""Runs on one objective alone, what they are worth as an estimate, and which problem they solve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llm.data.encode import fingerprint
from llm.flags.arguments import RunConfig
from llm.loss.evaluate import by_length, device_of, evaluating
from llm.loss.objectives import LanguageObjective, Row, move
from llm.setup import Setup, make_trainer, total_steps
from llm.train.free import FREE, OPTIMA, counting
from llm.train.identity import reference_of, rows_of_step
from theory.records import digest, read_json, write_json
from theory.registry import make_scheduler
from theory.tasks import Task


@dataclass(frozen=True)
class SingleRun:
    """One objective trained alone from the initial policy; losses on the held-out rows."""

    steps: int
    learning_rate: float
    start: float
    """The loss of the initial policy."""
    best: float
    """The lowest loss along the run: the estimate of f*."""
    end: float
    gradient: float | None = None
    """|grad f| on training rows at the end, relative to its start; None if not measured."""


def single_run(
    setup: Setup,
    config: RunConfig,
    task: Task,
    *,
    steps: int,
    learning_rate: float,
    gradient_rows: int = 0,
) -> SingleRun:
    """Train on `task` alone for `steps` steps, with the whole learning-rate schedule in them."""
    arguments = replace(
        config.training,
        algo=task.label,
        max_steps=steps,
        learning_rate=learning_rate,
        output_dir=str(Path(config.output_dir) / "optima" / task.label),
        save_strategy="no",
        report_to=[],
        load_best_model_at_end=False,
        resume_from_checkpoint=None,
        force_resume=False,
    )
    trainer = make_trainer(
        setup,
        config,
        arguments,
        make_scheduler(task.label),
        [task],
        evaluated=[task],
        description=f"optimum of {task.label}: {steps} steps on it alone",
    )
    rows = setup.train[task].rows[:gradient_rows]
    name = f"{task.label}_loss"

    def gradient() -> float:
        sizes = {"batch_size": config.training.batch_size(task)}
        with trainer.accelerator.autocast():
            return gradient_norm(
                trainer.model,
                setup.objectives[task],
                rows,
                pad_token_id=setup.tokenizer.pad_token_id,
                **sizes,
            )

    start = trainer.held_out()[name]
    start_gradient = gradient() if rows else 0.0
    trainer.train()
    logged = [log[f"eval_{name}"] for log in trainer.state.log_history if f"eval_{name}" in log]
    end = trainer.held_out()[name]
    share = gradient() / start_gradient if start_gradient > 0.0 else None
    return SingleRun(steps, learning_rate, start, min(start, *logged, end), end, share)


def kept_run(
    setup: Setup, config: RunConfig, task: Task, steps: int, learning_rate: float, rows: int
) -> tuple[SingleRun, bool]:
    """`single_run`, or its record if an interrupted command has left one (then True)."""
    folder = Path(config.output_dir) / "optima" / task.label
    path = folder / f"{steps}-steps-{learning_rate:g}.json"
    key = digest(_trained_by(setup, config) | {"gradient_rows": rows})
    record = read_json(path) if path.exists() else {}
    if record.get("fingerprint") == key:
        return SingleRun(**record["run"]), True
    run = single_run(
        setup, config, task, steps=steps, learning_rate=learning_rate, gradient_rows=rows
    )
    if config.training.process_index == 0:
        write_json(path, {"fingerprint": key, "run": asdict(run)})
    return run, False


def gradient_norm(
    model: torch.nn.Module,
    objective: LanguageObjective,
    rows: Sequence[Row],
    *,
    batch_size: int,
    pad_token_id: int,
) -> float:
    """|grad f| of the mean of `objective` over `rows` in the trained parameters, without dropout.

    Each process computes the whole of it. The gradients of the model are cleared.
    """
    total = objective.items(rows)
    model.zero_grad()
    with evaluating(model):
        for chunk in by_length(range(len(rows)), rows, batch_size):
            batch = objective.collate([rows[i] for i in chunk], pad_token_id)
            (objective(model, move(batch, device_of(model))).total / total).backward()
    squares = [
        parameter.grad.float().square().sum()
        for parameter in model.parameters()
        if parameter.grad is not None
    ]
    model.zero_grad()
    return float(torch.stack(squares).sum().sqrt())


def problem(setup: Setup, config: RunConfig) -> dict[str, str]:
    """What the optimal losses belong to, by name: data, losses, reference and model."""
    described = {
        f"{task.label} data": digest([fingerprint(part[task]) for part in _parts(setup)])
        for task in setup.train
    }
    for task, objective in setup.objectives.items():
        described[f"{task.label} loss"] = repr(_whatever_the_batches(objective))
    if Task.DPO in setup.train:
        described["reference"] = reference_of(setup.train[Task.DPO].rows)
    return described | {"model": setup.policy} | counting(config.model, free=FREE)


def estimate_fingerprint(setup: Setup, config: RunConfig) -> str:
    """Changes with the problem and with how the single runs are trained and measured."""
    budget = {"steps": total_steps(setup, config), "rate": config.training.learning_rate}
    return digest(_trained_by(setup, config) | budget)


def _trained_by(setup: Setup, config: RunConfig) -> dict[str, Any]:
    """All that a single run depends on but its number of steps and its learning rate."""
    training = config.training
    seed = training.seed if training.data_seed is None else training.data_seed
    return {
        "problem": problem(setup, config),
        "batches": [rows_of_step(training, training.batch_size(task)) for task in Task],
        "order": seed,
        "settings": counting(training, free=OPTIMA),
    }


def _whatever_the_batches(objective: Any) -> Any:
    """Packed or padded, the values are the same."""
    return replace(objective, packing=True)


def _parts(setup: Setup) -> tuple[Mapping[Task, Any], Mapping[Task, Any]]:
    return setup.train, setup.held_out
