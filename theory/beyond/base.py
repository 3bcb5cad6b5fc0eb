"""What the experiments beyond the paper share: a summary from which table and figure follow."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from theory import command
from theory.command import Findings

Numbers = list[dict[str, Any]]
"""What a figure draws, for its JSON sidecar."""


@dataclass(frozen=True)
class Experiment(command.Experiment):
    """One figure, named like the experiment."""

    @abstractmethod
    def summary(self, results: pd.DataFrame) -> dict[str, Any]:
        """The numbers that the experiment is run for: what summary.json holds."""

    @abstractmethod
    def report(self, summary: dict[str, Any]) -> str:
        """The summary as a table to read."""

    @abstractmethod
    def figure(self, summary: dict[str, Any]) -> tuple[Figure, Numbers]:
        """The summary as a figure, and the numbers drawn."""

    def findings(self, results: pd.DataFrame) -> Findings:
        summary = self.summary(results)
        figure, numbers = self.figure(summary)
        return Findings(summary, self.report(summary), [(self.name, figure, {"numbers": numbers})])


def final(results: pd.DataFrame, iterate: str) -> pd.DataFrame:
    """The rows of each run's last recorded step, for one of its outputs."""
    rows = results[results["iterate"] == iterate]
    last = rows.groupby(["problem", "algorithm", "variant", "lam"])["step"].transform("max")
    return rows[rows["step"] == last]
