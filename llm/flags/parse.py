"""The command line of `llm.run`: transformers' own flags, TRL's names, and ours.

Values come from, in rising order: the defaults below; the YAML file of `--config` (or, when no
model is named, the embedded recipe `llm/recipes/tiny.yaml`); the command line. A flag, or a key of
a --config file, that the chosen algorithm, loss or data does not use is refused, never ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser
from transformers.trainer_utils import SaveStrategy

from llm.flags.arguments import DataArguments, JointArguments, ModelArguments, RunConfig
from llm.flags.checks import check_batch_flags, check_data_flags, check_model_flags
from llm.flags.limits import check_intervals, check_limits, check_together
from llm.flags.obeyed import refuse, unobeyed
from llm.flags.schedule import check_schedule_flags, given_options, schedule_arguments
from llm.loss.losses import check_preference_options
from llm.train.values import check_value_options
from theory.cli import OneLineParser, UserError, did_you_mean
from theory.tasks import Task

TINY_RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
PROG = "python -m llm.run"


def parse(
    argv: Sequence[str], algorithms: Sequence[str] = (), others: Iterable[str] = ()
) -> RunConfig:
    """Read the command line (and its YAML file) into a validated configuration.

    `algorithms` are those of a command that runs several: an option is known if one of them uses
    it. Without them it is the one of --algo. `others` are flags of a command that takes these too.
    """
    recipe = _recipe(argv)
    values = recipe_values(recipe)
    algorithms = algorithms or [_algorithm(argv, values)]
    parser = _FlagParser(
        (ModelArguments, DataArguments, JointArguments, schedule_arguments(algorithms)),  # type: ignore[arg-type]
        prog=PROG,
        description="Train one language model on demonstrations and preferences at once.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file with values for any of these flags.")
    known = {action.dest for action in parser._actions} - {"config", "help"}
    defaults = with_strategies(as_flags(recipe, values, known))
    argv = with_strategies(argv)
    model, data, training, schedule, *rest = parser.parse_args_into_dataclasses(
        [*defaults, *argv], look_for_args_file=False, return_remaining_strings=True
    )
    if surplus := [token for token in rest[-1] if isinstance(token, Value)]:
        raise UserError(f"--config {recipe}: one value too many: {', '.join(surplus)}")
    parser.refuse_unknown(rest[-1], others)
    training.schedule |= given_options(schedule)
    config = RunConfig(model, data, training)
    explicit = argv if recipe == TINY_RECIPE else [*defaults, *argv]
    check_schedule_flags(algorithms, training, named_flags(explicit))
    check_intervals(training, named_flags(argv), named_flags(defaults))
    check_together(training, named_flags(argv), named_flags(defaults))
    _check(config, explicit=named_flags(explicit))
    return config


class Value(str):
    """A value from a file: never a flag, whatever it begins with."""


class _FlagParser(HfArgumentParser, OneLineParser):
    def _parse_optional(self, arg_string: str) -> Any:
        return None if isinstance(arg_string, Value) else super()._parse_optional(arg_string)


def with_strategies(tokens: Sequence[str]) -> list[str]:
    """The tokens, and what naming a number of steps means where no strategy is named beside it."""
    named = named_flags(tokens)
    implied = [
        (f"--{kind}_strategy", "steps")
        for kind in ("save", "eval", "logging")
        if f"{kind}_steps" in named and f"{kind}_strategy" not in named
    ]
    return [*tokens, *(token for pair in implied for token in pair)]


def _algorithm(argv: Sequence[str], recipe: Mapping[str, Any]) -> str:
    """What --algo says, needed before the parser is made: it has the options of the algorithm."""
    given = [str(recipe.get("algo", JointArguments.algo))]
    for i, token in enumerate(argv):
        if token.startswith("--algo="):
            given.append(token.removeprefix("--algo="))
        elif token == "--algo" and i + 1 < len(argv):
            given.append(argv[i + 1])
    return given[-1]


def named_flags(tokens: Sequence[str]) -> set[str]:
    """The names of the flags among `tokens`; `--refresh-every` is `refresh_every`."""
    flags = (t for t in tokens if t.startswith("--") and not isinstance(t, Value))
    return {t.split("=")[0][2:].replace("-", "_") for t in flags}


def _recipe(argv: Sequence[str]) -> Path | None:
    """The YAML file to start from: --config, or the embedded recipe if no model is named."""
    places = [i for i, token in enumerate(argv) if token.split("=")[0] == "--config"]
    if len(places) > 1:
        raise UserError("--config is given twice: put the values into one file")
    for i in places:
        _, joined, name = argv[i].partition("=")
        if joined or i + 1 < len(argv):
            return Path(name if joined else argv[i + 1])
    return None if "model_name_or_path" in named_flags(argv) else TINY_RECIPE


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, where YAML would take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"the key {key} stands there twice")
        return super().construct_mapping(node, deep)


def recipe_values(recipe: Path | None) -> dict[str, Any]:
    """The mapping in a YAML file; empty without one."""
    if recipe is None:
        return {}
    try:
        values = yaml.load(recipe.read_text(encoding="utf-8"), _Loader)
    except UserError as error:
        raise UserError(f"--config {recipe}: {error}") from error
    except OSError as error:
        raise UserError(f"--config {recipe}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {recipe} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {recipe} must hold a mapping of flags to values")
    return {str(key): value for key, value in values.items()}


def as_flags(recipe: Path | None, values: Mapping[str, Any], known: set[str]) -> list[str]:
    """The mapping as command-line tokens, so that the same parser checks both."""
    unknown = sorted(set(values) - known)
    if unknown:
        hint = did_you_mean(unknown, known)
        raise UserError(f"--config {recipe} has unknown keys: {', '.join(unknown)}{hint}")
    tokens: list[str] = []
    for key, value in values.items():
        if value is not None:
            items = value if isinstance(value, list) else [value]
            texts = (json.dumps(i) if isinstance(i, dict) else str(i) for i in items)
            tokens += [f"--{key}", *map(Value, texts)]
    return tokens


def _check(config: RunConfig, explicit: set[str]) -> None:
    """Everything that can be refused before a model or a data set is opened."""
    training = config.training
    if not 0.0 <= config.data.conflict <= 1.0:
        raise UserError(f"--conflict is {config.data.conflict}; it must lie in [0, 1]")
    if training.force_resume and not training.resume_from_checkpoint:
        raise UserError("--force_resume is not used without --resume_from_checkpoint")
    if "clipping" in explicit and not training.max_grad_norm:
        raise UserError("--clipping is not used with --max_grad_norm 0")
    check_limits(config)
    check_value_options(training.value_source, training.value_rows)
    if training.kl_rows < 0:
        raise UserError(f"--kl_rows is {training.kl_rows}; it must not be negative")
    _check_launch(training)
    refuse(explicit & unobeyed(JointArguments).keys())
    if training.load_best_model_at_end or training.save_strategy == SaveStrategy.BEST:
        _check_best_metric(training)
    check_batch_flags(config, explicit)
    check_preference_options(training.loss_type, training.beta, training.label_smoothing)
    if not training.precompute_ref_log_probs:
        raise UserError(
            "--precompute_ref_log_probs false: the reference is not held in memory while training; "
            "its log-probabilities are computed once and cached"
        )
    check_data_flags(config, explicit)
    check_model_flags(config, explicit)


def _check_launch(training: JointArguments) -> None:
    """What a launch may ask for and a scheduled step, or every rank's reference, forbids."""
    if training.n_gpu > 1:
        raise UserError(
            "several GPUs in one process: use accelerate launch, one process per GPU, or choose "
            "one with CUDA_VISIBLE_DEVICES"
        )
    if training.mixed_precision != "no" and not (training.bf16 or training.fp16):
        raise UserError(
            f"the launcher asks for mixed_precision {training.mixed_precision}: pass "
            f"--{training.mixed_precision} true, so that the reference has the same precision"
        )
    flags = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    if all(os.environ.get(flag, "false").lower() in ("true", "1") for flag in flags):
        raise UserError(
            "fsdp_cpu_ram_efficient_loading leaves the weights on one rank, and every rank "
            "computes the reference before sharding: set it to false"
        )


def _check_best_metric(training: JointArguments) -> None:
    name = (training.metric_for_best_model or "").removeprefix("eval_")
    if name.split("_")[0] not in (task.label for task in Task):
        raise UserError(
            "the best model needs --metric_for_best_model dpo_loss, sft_loss or another metric of "
            f"one objective; it is {training.metric_for_best_model}"
        )
