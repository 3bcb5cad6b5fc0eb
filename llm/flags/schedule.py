"""The options of schedules as flags: made from the fields of the algorithms, not written twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, field, fields, make_dataclass
from typing import Any

from llm.flags.arguments import DataArguments, JointArguments, ModelArguments
from theory.cli import UserError
from theory.registry import Flag, flags_of, resolve, scheduler_for_run
from theory.schedulers import REGISTRY
from theory.scheduling import Scheduler

SHARED = "lam"
"""The option that every command knows: a field of `JointArguments`."""
DEFAULT_LAM = 0.5
VALUE_FLAGS = ("value_source", "value_rows")
"""Flags of the trainer that only a schedule which probes losses uses."""


def schedule_arguments(algorithms: Iterable[str]) -> type:
    """A dataclass with a field for every option of the built-in algorithms and of `algorithms`.

    None stands for what was not given.

    Raises:
        ValueError: for an algorithm that cannot be found, or an option whose name is taken.
    """
    taken = {
        f.name for kind in (ModelArguments, DataArguments, JointArguments) for f in fields(kind)
    }
    found: dict[str, list[tuple[str, Flag]]] = {}
    for name in dict.fromkeys([*REGISTRY, *algorithms]):
        for flag in flags_of(name).values():
            if flag.name != SHARED:
                found.setdefault(flag.name, []).append((name, flag))
    own = []
    for name, users in found.items():
        if name in taken or len({flag.kind for _, flag in users}) > 1:
            raise UserError(f"{users[-1][0]}: its option {name} is another flag already: rename it")
        own.append((name, users[0][1].kind | None, field(default=None, metadata=_help(users))))
    return make_dataclass("ScheduleArguments", own)


def _help(users: list[tuple[str, Flag]]) -> dict[str, str]:
    flag = users[0][1]
    default = "" if flag.default is MISSING else f" [{_typed(flag.default)}]"
    return {"help": f"{', '.join(name for name, _ in users)}: {flag.help}.{default}"}


def _typed(value: Any) -> str:
    """A value as it is typed on a command line."""
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def given_options(arguments: Any) -> dict[str, Any]:
    """What was given of a `schedule_arguments` instance."""
    return {name: value for name, value in asdict(arguments).items() if value is not None}


def check_schedule_flags(
    algorithms: Iterable[str], training: JointArguments, named: set[str]
) -> None:
    """Refuse options that none of the algorithms uses, and values that one of them refuses."""
    kinds = {name: resolve(name) for name in algorithms}
    used = {option for kind in kinds.values() for option in flags_of(kind)}
    used |= {option for kind in kinds.values() if kind.probes_losses for option in VALUE_FLAGS}
    known = {*training.schedule, *(named & {SHARED, *VALUE_FLAGS})}
    for option in sorted(known - used):
        takes = ", ".join(f"--{name}" for name in sorted(used)) or "no schedule flags"
        raise UserError(f"--{option} is not used by --algo {' '.join(kinds)} (it takes: {takes})")
    for name, kind in kinds.items():
        for flag in flags_of(kind).values():
            if flag.name in training.schedule:
                _check_value(flag, training.schedule[flag.name])
        # The scheduler checks its own options; the optimum is known only later.
        scheduler_of(training, name, num_steps=1, optimum=(0.0, 0.0))


def _check_value(flag: Flag, value: Any) -> None:
    kinds: tuple[type, ...] = (int, float) if flag.kind is float else (flag.kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and flag.kind is not bool):
        raise UserError(f"--{flag.name} is {value!r}; it must be of type {flag.kind.__name__}")
    if flag.of_steps and not 0.0 <= value <= 1.0:  # type: ignore[operator]
        raise UserError(f"--{flag.name} is {value}; it must lie in [0, 1]")


def options_for(algorithm: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that the algorithm uses."""
    return {name: options[name] for name in flags_of(algorithm) if name in options}


def lam_of(training: JointArguments) -> float:
    return DEFAULT_LAM if training.lam is None else training.lam


def scheduler_of(
    training: JointArguments,
    algorithm: str | None = None,
    *,
    num_steps: int,
    optimum: tuple[float, float] | None = None,
) -> Scheduler:
    """The scheduler that the flags describe, for a run of `num_steps` steps."""
    name = algorithm or training.algo
    given = options_for(name, {SHARED: lam_of(training)} | training.schedule)
    return scheduler_for_run(name, given, num_steps=num_steps, seed=training.seed, optimum=optimum)
