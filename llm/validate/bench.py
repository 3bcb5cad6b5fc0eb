"""Runs beyond the comparison: the same problem and learning rates, other settings.

An arm is a set of runs that share settings; its finished runs are kept by `llm.compare.pool` under
--out/runs, so that an interrupted validation goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from llm.compare.pool import Pool
from llm.compare.runs import Run
from llm.compare.settings import RUNS, default_jobs
from llm.compare.workers import Workers
from llm.model.load import load_policy
from llm.setup import Setup, prepare
from llm.validate.settings import ValidateConfig
from llm.validate.source import Comparison
from theory.cli import UserError
from theory.tasks import Task

UNCLIPPED: dict[str, Any] = {"max_grad_norm": 0.0}


@dataclass(frozen=True)
class Bench:
    """What the studies share: the comparison's problem, prepared once, and where to work."""

    config: ValidateConfig
    comparison: Comparison

    @cached_property
    def setup(self) -> Setup:
        run = self.comparison.config.run
        training = replace(run.training, output_dir=str(self.config.out / RUNS / "shared"))
        return prepare(replace(run, training=training), lambda line: None)

    @cached_property
    def workers(self) -> Workers:
        """They serve all studies, as long as the bench."""
        shared = self.comparison.config
        jobs = self.config.jobs or default_jobs(shared.run)
        return Workers(replace(shared, out=self.config.out, jobs=jobs), self.setup)

    def close(self) -> None:
        """End the processes, if there are any."""
        if "workers" in vars(self):
            self.workers.close()

    @property
    def optimum(self) -> tuple[float, float]:
        optima = self.comparison.optima
        return optima.dpo, optima.sft

    @property
    def seeds(self) -> range:
        return range(self.config.study_seeds)

    @property
    def lams(self) -> tuple[float, ...]:
        return self.comparison.config.lams

    def run(
        self, arm: str, runs: Sequence[Run], flags: Mapping[str, Any], keep_models: bool = False
    ) -> pd.DataFrame:
        """A row per run: lam, seed, f_dpo, f_sft, p_dpo, norm_dpo, norm_sft, folder.

        `flags` replace settings of the comparison. Losses are of the rows that it evaluates, in
        nats; `norm_*` is the mean norm of the gradients before clipping in steps on one objective
        alone.

        Raises:
            UserError: if a run diverges: a study without it would be another one.
        """
        out = self.config.out / RUNS / arm
        own = replace(self.comparison.config, out=out, keep_models=keep_models)
        pool = Pool(own, self.setup, self.workers, flags)
        records = pool.run(arm, runs)
        for record in records:
            if record["failed"]:
                raise UserError(f"study {arm}: a run failed: {record['failed']}")
        return pd.DataFrame(
            {
                "arm": arm,
                "lam": run.knob,
                "seed": run.seed,
                "f_dpo": record["f_dpo"],
                "f_sft": record["f_sft"],
                "p_dpo": record["steps"].get("dpo", 0) / run.steps,
                **_norms(pool.place(run)),
                "folder": str(pool.place(run)),
            }
            for run, record in zip(runs, records, strict=True)
        )

    def load(self, folder: str) -> Any:
        """The model that a run with `keep_models` left."""
        arguments = replace(self.comparison.config.run.model, model_name_or_path=folder)
        return load_policy(arguments)


def _norms(folder: Path) -> dict[str, float]:
    path = folder / "metrics.jsonl"
    logged = pd.read_json(path, lines=True) if path.is_file() else pd.DataFrame()
    names = {task: f"{task.label}_grad_norm" for task in Task}
    return {
        f"norm_{task.label}": float(logged[name].mean()) if name in logged else float("nan")
        for task, name in names.items()
    }
