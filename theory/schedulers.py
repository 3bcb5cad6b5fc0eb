"""The schedulers: which objective takes the next step. The paper's algorithms on one page.

`select` answers with the weights (..., 2) of a step over (DPO, SFT); `theory.scheduling` has the
contract. Many runs at once: `lam`, `seed` and `first_steps` may hold one entry per run.

Source of the algorithms: arXiv 2410.15483 (sequential, Mix, ALRIGHT, MAXRIGHT); importance
sampling, block alternation and the averaged values of MAXRIGHT go beyond the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory.randomness import Stream, uniform_at
from theory.scheduling import Probe, Scheduler, ScheduleState, option
from theory.tasks import Task

Array = NDArray[np.float64]

ORDERS: dict[str, tuple[Task, Task]] = {
    "dpo_then_sft": (Task.DPO, Task.SFT),
    "sft_then_dpo": (Task.SFT, Task.DPO),
}


@dataclass(frozen=True)
class Single(Scheduler):
    """Every step on one objective: plain SFT or plain DPO."""

    task: Task
    steady = True

    @property
    def gradients_per_step(self) -> Array:
        return _one_hot(np.asarray(self.task == Task.DPO))

    def select(self, state: ScheduleState, probe: Probe) -> tuple[Array, ScheduleState]:
        return _one_hot(np.asarray(self.task == Task.DPO)), state


@dataclass(frozen=True)
class DPOAlone(Single):
    """Every step on preferences."""

    task: Task = field(default=Task.DPO, init=False)
    name, label, trains = "dpo", "DPO alone", (Task.DPO,)


@dataclass(frozen=True)
class SFTAlone(Single):
    """Every step on demonstrations."""

    task: Task = field(default=Task.SFT, init=False)
    name, label, trains = "sft", "SFT alone", (Task.SFT,)


@dataclass(frozen=True)
class Sequential(Scheduler):
    """`first_steps` steps on the first objective of `order`, all later ones on the second."""

    first_steps: int | tuple[int, ...] = option(
        "share of the steps in the first stage", flag="split", flag_default=0.5
    )
    order: str = option(f"{' or '.join(ORDERS)}", default="sft_then_dpo")
    name, label, knob = "sequential", "sequential", "split"
    has_stages, steady = True, True

    @classmethod
    def lines(cls) -> dict[str, dict[str, Any]]:
        return {order: {"order": order} for order in ORDERS}

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order is {self.order!r}; it must be one of {', '.join(ORDERS)}")
        if np.min(self.first_steps) < 0:
            raise ValueError(f"first_steps is {self.first_steps}; it must not be negative")

    @property
    def runs(self) -> tuple[int, ...]:
        return _runs(self.first_steps)

    def select(self, state: ScheduleState, probe: Probe) -> tuple[Array, ScheduleState]:
        in_first = state.step < _as_array(self.first_steps)
        return _one_hot(in_first == (ORDERS[self.order][0] == Task.DPO)), state

    def stage_start(self, step: int) -> NDArray[np.int64]:
        first_steps = _as_array(self.first_steps)
        return np.where(step < first_steps, 0, first_steps)


@dataclass(frozen=True)
class Mix(Scheduler):
    """The gradient of f_Mix = lam f_DPO + (1 - lam) f_SFT; pays for both objectives each step."""

    lam: float | tuple[float, ...]
    name, label, minimises, steady = "mix", "Mix", "f_mix", True

    def __post_init__(self) -> None:
        _check_lam(self.lam)

    @property
    def runs(self) -> tuple[int, ...]:
        return _runs(self.lam)

    @property
    def gradients_per_step(self) -> Array:
        return (_weights(self.lam) > 0.0).astype(float)

    def select(self, state: ScheduleState, probe: Probe) -> tuple[Array, ScheduleState]:
        return _weights(self.lam), state


@dataclass(frozen=True)
class Alright(Scheduler):
    """Draw DPO with probability lam, else SFT, and step on it: an unbiased gradient of f_Mix.

    The draw of step t is a pure function of (seed, t). `seed` is one integer or one per run.
    """

    lam: float | tuple[float, ...]
    seed: int | tuple[int, ...] = 0
    name, label, minimises = "alright", "ALRIGHT", "f_mix"

    def __post_init__(self) -> None:
        _check_lam(self.lam)
        _check_seed(self.seed, self.lam)

    @property
    def runs(self) -> tuple[int, ...]:
        return _runs(self.lam)

    @property
    def gradients_per_step(self) -> Array:
        return _weights(self.lam)

    def select(self, state: ScheduleState, probe: Probe) -> tuple[Array, ScheduleState]:
        probability = _weights(self.lam)[..., Task.DPO]
        return _draw(self.seed, state.step, probability, self.runs), state


@dataclass(frozen=True)
class Importance(Scheduler):
    """ALRIGHT with importance sampling: draw DPO with probability p, weigh the step by w_i / p_i.

    Unbiased for grad f_Mix whatever p in (0, 1); p = lam is ALRIGHT. Draws as in `Alright`.
    """

    lam: float | tuple[float, ...]
    dpo_probability: float | tuple[float, ...] = option(
        "how often to draw DPO, in (0, 1)", default=0.5
    )
    seed: int | tuple[int, ...] = 0
    name, label, minimises = "importance", "importance sampling", "f_mix"

    def __post_init__(self) -> None:
        _check_lam(self.lam)
        _check_seed(self.seed, self.lam)
        if _runs(self.dpo_probability) not in ((), self.runs):
            raise ValueError("dpo_probability needs one entry, or as many as lam")
        p = np.asarray(self.dpo_probability)
        if not np.all((p > 0.0) & (p < 1.0)):
            raise ValueError("dpo_probability must lie strictly between 0 and 1")

    @property
    def runs(self) -> tuple[int, ...]:
        return _runs(self.lam)

    @property
    def gradients_per_step(self) -> Array:
        return _weights(self.dpo_probability)

    def select(self, state: ScheduleState, probe: Probe) -> tuple[Array, ScheduleState]:
        probabilities = _weights(self.dpo_probability)
        drawn = _draw(self.seed, state.step, probabilities[..., Task.DPO], self.runs)
        return drawn * _weights(self.lam) / probabilities, state


@dataclass(frozen=True)
class Alternate(Scheduler):
    """Blocks in turn: in every cycle DPO steps first, then SFT for the rest of it.

    The first c cycles have round(c lam cycle) DPO steps: what rounding leaves over is carried on,
    so that DPO's share of the steps is lam to within half a step however short the cycle is.
    `cycle` 2 at lam 1/2 is strict alternation; `cycle` = T is sequential training (without its
    restarts): one knob joins the two.
    """

    lam: float | tuple[float, ...]
    cycle: int | tuple[int, ...] = option("steps of one round of both objectives", default=2)
    name, label, minimises = "alternate", "alternation", "f_mix"

    def __post_init__(self) -> None:
        _check_lam(self.lam)
        if np.min(self.cycle) < 1:
            raise ValueError(f"cycle is {self.cycle}; it must be at least 1")
        if () not in (_runs(self.lam), _runs(self.cycle)) and _runs(self.lam) != _runs(self.cycle):
            raise ValueError("lam and cycle need the same number of entries, or one")

    @property
    def runs(self) -> tuple[int, ...]:
        return _runs(self.lam) or _runs(self.cycle)

    @property
    def gradients_per_step(self) -> Array:
        return _weights(self.lam)

    def select(self, state: ScheduleState, probe: Probe) -> tuple[Array, ScheduleState]:
        cycle = _as_array(self.cycle)
        done, position = np.divmod(state.step, cycle)
        ends = [
            np.floor(c * _weights(self.lam)[..., Task.DPO] * cycle + 0.5) for c in (done, done + 1)
        ]
        return _one_hot(np.asarray(position < ends[1] - ends[0])), state


@dataclass(frozen=True)
class Maxright(Scheduler):
    """Step on the objective with the larger weighted optimality gap h_i = w_i (f_i - f_i*).

    Both losses are probed every `refresh_every` steps; in between only the value of the stepped
    objective is renewed, from the loss that its step computes anyway. `optimum` holds
    (f_DPO*, f_SFT*). Ties go to DPO. With `scale_steps` the step is w_i grad f_i, a subgradient
    of f_Max = max_i h_i; without it (as in the authors' code) it is grad f_i. `value_ema` is the
    weight of a new value against the old one: 1 replaces it, a small one averages noise out.
    """

    lam: float | tuple[float, ...]
    optimum: tuple[float, float]
    refresh_every: int = option("steps between two probes of both losses", default=10)
    scale_steps: bool = option("scale the step by its weight", default=False)
    value_ema: float = option("weight of a new loss against the old one", default=1.0)
    name, label, minimises, probes_losses = "maxright", "MAXRIGHT", "f_max", True

    def __post_init__(self) -> None:
        _check_lam(self.lam)
        if self.refresh_every < 1:
            raise ValueError(f"refresh_every is {self.refresh_every}; it must be at least 1")
        if not 0.0 < self.value_ema <= 1.0:
            raise ValueError(f"value_ema is {self.value_ema}; it must lie in (0, 1]")
        if not np.all(np.isfinite(self.optimum)):
            raise ValueError(f"optimum is {self.optimum}; both losses must be finite")

    @property
    def reads_losses(self) -> bool:
        return self.refresh_every > 1

    @property
    def forgets_values(self) -> bool:
        return self.refresh_every == 1 and self.value_ema == 1.0

    @property
    def probes_per_step(self) -> float:
        return 1.0 / self.refresh_every

    @property
    def runs(self) -> tuple[int, ...]:
        return _runs(self.lam)

    def select(self, state: ScheduleState, probe: Probe) -> tuple[Array, ScheduleState]:
        values = state.values
        if state.step % self.refresh_every == 0:
            values = self._blend(values, probe())
        if values is None:
            raise ValueError("MAXRIGHT has no loss values: its state lost them between refreshes")
        weights = _weights(self.lam)
        heights = weights * (values - np.asarray(self.optimum))
        chosen = _one_hot(heights[..., Task.DPO] >= heights[..., Task.SFT])
        return (chosen * weights if self.scale_steps else chosen), state._replace(values=values)

    def observe(self, state: ScheduleState, losses: Array | None = None) -> ScheduleState:
        values = state.values
        if values is not None and losses is not None:
            values = self._blend(values, np.where(np.isnan(losses), values, losses))
        return ScheduleState(state.step + 1, values, state.memory)

    def _blend(self, old: Array | None, new: Array) -> Array:
        if old is None or self.value_ema == 1.0:
            return new
        return old + self.value_ema * (new - old)


ALGORITHMS = (Sequential, Mix, Alright, Maxright, Importance, Alternate, DPOAlone, SFTAlone)
REGISTRY: dict[str, type[Scheduler]] = {algorithm.name: algorithm for algorithm in ALGORITHMS}
"""Every built-in algorithm by the name that `--algo` takes."""


def objective_weights(lam: ArrayLike) -> Array:
    """w = (lam, 1 - lam) on the last axis, shape lam.shape + (2,)."""
    lam = np.asarray(lam, dtype=float)
    return np.stack([lam, 1.0 - lam], axis=-1)


@lru_cache(maxsize=64)
def _weights(lam: float | tuple[float, ...]) -> Array:
    """`objective_weights` of a scheduler's field: converted once, not at every step."""
    weights = objective_weights(lam)
    weights.flags.writeable = False
    return weights


@lru_cache(maxsize=64)
def _as_array(values: int | tuple[int, ...]) -> NDArray[np.int64]:
    return np.asarray(values)


def _runs(values: float | tuple[float, ...]) -> tuple[int, ...]:
    return (len(values),) if isinstance(values, tuple) else ()


_ONE_HOT = np.array([[0.0, 1.0], [1.0, 0.0]])


def _one_hot(dpo: NDArray[np.bool_]) -> Array:
    """Weights (..., 2) with a one on DPO where `dpo` holds, else on SFT."""
    weights: Array = _ONE_HOT[np.asarray(dpo, dtype=np.intp)]
    return weights


def _draw(
    seed: int | tuple[int, ...], step: int, probability: Array, runs: tuple[int, ...]
) -> Array:
    """One-hot weights, DPO with the given probability: a pure function of (seed, step)."""
    uniform = uniform_at(seed if isinstance(seed, tuple) else (seed,), Stream.DECISION, step)
    return _one_hot(np.broadcast_to((uniform if runs else uniform[0]) < probability, runs))


def _check_seed(seed: int | tuple[int, ...], lam: float | tuple[float, ...]) -> None:
    if _runs(seed) not in ((), _runs(lam)):
        raise ValueError("seed needs one entry, or as many as lam")


def _check_lam(lam: ArrayLike) -> None:
    values = np.atleast_1d(np.asarray(lam, dtype=float))
    outside = values[~((values >= 0.0) & (values <= 1.0))]
    if outside.size:
        raise ValueError(f"lam is {outside[0]}; it weighs DPO and must lie in [0, 1]")
