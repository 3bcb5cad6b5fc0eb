"""Which contenders a suite compares, in which units, and what is expected of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from llm.benchmark.shapes import Batches, Shape
from theory.tasks import Task

SUITES = ("dpo", "sft", "joint", "cost", "overhead")
GROUPS = {"dpo": ("dpo",), "sft": ("sft",), "joint": ("joint", "cost"), "overhead": ("overhead",)}
"""Suites that share contenders are measured together."""
OVERHEAD = Batches(sft=2, dpo=2, number=200)
MORE_ROUNDS = {
    ("sft", "ours"): 4,
    ("sft", "trl_packed"): 4,
    ("joint", "ours"): 2,
    ("overhead", "ours"): 5,
    ("overhead", "trainer"): 5,
}
"""Times --rounds: where a round is short and a few per cent are to be told from noise."""
SFT_MORE = 4
"""Times the batches of a round on pairs: a demonstration costs that much less."""


CUDA_TARGET = 2.0
"""Times TRL's best setting, on a CUDA device."""


@dataclass(frozen=True)
class Contender:
    """One trainer in its own process. `side` says whose, `algo` on what it trains."""

    side: str
    algo: str

    @property
    def name(self) -> str:
        return f"{self.side}/{self.algo}"

    @property
    def refresh_every(self) -> int:
        """Of MAXRIGHT; 0 for an algorithm that does not probe."""
        return int(self.algo.split("-")[1]) if self.algo.startswith("maxright") else 0


@dataclass(frozen=True)
class Comparison:
    """`over / under` in `what` ("time" per unit of work, or "memory"), and what to reach.

    `sense`: the ratio must be "at least" or "at most" the target, or "within" it of 1.
    """

    label: str
    over: str
    under: str
    what: str = "time"
    target: float | None = None
    sense: str = "at least"

    def on(self, device: str) -> Comparison:
        """With the target of that device: the others were set for a CPU, the costs for both."""
        if device == "cpu" or (self.sense != "at least" and self.what == "time"):
            return self
        trl = self.what == "time" and self.over.startswith("trl")
        return replace(self, target=CUDA_TARGET if trl else None)

    def met(self, ratio: float) -> bool | None:
        if self.target is None:
            return None
        if self.sense == "within":
            return abs(ratio - 1.0) <= self.target
        return ratio >= self.target if self.sense == "at least" else ratio <= self.target


EXPECTED_COST = "expected/"
"""Prefix of a cost that is computed from the measured S and D (`llm.benchmark.summary`)."""

CONTENDERS: dict[str, tuple[str, ...]] = {
    "dpo": ("ours/dpo", "trl_precomputed/dpo", "trl/dpo", "paper/dpo", "ours_padded/dpo"),
    "sft": ("ours/sft", "trl_packed/sft", "trl/sft", "paper/sft", "ours_padded/sft"),
    "joint": (
        *("ours/sft", "ours/dpo", "ours/alright", "paper/alright"),
        *("ours/maxright-10", "paper/maxright-10", "ours/maxright-1", "paper/maxright-1"),
    ),
    "cost": (
        *("ours/sft", "ours/dpo", "ours/sequential", "ours/mix", "ours/alright"),
        *("ours/maxright-1", "ours/maxright-10", "ours/maxright-100"),
    ),
    "overhead": ("ours/fixed", "trainer/fixed"),
}
COSTS = tuple(name for name in CONTENDERS["cost"] if name not in ("ours/sft", "ours/dpo"))

