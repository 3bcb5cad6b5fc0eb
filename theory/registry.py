"""From the name of an algorithm to a scheduler: built in, or `package.module:Class` of your own.

What a user may set of an algorithm are the fields of its class (`theory.scheduling.Scheduler`). A
run fills in three of them itself (`FILLED`); the others are flags.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from theory.foreign import is_foreign, load_object
from theory.schedulers import REGISTRY
from theory.scheduling import Scheduler

FILLED = ("seed", "optimum")
"""Options that a run gives, not its user."""
SCALARS = (bool, int, float, str)


@dataclass(frozen=True)
class Flag:
    """What a user may set: its name, its type, its default (MISSING if it has none)."""

    name: str
    kind: type
    default: Any
    help: str
    field: str
    """The field that it sets; under another name it is a share of the steps of the run."""

    @property
    def of_steps(self) -> bool:
        return self.name != self.field


def resolve(name: str) -> type[Scheduler]:
    """The class of an algorithm.

    Raises:
        ValueError: in one line, if there is none of that name or it is no scheduler.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    if not is_foreign(name):
        known = ", ".join(REGISTRY)
        raise ValueError(f"unknown algorithm {name!r}; choose from {known} or package.module:Class")
    found = load_object(name)
    if not (inspect.isclass(found) and issubclass(found, Scheduler)):
        raise ValueError(f"{name} is no subclass of theory.scheduling.Scheduler")
    if not (is_dataclass(found) and "__dataclass_fields__" in vars(found)):
        raise ValueError(f"{name} is no dataclass: put @dataclass(frozen=True) above it")
    return found


def scheduler_options(algorithm: str | type[Scheduler]) -> frozenset[str]:
    """Names of the options of an algorithm; empty for the single objectives."""
    return frozenset(each.name for each in _options(_as_class(algorithm)))


def make_scheduler(algorithm: str | type[Scheduler], **options: Any) -> Scheduler:
    """Build a scheduler. An option that it does not use, or lacks, is a ValueError."""
    kind, name = _as_class(algorithm), name_of(algorithm)
    known = scheduler_options(kind)
    unused = sorted(set(options) - known)
    if unused:
        takes = ", ".join(sorted(known)) or "none"
        raise ValueError(f"algorithm {name!r} does not use {', '.join(unused)} (it takes: {takes})")
    missing = sorted(each.name for each in _options(kind) if _required(each, options))
    if missing:
        raise ValueError(f"algorithm {name!r} needs {', '.join(missing)}")
    return kind(**options)


def name_of(algorithm: str | type[Scheduler]) -> str:
    """What `--algo` takes."""
    if isinstance(algorithm, str):
        return algorithm
    return algorithm.name or f"{algorithm.__module__}:{algorithm.__qualname__}"


def label_of(algorithm: str | type[Scheduler]) -> str:
    """What figures and tables call it."""
    kind = _as_class(algorithm)
    return kind.label or kind.__name__


def flags_of(algorithm: str | type[Scheduler]) -> dict[str, Flag]:
    """The options that are a user's to set, `lam` among them, as flags by their name.

    Raises:
        ValueError: if a field has a type that no flag can have.
    """
    kind = _as_class(algorithm)
    hints = get_type_hints(kind)
    found = (_flag(kind, each, hints[each.name]) for each in _options(kind))
    return {flag.name: flag for flag in found if flag.field not in FILLED}


def scheduler_for_run(
    algorithm: str | type[Scheduler],
    given: Mapping[str, Any],
    *,
    num_steps: int,
    seed: int,
    optimum: tuple[float, float] | None = None,
) -> Scheduler:
    """The scheduler of a run of `num_steps` steps: `given` flags, and what the run fills in."""
    flags = flags_of(algorithm)
    values = {name: given.get(name, flag.default) for name, flag in flags.items()}
    options = {
        flags[name].field: round(value * num_steps) if flags[name].of_steps else value
        for name, value in values.items()
        if value is not MISSING
    }
    filled = {"seed": seed} | ({} if optimum is None else {"optimum": optimum})
    used = scheduler_options(algorithm)
    options |= {name: value for name, value in filled.items() if name in used}
    return make_scheduler(algorithm, **options)


def typical_scheduler(algorithm: str | type[Scheduler], given: Mapping[str, Any]) -> Scheduler:
    """A scheduler for questions that no run decides, such as its cost or which losses it reads.

    Of `given`, what the algorithm does not use or is None is left out; what it needs besides is
    made up.
    """
    flags = flags_of(algorithm)
    known = {"lam": 0.5} | {name: value for name, value in given.items() if value is not None}
    used = {name: flags[name].kind(value) for name, value in known.items() if name in flags}
    return scheduler_for_run(algorithm, used, num_steps=1, seed=0, optimum=(0.0, 0.0))


def _as_class(algorithm: str | type[Scheduler]) -> type[Scheduler]:
    return resolve(algorithm) if isinstance(algorithm, str) else algorithm


def _options(kind: type[Scheduler]) -> list[Field[Any]]:
    return [each for each in fields(kind) if each.init]


def _required(each: Field[Any], options: Mapping[str, Any]) -> bool:
    has_default = each.default is not MISSING or each.default_factory is not MISSING
    return not has_default and each.name not in options


def _flag(kind: type[Scheduler], each: Field[Any], hint: Any) -> Flag:
    name = each.metadata.get("flag") or each.name
    default = each.metadata["flag_default"] if name != each.name else each.default
    scalar = float if name != each.name else _scalar(hint)
    if scalar is None and each.name not in FILLED:
        raise ValueError(
            f"{name_of(kind)}: {each.name} is of type {hint}; a flag is bool, int, float or str"
        )
    return Flag(name, scalar or str, default, each.metadata.get("help", ""), each.name)


def _scalar(hint: Any) -> type | None:
    """The type of one run's value, for example float of `float | tuple[float, ...]`."""
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((choice for choice in choices if choice in SCALARS), None)
