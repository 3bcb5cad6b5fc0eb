"""The command line that repeats a run, from the settings that it recorded."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields
from typing import Any

import yaml

from llm.flags.arguments import DataArguments, JointArguments, ModelArguments
from llm.flags.parse import TINY_RECIPE
from llm.report.record import RunRecord

DICTS = {"lr_scheduler_kwargs"}
"""Settings that are given as JSON; transformers fills the other dictionaries itself."""
KINDS: dict[str, Any] = {
    "model": ModelArguments,
    "data": DataArguments,
    "training": JointArguments,
}
"""Parts of joint_config.json, and the flags that they hold."""
SET_BY_THE_MACHINE = {
    *("use_cpu", "local_rank", "logging_dir", "run_name", "report_to", "hub_token"),
    *("do_eval", "dataloader_pin_memory"),
}
"""Recorded settings that say nothing about the result, or follow from others."""
OTHERWISE = SET_BY_THE_MACHINE | {"schedule"}
"""Settings that are no flag of this name: the options of the schedule are flags of their own."""


def command(record: RunRecord) -> str:
    """The recorded settings as a command line, without those that are the defaults."""
    flags = ["python -m llm.run"]
    beneath = _recipe_keys(record)
    for part, kind in KINDS.items():
        values = record.config.get(part, {})
        for name, default in ((f.name, f.default) for f in fields(kind) if f.name in values):
            if name in OTHERWISE or (isinstance(values[name], dict) and name not in DICTS):
                continue
            if _differs(values[name], default) or (name in beneath and values[name] is not None):
                flags.append(_flag(name, values[name]))
    options = record.training.get("schedule", {})
    flags += [_flag(name, value) for name, value in options.items()]
    return " \\\n    ".join(flags)


def _differs(value: Any, default: Any) -> bool:
    """Whether a plain value is neither the default nor what no flag at all means."""
    if value in (None, False, [], ""):
        return default is True and value is False
    return bool(value != default)


def _recipe_keys(record: RunRecord) -> set[str]:
    """What a recipe sets unless a flag says otherwise: to be told even if it is a default."""
    if record.config["model"]["model_name_or_path"] is not None:
        return set()
    return set(yaml.safe_load(TINY_RECIPE.read_text(encoding="utf-8"))) - SET_BY_THE_MACHINE


def _flag(name: str, value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    texts = [v if isinstance(v, str) else json.dumps(v) for v in values]
    return f"--{name} {shlex.join(texts)}"
