"""What a scheduler is: the contract between algorithms and the loops that obey them.

A scheduler is a small immutable object. Each step the training loop calls

    weights, state = scheduler.select(state, probe)     # before the step
    state = scheduler.observe(state, losses)            # after its forward pass

`weights` has shape (..., 2) over (DPO, SFT); the loop steps along sum_i weights_i * grad f_i, and a
weight of zero means: draw no batch, run no backward. The same objects drive `theory.simulate`
(many runs at once) and the language model trainer in `llm` (one run). State lives outside, is plain
data and goes into a checkpoint.

An algorithm is a subclass of `Scheduler`, a frozen dataclass. All that other code needs to know of
it (flags, cost, plots) is a property of the class; `theory.registry` turns a name into a class. A
class of your own works everywhere as `--algo package.module:Class`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from theory.tasks import Task

Array = NDArray[np.float64]


class Probe(Protocol):
    """What a scheduler may ask for at the current parameters; nothing else is computed."""

    def __call__(self) -> Array:
        """Both losses, shape (..., 2)."""
        ...

    def gram(self) -> Array:
        """|g_DPO|^2, <g_DPO, g_SFT>, |g_SFT|^2 of the gradients of this step, shape (..., 3)."""
        ...


def _no_gram() -> Array:
    raise TypeError("this loop gives losses only, no Gram matrix")


@dataclass(frozen=True)
class Answers:
    """A probe made of functions."""

    losses: Callable[[], Array]
    gram: Callable[[], Array] = _no_gram

    def __call__(self) -> Array:
        return self.losses()


class ScheduleState(NamedTuple):
    """What a schedule remembers between steps: plain data, JSON through `to_json`."""

    step: int = 0
    """Steps taken so far."""
    values: Array | None = None
    """Last known losses (..., 2) of a scheduler that compares values, else None."""
    memory: Mapping[str, Any] = MappingProxyType({})
    """Whatever else a scheduler keeps: numbers, strings, lists, arrays (which come back as lists)
    and mappings of them."""

    def to_json(self) -> dict[str, Any]:
        return {"step": self.step, "values": _plain(self.values), "memory": _plain(self.memory)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ScheduleState:
        values = data["values"]
        known = None if values is None else np.asarray(values, dtype=float)
        return cls(int(data["step"]), known, dict(data["memory"]))


def option(
    help: str, *, default: Any = MISSING, flag: str | None = None, flag_default: Any = None
) -> Any:
    """A field of a scheduler with the help of its flag.

    `flag` is the name of a flag that gives the field as a share of the steps of the run, with the
    default `flag_default`.
    """
    metadata = {"help": help, "flag": flag, "flag_default": flag_default}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Scheduler:
    """Base of all schedulers.

    A subclass implements `select` and states below what differs from the defaults. Its fields are
    its options and become flags; they need a type of bool, int, float or str (or a tuple of them,
    one per run of a batch) and may have a help text by `option`. Three names are given by the run:
    `seed`, `optimum` (f_DPO*, f_SFT*), and `lam`, the weight on DPO that every command knows.
    """

    name: ClassVar[str] = ""
    """What `--algo` takes; empty for a class that is named by its place."""
    label: ClassVar[str] = ""
    """For figures and tables; the class's name if empty."""
    trains: ClassVar[tuple[Task, ...]] = tuple(Task)
    """The objectives that it may step on."""
    minimises: ClassVar[str | None] = None
    """What it converges to the minimum of: f_mix, f_max, or nothing that lam names."""
    knob: ClassVar[str] = "lam"
    """The flag that trades one objective for the other."""
    probes_losses: ClassVar[bool] = False
    """Whether `select` calls `probe()`."""
    reads_gram: ClassVar[bool] = False
    """Whether `select` calls `probe.gram()`: both gradients are then computed at every step."""
    has_stages: ClassVar[bool] = False
    """Whether `stage_start` is not always 0."""
    steady: ClassVar[bool] = False
    """Whether all steps of a stage have the same weights."""

    @classmethod
    def lines(cls) -> dict[str, dict[str, Any]]:
        """The variants that a comparison shows as lines of their own: label -> options."""
        return {cls.name: {}}

    @property
    def reads_losses(self) -> bool:
        """True if `observe` uses the losses of the step (else the loop need not supply them)."""
        return False

    @property
    def forgets_values(self) -> bool:
        """True if a decision depends on losses only through the probe made for it, and a larger
        loss never turns it away from its objective: bounds on the losses can then decide alike."""
        return False

    @property
    def runs(self) -> tuple[int, ...]:
        """The leading shape of the weights: () for one run."""
        return ()

    @property
    def gradients_per_step(self) -> Array | None:
        """Expected gradients (..., 2) of each objective that a step pays for.

        None where that depends on the problem or on the length of the run.
        """
        return np.ones(len(Task)) if self.reads_gram else None

    @property
    def probes_per_step(self) -> float:
        """How often a step evaluates both losses, on average."""
        return 0.0

    def describe(self) -> str:
        """The schedule in words, for a line of a table."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        words = [f"{name.replace('_', ' ')} {_short(value)}" for name, value in values.items()]
        return ", ".join([self.label or type(self).__name__, *words])

    def init(self) -> ScheduleState:
        return ScheduleState()

    def select(self, state: ScheduleState, probe: Probe) -> tuple[Array, ScheduleState]:
        """Weights (..., 2) of the step `state.step`, and the state after deciding."""
        raise NotImplementedError

    def observe(self, state: ScheduleState, losses: Array | None = None) -> ScheduleState:
        """Close the step. `losses` (..., 2): values of the stepped objectives, NaN elsewhere."""
        return ScheduleState(state.step + 1, state.values, state.memory)

    def stage_start(self, step: int) -> int | NDArray[np.int64]:
        """First step of the stage that `step` belongs to.

        The loop restarts step size, optimiser and averages there, as separate runs would.
        """
        return 0


def _plain(value: Any) -> Any:
    """Arrays as lists, at every depth."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
