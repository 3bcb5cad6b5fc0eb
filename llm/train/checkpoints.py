"""Checkpoints that a killed run can trust: whole or absent, and checked byte by byte.

A checkpoint is written into a staging folder, gets a manifest with the sha256 of every file, and
appears under its name by one rename. Resuming verifies the manifest and falls back to the newest
checkpoint that is intact. `SafeCheckpoints` puts this under transformers' Trainer.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME

from theory.cli import UserError
from theory.records import read_json, write_json

MANIFEST = "manifest.json"
STAGING = ".staging"
_NAME = re.compile(r"checkpoint-(\d+)")
_CHUNK = 1 << 20


class SafeCheckpoints(Trainer):
    """A Trainer whose checkpoints are whole or absent, and whose heads come back."""

    _staging: Path | None = None
    _resumed_from: str | None = None
    _generators_from: str | None = None

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """transformers' `train`; `True` resumes from the newest checkpoint that is intact.

        Raises UserError on every rank if the checkpoint is damaged or belongs to another run.
        """
        found: list[Any] = [None, None]
        if self.is_world_process_zero():  # the only rank that is sure to hold every weight
            try:
                found[0] = self._checkpoint_to_resume(resume_from_checkpoint)
            except UserError as error:
                found[1] = str(error)
        if self.args.world_size > 1:
            broadcast_object_list(found)
        if found[1] is not None:
            raise UserError(found[1])
        self._resumed_from, self._generators_from = found[0], None
        self.args.eval_on_start &= found[0] is None  # a checkpoint is no start
        return super().train(found[0], *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer counts behind a step: it would take one more after a checkpoint of the last.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # Once: Trainer restores the generators after it has drawn the first batch, and a probe
        # that belongs to that batch has used them by then.
        if checkpoint != self._generators_from:
            super()._load_rng_state(checkpoint)
            self._generators_from = checkpoint

    def _checkpoint_to_resume(self, wanted: str | bool | None) -> str | None:
        checkpoint = None
        if wanted is True:
            checkpoint = newest_intact(Path(str(self.args.output_dir)), print)
        elif wanted:
            checkpoint = Path(str(wanted))
        self._check_resume(checkpoint)
        return None if checkpoint is None else str(checkpoint)

    def _check_resume(self, checkpoint: Path | None) -> None:
        """Called before anything is loaded or sharded; raises UserError to refuse."""

    def _get_output_dir(self, trial: Any) -> str:
        # Trainer saves below this folder; while it does, that is the staging folder.
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the weights are what a schedule-free optimiser (arXiv 2405.15682) has found.

        It steps at other points than these averages. Other optimisers have nothing to switch.
        """
        switches = [getattr(self.optimizer, mode, None) for mode in ("eval", "train")]
        before, after = (each if callable(each) else (lambda: None) for each in switches)
        before()
        try:
            yield
        finally:
            after()

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        with self.averaged_weights():
            self._save_whole(model, trial)

    def _save_whole(self, model: torch.nn.Module, trial: Any) -> None:
        output_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            clear_staging(output_dir)
        self.accelerator.wait_for_everyone()
        self._staging = output_dir / STAGING
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        best = self.state.best_model_checkpoint
        if best and STAGING in Path(best).parts:
            best = self.state.best_model_checkpoint = str(output_dir / name)
        if self.args.should_save:
            staged = output_dir / STAGING / name
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            publish(staged, output_dir)
            rotate(output_dir, self.args.save_total_limit, [Path(best)] if best else [])
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self.averaged_weights() if not _internal_call else nullcontext():
            super().save_model(output_dir, _internal_call)
        if not _internal_call and self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
                # Trainer has written nothing: it leaves the weights to the sharded checkpoints.
                self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        # GPT-NeoX checkpoints name the head `embed_out` and the model calls it `lm_head`. Trainer
        # loads without strictness and leaves the trained head behind; `from_pretrained` renames.
        target = model or self.model
        if not isinstance(target, PreTrainedModel) or self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(saved.state_dict())
        return None

    def _load_best_model(self) -> None:
        if isinstance(self.model, PreTrainedModel) and not self.is_fsdp_enabled:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()


def clear_staging(output_dir: Path) -> None:
    """Remove what a killed run left half-written."""
    shutil.rmtree(output_dir / STAGING, ignore_errors=True)


def publish(staged: Path, output_dir: Path) -> Path:
    """Seal the staged checkpoint with its manifest and move it to its name in one step."""
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    write_json(staged / MANIFEST, {str(p.relative_to(staged)): _sha256(p) for p in files})
    for path in (*files, staged / MANIFEST):
        _flush(path)
    final = output_dir / staged.name
    if final.exists():  # an older run's checkpoint of the same step
        shutil.rmtree(final)
    os.replace(staged, final)
    _flush(output_dir)
    clear_staging(output_dir)
    return final


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in one phrase; None if every byte is as it was written."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
        expected = dict(manifest.items())
    except (OSError, ValueError, AttributeError):
        return f"{MANIFEST} is missing or unreadable"
    for name, digest in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != digest:
            return f"{name} was altered or cut short (its checksum differs)"
    return None


def newest_intact(output_dir: Path, say: Callable[[str], None]) -> Path:
    """The newest undamaged checkpoint of a run; each damaged one on the way is named."""
    for checkpoint in reversed(list_checkpoints(output_dir)):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        say(f"checkpoint {checkpoint} is damaged: {problem}; trying an older one")
    raise UserError(f"--resume_from_checkpoint true: no intact checkpoint in {output_dir}")


def intact(checkpoint: Path) -> Path:
    """The checkpoint named by the user, or an error that says what is wrong with it."""
    if not checkpoint.is_dir():
        raise UserError(f"--resume_from_checkpoint {checkpoint} is not a directory")
    problem = damage(checkpoint)
    if problem is not None:
        raise UserError(f"--resume_from_checkpoint {checkpoint} is damaged: {problem}")
    return checkpoint


def list_checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoints of a run, oldest first by their step."""
    found = [
        (int(match.group(1)), path)
        for path in output_dir.glob("checkpoint-*")
        if path.is_dir() and (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def rotate(output_dir: Path, limit: int | None, keep: Collection[Path] = ()) -> None:
    """Delete the oldest checkpoints beyond `limit`; those in `keep` and the newest stay."""
    if limit is None or limit < 1:
        return
    kept = {path.resolve() for path in keep}
    checkpoints = list_checkpoints(output_dir)
    removable = [path for path in checkpoints[:-1] if path.resolve() not in kept]
    for path in removable[: max(0, len(checkpoints) - limit)]:
        shutil.rmtree(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Push a file or directory to the disk: a rename must not outrun its contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
