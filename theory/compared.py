"""What the sweep commands compare: algorithms by name, and the splits of sequential training.

A line of a figure or a table is each order of sequential training, and every other algorithm.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import pandas as pd

from theory.registry import flags_of, scheduler_options
from theory.schedulers import ORDERS
from theory.sweep import Variant

ALGORITHMS = ("sequential", "mix", "alright", "maxright")
"""The paper's: what a command compares by default."""
EVEN_SPLIT = 0.5
"""The split of untuned sequential runs: half of the budget for each objective."""


def algorithm_name(text: str) -> str:
    """A built-in algorithm, or `package.module:Class` of one that can be imported."""
    try:
        flags_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


class Compared:
    """What every experiment over several algorithms has."""

    algorithms: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]
    """(name, value) of what was given for algorithms of a user's own."""

    def options_of(self, algorithm: str) -> dict[str, Any]:
        """What the experiment says to an algorithm: its own fields' values, and `options`."""
        values = {"refresh_every": getattr(self, "refresh_every", None), **dict(self.options)}
        used = scheduler_options(algorithm)
        return {n: value for n, value in values.items() if n in used and value is not None}


def joint(algorithms: Sequence[str]) -> tuple[str, ...]:
    """All but sequential training."""
    return tuple(name for name in algorithms if name != "sequential")


def orders(algorithms: Sequence[str]) -> tuple[str, ...]:
    """The orders of sequential training, if it is compared."""
    return tuple(ORDERS) if "sequential" in algorithms else ()


def lines(algorithms: Sequence[str]) -> tuple[str, ...]:
    return (*orders(algorithms), *joint(algorithms))


def line_of(runs: pd.DataFrame) -> pd.Series:
    """The line of each row of a table of runs: `split_variant` puts the order first."""
    order = runs["variant"].str.partition(",")[0]
    return order.where(runs["algorithm"] == "sequential", runs["algorithm"])


def split_variant(order: str, split: float, num_steps: int) -> Variant:
    """Sequential training with the share `split` of the steps, at least one, on each objective."""
    first_steps = min(max(round(split * num_steps), 1), num_steps - 1)
    return Variant(f"{order}, split={split:g}", {"first_steps": first_steps}, {"split": split})
