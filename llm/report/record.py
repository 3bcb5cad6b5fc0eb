"""What a run of `llm.run` left on disk, finished or killed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from llm.optima import FILE as OPTIMA_FILE
from llm.run import CONFIG_FILE, METRICS_FILE, SCHEDULE_FILE, SUMMARY_FILE
from llm.train.checkpoints import list_checkpoints
from llm.train.identity import STATE_KEY
from theory.cli import UserError
from theory.plotting import style
from theory.records import read_json
from theory.tasks import Task

Data = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """`summary` is None until the run has finished; `state` (decisions, counters) is then that of
    the newest checkpoint, or None."""

    folder: Path
    config: Data
    summary: Data | None
    state: Data | None
    log: list[Data]

    @property
    def training(self) -> Data:
        return dict(self.config["training"])

    @property
    def last_step(self) -> int:
        return max((int(line["step"]) for line in self.log), default=0)

    @cached_property
    def lines(self) -> list[Data]:
        """The log, with the held-out values before and after as evaluations of the first and
        the last step."""
        if self.summary is None:
            return self.log
        held_out = self.summary["held_out"]
        ends = [(0, held_out["before"]), (sum_of_steps(self), held_out["after"])]
        first, last = (
            {"step": step} | {f"eval_{name}": value for name, value in values.items()}
            for step, values in ends
        )
        return [first, *self.log, last]

    @cached_property
    def optimum(self) -> Data | None:
        """{"dpo": f*, "sft": f*}, where known."""
        if self.summary is not None:
            return self.summary["optimum"]
        path = self.folder / OPTIMA_FILE
        return read_object(path) if path.is_file() else None

    @property
    def tasks(self) -> list[str]:
        """The objectives that were trained on, as far as is recorded."""
        state = dict.fromkeys(("dpo", "sft")) if self.state is None else self.state["steps_taken"]
        counts = state if self.summary is None else self.summary["steps"]
        return [task.label for task in (Task.SFT, Task.DPO) if task.label in counts]

    @property
    def label(self) -> str:
        """The name of the schedule for a reader."""
        return str(self._schedule.get("label") or style.label(self.training["algo"]))

    @property
    def schedule(self) -> str:
        """The schedule in words, as the run recorded it."""
        identity = {} if self.state is None else self.state["identity"]
        return str(self._schedule.get("description", identity.get("schedule")))

    @property
    def _schedule(self) -> Data:
        return {} if self.summary is None else dict(self.summary.get("schedule", {}))

    @property
    def probes(self) -> list[int]:
        """The steps before which the schedule had both losses evaluated."""
        return [] if self.state is None else list(self.state["probed_at"])


def sum_of_steps(record: RunRecord) -> int:
    """Optimiser steps taken: the decisions, one for each."""
    return record.last_step if record.state is None else len(record.state["decisions"])


def is_run(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


def read_run(folder: Path) -> RunRecord:
    """Raises UserError for a directory whose records cannot be read."""
    done, schedule = folder / SUMMARY_FILE, folder / SCHEDULE_FILE
    summary = read_object(done) if done.is_file() else None
    if summary is not None and schedule.is_file():
        state: Data | None = read_object(schedule)
    else:
        state = _checkpointed_state(folder)
    config = read_object(folder / CONFIG_FILE)
    if "training" not in config or "data" not in config:
        raise UserError(f"{folder / CONFIG_FILE} is not the record of a run")
    return RunRecord(folder, config, summary, state, _read_log(folder / METRICS_FILE))


def read_object(path: Path) -> Data:
    """A JSON object, or one line that names the file."""
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} does not hold an object")
    return data


def _checkpointed_state(folder: Path) -> Data | None:
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            state = read_json(checkpoint / TRAINER_STATE_NAME)["stateful_callbacks"][STATE_KEY]
        except (OSError, ValueError, KeyError):
            continue  # damaged: an older one will do
        return dict(state)
    return None


def _read_log(path: Path) -> list[Data]:
    """All whole lines: a killed run may have cut the last one."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            data = json.loads(line)
        except ValueError:
            continue
        if isinstance(data, dict) and isinstance(data.get("step"), int | float):
            lines.append(data)
    return lines
