"""What an experiment is: a frozen configuration that knows its runs, its numbers and its figure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
from matplotlib.figure import Figure

from theory.sweep import Batch

Numbers = list[dict[str, Any]]
"""What a figure draws, for its JSON sidecar."""


@dataclass(frozen=True)
class Experiment(ABC):
    """The fields of a subclass are everything that determines its results."""

    name: ClassVar[str]
    num_steps: int
    num_seeds: int

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(self.num_seeds))

    @abstractmethod
    def batches(self) -> list[Batch]:
        """The work, the dear parts first. Raises ValueError for a configuration without sense."""

    @abstractmethod
    def summary(self, results: pd.DataFrame) -> dict[str, Any]:
        """The numbers that the experiment is run for: what summary.json holds."""

    @abstractmethod
    def report(self, summary: dict[str, Any]) -> str:
        """The summary as a table to read."""

    @abstractmethod
    def figure(self, summary: dict[str, Any]) -> tuple[Figure, Numbers]:
        """The summary as a figure, and the numbers drawn."""


def final(results: pd.DataFrame, iterate: str) -> pd.DataFrame:
    """The rows of each run's last recorded step, for one of its outputs."""
    rows = results[results["iterate"] == iterate]
    last = rows.groupby(["problem", "algorithm", "variant", "lam"])["step"].transform("max")
    return rows[rows["step"] == last]
