"""The command line that repeats a run, from the settings that it recorded."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields
from typing import Any

import yaml

from llm.arguments import DataArguments, ModelArguments
from llm.config import TINY_RECIPE, JointArguments
from llm.pretrain.settings import EMBEDDED_RECIPE, RECIPE
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


def command(record: RunRecord) -> str:
    """The recorded settings as a command line, without those that are the defaults."""
    pretrains = "pretrain" in record.config
    flags = [f"python -m llm.{'pretrain' if pretrains else 'run'}"]
    if pretrains:
        own = {**record.config["pretrain"]["size"], **record.config["pretrain"]}
        flags += [_flag(n, value) for n, value in own.items() if n != "size" and value != []]
    beneath = _recipe_keys(record)
    for part, kind in KINDS.items():
        values = record.config.get(part, {})
        for name, default in ((f.name, f.default) for f in fields(kind) if f.name in values):
            if name in SET_BY_THE_MACHINE or (isinstance(values[name], dict) and name not in DICTS):
                continue
            if _differs(values[name], default) or (name in beneath and values[name] is not None):
                flags.append(_flag(name, values[name]))
    hidden = ("--algo",) if pretrains else ()
    return " \\\n    ".join(flag for flag in flags if flag.split()[0] not in hidden)


def _differs(value: Any, default: Any) -> bool:
    """Whether a plain value is neither the default nor what no flag at all means."""
    if value in (None, False, [], ""):
        return default is True and value is False
    return bool(value != default)


def _recipe_keys(record: RunRecord) -> set[str]:
    """What a recipe sets unless a flag says otherwise: to be told even if it is a default."""
    if "pretrain" in record.config:
        recipes = [RECIPE] if record.config["pretrain"]["texts"] else [RECIPE, EMBEDDED_RECIPE]
    else:
        recipes = [TINY_RECIPE] if record.config["model"]["model_name_or_path"] is None else []
    texts = (path.read_text(encoding="utf-8") for path in recipes)
    keys = {key for text in texts for key in yaml.safe_load(text)}
    return keys - SET_BY_THE_MACHINE


def _flag(name: str, value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    texts = [v if isinstance(v, str) else json.dumps(v) for v in values]
    return f"--{name} {shlex.join(texts)}"
