"""What the tests of resuming share: schedules, models with dropout, a run cut short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from _gram import MinNorm
from _tiny import (
    make_policy,
    make_trainer,
)
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from llm.train.trainer import JointTrainer
from theory.schedulers import Alright, Alternate, Importance, Maxright, Mix, Sequential, Single
from theory.scheduling import Scheduler
from theory.tasks import Task

STEPS, AT = 8, 5
SCHEDULERS: dict[str, Scheduler] = {
    "sequential": Sequential(6, "sft_then_dpo"),  # one step before the boundary
    "sequential, other order": Sequential(6, "dpo_then_sft"),
    "sequential, at the boundary": Sequential(AT, "dpo_then_sft"),
    "sequential, second stage": Sequential(3, "sft_then_dpo"),
    "mix": Mix(0.3),
    "alright": Alright(0.5, seed=4),
    "maxright": Maxright(0.85, (0.0, 0.0), refresh_every=4),  # between the probes at 4 and 8
    "maxright, averaged": Maxright(0.85, (0.1, 0.2), 4, scale_steps=True, value_ema=0.3),
    "maxright, at a probe": Maxright(0.85, (0.0, 0.0), refresh_every=AT),
    "importance": Importance(0.3, 0.6, seed=4),
    "alternate": Alternate(0.5, 3),
    "both gradients": MinNorm(),
    "dpo": Single(Task.DPO),
    "sft": Single(Task.SFT),
}
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
    "weight_decay": 0.1,
}


class Interrupt(TrainerCallback):
    """Stops the training right after its first checkpoint."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


def with_dropout(seed: int) -> torch.nn.Module:
    return make_policy(seed=seed, hidden_dropout=0.1)


def with_adapters(seed: int) -> torch.nn.Module:
    """The same frozen base for every seed, other adapters."""
    model = make_policy()
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_dropout=0.3, target_modules=["query_key_value", "dense"])
    return get_peft_model(model, config)


VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (with_dropout, {}),
    "accumulation": (with_dropout, {"gradient_accumulation_steps": 2}),  # an epoch is 3 steps
    "LoRA": (with_adapters, {}),
}


def trained(trainer: JointTrainer, checkpoint: Path | None = None) -> dict[str, Any]:
    """Train; everything that a resumed run must have in common with the straight one."""
    torch.manual_seed(0)  # building the model has drawn from the generator
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    logs = [log for log in trainer.state.log_history if "loss" in log]
    schedule = trainer.state_to_json()
    del schedule["identity"]  # text: compared by the checkpoint's own refusal
    return {
        "optimiser": trainer.optimizer.state_dict(),
        "learning rate": trainer.lr_scheduler.state_dict()["last_epoch"],
        "rates": [log["learning_rate"] for log in logs],
        "losses": [log["loss"] for log in logs],
        "schedule": schedule,
        "random state": torch.get_rng_state(),
    }


def interrupted(scheduler: Scheduler, output_dir: Path, **options: Any) -> Path:
    """The checkpoint of a run that ended after `AT` steps."""
    options = {"model": with_dropout(0), "save_steps": AT, **OPTIONS, **options}
    trainer = make_trainer(scheduler, output_dir, save_strategy="steps", **options)
    trainer.add_callback(Interrupt())
    trained(trainer)
    assert trainer.state.global_step == options["save_steps"]
    return output_dir / f"checkpoint-{trainer.state.global_step}"
