"""A finished comparison, read from its directory."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from llm.compare.plan import HELD_OUT
from llm.compare.results import predictions_optima, predictions_table
from llm.compare.settings import PROG as COMPARE
from llm.compare.settings import CompareConfig
from llm.compare.settings import parse as parse_compare
from theory.cli import UserError
from theory.costs import Costs
from theory.predictions import Optima
from theory.records import read_json

FILES = ("config.json", "summary.json", "results.parquet", "paths.parquet")


@dataclass(frozen=True)
class Comparison:
    """What `llm.compare` wrote. `results` and `paths` as in `llm.compare.results`."""

    folder: Path
    command: str
    summary: dict[str, Any]
    results: pd.DataFrame
    paths: pd.DataFrame

    @cached_property
    def config(self) -> CompareConfig:
        """The comparison as its command line describes it."""
        return parse_compare(shlex.split(self.command)[len(COMPARE.split()) :])

    @property
    def budget(self) -> str:
        """Equal steps if they were run, else equal compute."""
        return str(self.results["budget"].iloc[0])

    @cached_property
    def table(self) -> pd.DataFrame:
        """The runs as `theory.predictions` reads them."""
        return predictions_table(self.results, self.budget)

    @cached_property
    def optima(self) -> Optima:
        return predictions_optima(self.summary)

    @property
    def measured_on(self) -> str:
        """The rows that the losses are of; earlier comparisons do not say, and held them out."""
        return str(self.summary.get("measured_on", HELD_OUT))

    @property
    def costs(self) -> Costs:
        """Counted from the tokens of the runs."""
        counted = self.summary["costs"]
        return Costs(
            sft=counted["sft_step"],
            dpo=counted["dpo_step"],
            probe=counted["probe"],
            sft_forward=counted["probe"] / (1.0 + counted["dpo_step"] / counted["sft_step"]),
        )

    @property
    def rates(self) -> dict[str, float]:
        """The tuned learning rate of each line."""
        return dict(self.summary["tuning"]["chosen"])

    def rate(self, *lines: str) -> float:
        """The learning rate of the first of `lines` that was compared, else of any line."""
        return next((self.rates[n] for n in lines if n in self.rates), min(self.rates.values()))


def read_comparison(folder: Path) -> Comparison:
    """Raises UserError where the directory is not that of a finished comparison."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} holds no finished comparison ({missing[0]} is missing): "
            f"run `{COMPARE} --out {folder}` first, or add --run"
        )
    results = pd.read_parquet(folder / "results.parquet")
    finished = results[results["failed"] == ""]
    if finished.empty:
        raise UserError(f"{folder}: every run of the comparison failed")
    return Comparison(
        folder,
        str(read_json(folder / "config.json")["command"]),
        read_json(folder / "summary.json"),
        results,
        pd.read_parquet(folder / "paths.parquet"),
    )