_THIRD = 1.0 / 3.0
COMPARISONS: dict[str, tuple[Comparison, ...]] = {
    "dpo": (
        Comparison("DPO: TRL as it comes", "trl/dpo", "ours/dpo", target=4.0),
        Comparison("DPO: TRL, precomputed", "trl_precomputed/dpo", "ours/dpo", target=3.0),
        Comparison("DPO: the paper's way", "paper/dpo", "ours/dpo"),
        Comparison("DPO: ours without packing", "ours_padded/dpo", "ours/dpo"),
        Comparison(*("DPO: TRL as it comes", "ours/dpo", "trl/dpo", "memory", _THIRD, "at most")),
        Comparison(
            *("DPO: TRL, precomputed", "ours/dpo", "trl_precomputed/dpo", "memory"),
            *(_THIRD, "at most"),
        ),
        Comparison("DPO: the paper's way", "ours/dpo", "paper/dpo", "memory"),
    ),
    "sft": (
        Comparison("SFT: TRL, padded", "trl/sft", "ours/sft", target=2.2),
        Comparison("SFT: TRL, packed", "trl_packed/sft", "ours/sft", target=1.8),
        Comparison("SFT: the paper's way", "paper/sft", "ours/sft"),
        Comparison("SFT: ours without packing", "ours_padded/sft", "ours/sft"),
        Comparison("SFT: TRL, padded", "ours/sft", "trl/sft", "memory"),
        Comparison("SFT: TRL, packed", "ours/sft", "trl_packed/sft", "memory"),
    ),
    "joint": (
        Comparison("ALRIGHT: the paper's way", "paper/alright", "ours/alright", target=3.0),
        Comparison(
            "MAXRIGHT(10): the paper's way", "paper/maxright-10", "ours/maxright-10", target=3.3
        ),
        Comparison(
            "MAXRIGHT(1): the paper's way", "paper/maxright-1", "ours/maxright-1", target=4.5
        ),
        Comparison("ALRIGHT: the paper's way", "ours/alright", "paper/alright", "memory"),
    ),
    "cost": (
        Comparison(
            *("ALRIGHT / its objectives' costs", "ours/alright", "expected/alright"),
            target=0.02,
            sense="within",
        ),
        Comparison(
            *("MAXRIGHT(10) / ALRIGHT", "ours/maxright-10", "ours/alright"),
            target=1.05,
            sense="at most",
        ),
    ),
    "overhead": (
        Comparison(
            *("Fixed cost of a step / Trainer", "ours/fixed", "trainer/fixed"),
            target=1.15,
            sense="at most",
        ),
    ),
}


def contenders_of(suites: Sequence[str]) -> list[Contender]:
    names = dict.fromkeys(name for suite in suites for name in CONTENDERS[suite])
    return [Contender(*name.split("/")) for name in names]


def batches_of(group: str, shape: Shape) -> Batches:
    if group == "overhead":
        return OVERHEAD
    if group == "joint":
        return shape.joint
    alone = shape.alone
    return replace(alone, number=SFT_MORE * alone.number) if group == "sft" else alone


@dataclass(frozen=True)
class Job:
    """What a worker process is told: everything but the rows."""

    side: str
    algo: str
    group: str
    shape: dict[str, Any]
    device: str
    threads: int
    rounds: int
    steps: int
    """Optimiser steps of a round, except for a contender that packs its rows in advance."""
    sft_batch: int
    dpo_batch: int
    folder: str = ""
    """Where the trainer may write; the worker's own."""

    @property
    def batch_sizes(self) -> dict[Task, int]:
        return {Task.DPO: self.dpo_batch, Task.SFT: self.sft_batch}

    @property
    def total_steps(self) -> int:
        """Steps of all rounds and of the one before them, in which everything warms up."""
        return self.steps * (self.rounds + 1)


def make_job(
    contender: Contender, group: str, shape: Shape, device: str, threads: int, rounds: int
) -> Job:
    """A round of a suite on one objective is one pass over its rows; on both objectives it is one
    pass over both for an algorithm that takes one of them a step, and more for MAXRIGHT(100).
    """
    batches = batches_of(group, shape)
    rounds *= MORE_ROUNDS.get((group, contender.side), 1)
    # Where costs are compared, all rounds have as many steps: the first step of each, after the
    # wait for the others, is slower.
    steps = batches.number * (2 if group == "joint" else 1)
    if contender.refresh_every > steps:  # so that one probe falls among the measured steps
        steps *= math.ceil(contender.refresh_every / (steps * rounds))
    return Job(
        side=contender.side,
        algo=contender.algo,
        group=group,
        shape=asdict(shape),
        device=device,
        threads=threads,
        rounds=rounds,
        steps=steps,
        sft_batch=batches.sft,
        dpo_batch=batches.dpo,
    )
