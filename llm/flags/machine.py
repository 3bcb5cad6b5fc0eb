"""What would fail at the end of a run, or hours into it, found out before a model is loaded."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from safetensors import safe_open
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from llm.flags.arguments import JointArguments, RunConfig
from llm.flags.checks import is_adapter
from llm.train.free import plain
from theory.cli import UserError, check_output_dir, did_you_mean

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}
"""Bytes of a weight by --dtype; at least, where the checkpoint decides."""
FULL_ADAM = ("adamw_torch", "adamw_torch_fused")
ADAM = 3
"""A checkpoint under Adam holds the weights and two moments of each."""


def check_machine(config: RunConfig) -> None:
    """Refuse trackers that are missing, a hub that does not answer, and a disk that is too full."""
    training = config.training
    check_output_dir(Path(config.output_dir), "--output_dir")
    check_trackers(training)
    if training.push_to_hub and training.process_index == 0:
        check_hub(training)
    check_disk(config)


def check_trackers(training: JointArguments) -> None:
    for name in training.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            hint = did_you_mean([name], INTEGRATION_TO_CALLBACK)
            raise UserError(f"--report_to {name} is no tracker of transformers{hint}")
        if name not in get_available_reporting_integrations():
            raise UserError(f"--report_to {name}: {name} is not installed, or not set up")


def check_hub(training: JointArguments) -> None:
    """Ask the hub who we are: that needs a network and a token that is valid."""
    token = training.hub_token or get_token()
    if not token:
        raise UserError("--push_to_hub needs a token: hf auth login, or --hub_token")
    if constants.is_offline_mode():
        raise UserError("--push_to_hub needs the network, and HF_HUB_OFFLINE is set")
    try:
        HfApi(token=token).whoami()
    except Exception as error:  # of whatever library the hub's client is built on
        line = str(error).split("\n")[0]
        raise UserError(f"--push_to_hub: the hub does not let us in: {line}") from error


def check_disk(config: RunConfig) -> None:
    """Refuse a run whose results cannot fit, by what it writes at the least."""
    path = Path(config.output_dir)
    free, needed = shutil.disk_usage(path).free, least_bytes(config)
    if needed > free:
        raise UserError(
            f"--output_dir {path}: the model and its checkpoints take at least "
            f"{needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; save less "
            "(--save_total_limit, --save_steps) or elsewhere"
        )


def least_bytes(config: RunConfig) -> int:
    """Bytes of the final model and of the checkpoints kept at once; 0 where they are not known.

    Known are the weights of a local model that is trained whole. Checkpoints counted are those of
    steps that are set; a resumed run has some of them already, and counts one.
    """
    name, training = config.model.model_name_or_path, config.training
    if name is None or config.model.use_peft or is_adapter(name):
        return 0
    model = _weights(Path(name)) * BYTES[config.model.dtype]
    adam = plain(training.optim) in FULL_ADAM
    size = model * (ADAM if adam and not training.save_only_model else 1)
    return model + size * _checkpoints(training)


def _weights(model: Path) -> int:
    """Number of weights in the local files of a model, from their headers."""
    total = 0
    for file in model.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            shapes = (tensors.get_slice(key).get_shape() for key in tensors.keys())  # noqa: SIM118
            total += sum(math.prod(shape) for shape in shapes)
    return total


def _checkpoints(training: JointArguments) -> int:
    """How many checkpoints lie on the disk at once, at the least."""
    strategy = plain(training.save_strategy)
    if strategy == "no":
        return 0
    made = 1
    if strategy == "steps" and training.resume_from_checkpoint is None:
        if training.save_steps < 1:
            made = int(1 / training.save_steps)
        elif training.max_steps > 0:
            made = math.ceil(training.max_steps / training.save_steps)
    # The oldest goes when the newest is whole.
    kept = training.save_total_limit
    return made if kept is None else min(made, kept + 1)
