"""Numbers that no run can have, and settings that another setting makes meaningless."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from llm.flags.arguments import JointArguments, RunConfig
from llm.train.free import plain
from theory.cli import UserError

Numbers = Callable[[float], bool]
_COUNT: tuple[Numbers, str] = (lambda x: x >= 1, "it must be at least 1")
_STEPS: tuple[Numbers, str] = (
    lambda x: 0 < x < math.inf,
    "it must be a positive number of steps, or a share of them below 1",
)
_NATURAL: tuple[Numbers, str] = (lambda x: 0 <= x < math.inf, "it must be finite and not negative")
_SHARE: tuple[Numbers, str] = (lambda x: 0 <= x < 1, "it must lie in [0, 1)")
LIMITS: dict[str, tuple[Numbers, str]] = {
    "max_steps": (lambda x: x == -1 or x >= 1, "it must be at least 1, or -1 for num_train_epochs"),
    "num_train_epochs": (lambda x: 0 < x < math.inf, "it must be positive and finite"),
    "seed": (lambda x: 0 <= x < 2**32, "it must lie in [0, 2^32)"),
    "data_seed": (lambda x: 0 <= x < 2**63, "it must lie in [0, 2^63)"),
    **dict.fromkeys(("save_steps", "eval_steps", "logging_steps"), _STEPS),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), _SHARE),
    **dict.fromkeys(
        ("max_grad_norm", "weight_decay", "learning_rate", "warmup_steps", "adam_epsilon"), _NATURAL
    ),
    **dict.fromkeys(("neftune_noise_alpha", "eval_delay"), _NATURAL),
    **dict.fromkeys(("gradient_accumulation_steps", "per_device_eval_batch_size"), _COUNT),
    **dict.fromkeys(("save_total_limit", "ddp_timeout", "lora_alpha"), _COUNT),
}
"""Name -> what its value must be; None stands for no value."""


def check_limits(config: RunConfig) -> None:
    for name, (allowed, words) in LIMITS.items():
        own = config.model if hasattr(config.model, name) else config.training
        value = getattr(own, name)
        if value is not None and not allowed(value):
            raise UserError(f"--{name} is {value}; {words}")


def _unused(training: JointArguments) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(the setting that makes others meaningless, those others)."""
    optim, decay = plain(training.optim), plain(training.lr_scheduler_type)
    best = training.load_best_model_at_end or plain(training.save_strategy) == "best"
    if training.max_steps > 0:
        yield f"--max_steps {training.max_steps}", ("num_train_epochs",)
    if decay == "constant":
        yield f"--lr_scheduler_type {decay}", ("warmup_steps",)
    if optim in ("sgd", "adagrad", "rmsprop"):
        yield f"--optim {optim}", ("adam_beta1", "adam_beta2", "adam_epsilon")
    if optim in ("adamw_torch", "adamw_torch_fused", "adafactor"):
        yield f"--optim {optim}", ("optim_args",)
    if not optim.startswith(("galore", "apollo")):
        yield f"--optim {optim}", ("optim_target_modules",)
    if plain(training.eval_strategy) == "no":
        yield "--eval_strategy no", ("eval_delay",)
    if not (best or decay in ("reduce_lr_on_plateau", "greedy")):
        reading = "--load_best_model_at_end false"
        yield reading, ("metric_for_best_model", "greater_is_better")
    if plain(training.save_strategy) == "no":
        yield "--save_strategy no", ("save_total_limit", "save_only_model")
    if not training.gradient_checkpointing:
        kinds = ("gradient", "activation")
        yield "--gradient_checkpointing false", tuple(f"{k}_checkpointing_kwargs" for k in kinds)
    if not training.push_to_hub:
        names = ("model_id", "strategy", "always_push", "revision")
        yield "--push_to_hub false", tuple(f"hub_{name}" for name in names)
    if "trackio" not in (training.report_to or ()):
        spaces = ("space_id", "bucket_id", "static_space_id")
        yield "this --report_to", tuple(f"trackio_{name}" for name in spaces)
    if not training.report_to:
        yield "--report_to none", ("run_name", "project")


def check_together(training: JointArguments, named: set[str], beneath: set[str]) -> None:
    """Refuse what the command line (`named`) or the file beneath it gives for nothing. The command
    line may take away what a setting of the file is for."""
    for reason, names in _unused(training):
        flag = reason.removeprefix("this ").split()[0][2:]
        given = named if flag in named else named | beneath
        for name in names:
            if name in given:
                raise UserError(f"--{name} is not used with {reason}")


def check_intervals(training: JointArguments, named: set[str], beneath: set[str]) -> None:
    """Refuse `X_steps` where the command line (`named`), or the file beneath it, has another
    `X_strategy` than steps beside it."""
    for kind in ("save", "eval", "logging"):
        steps, strategy = f"{kind}_steps", f"{kind}_strategy"
        wanted = steps in named or (steps in beneath and strategy not in named)
        if wanted and plain(getattr(training, strategy)) != "steps":
            value = plain(getattr(training, strategy))
            raise UserError(f"--{steps} is not used with --{strategy} {value}")
