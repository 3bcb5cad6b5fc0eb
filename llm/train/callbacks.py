"""What a run shows and keeps while it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import (
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from theory.records import write_text


class ProgressBar(ProgressCallback):
    """Trainer's bar with the two losses behind it, instead of a printed line for every log."""

    def __init__(self, description: str) -> None:
        super().__init__()
        self.description = description

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.description)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None:
            losses = {
                name: logs[f"{name}_loss"]
                for name in ("dpo", "sft")
                if f"{name}_loss" in (logs or {})
            }
            self.training_bar.set_postfix(losses)


class JsonLines(TrainerCallback):
    """Appends every log to a file as it comes: a killed run keeps what it measured."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run goes back to its checkpoint: to the lines that the checkpoint has seen."""
        if state.is_world_process_zero:
            lines = (self._line(log["step"], log) for log in state.log_history)
            write_text(self.path, "".join(lines))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._line(state.global_step, logs))

    @staticmethod
    def _line(step: float, logs: dict[str, Any]) -> str:
        return json.dumps({"step": step} | logs) + "\n"
