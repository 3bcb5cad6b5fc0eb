"""Sweeps: batches of simulated runs, in parallel, resumable, as one table.

A `Batch` is one problem under one algorithm: all its variants, values of lam and seeds in a single
simulation. `run_sweep` spreads batches over processes with joblib (whose backends put the same
sweep on Dask or Ray) and keeps each finished batch on disk, so a killed sweep continues where it
stopped and ends with the same bits.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from joblib import Parallel, delayed, parallel_config
from numpy.typing import NDArray
from tqdm import tqdm

from theory.feature_file import FeatureFile, is_feature_file
from theory.foreign import is_foreign, pack, source_digest, unpack
from theory.metrics import convex_metrics, t_interval
from theory.optima import ProblemOptima
from theory.optimizers import Rule
from theory.problems import make_problem
from theory.records import digest, digest_of_code, write_parquet
from theory.registry import make_scheduler, scheduler_options
from theory.scheduling import Scheduler
from theory.simulate import ITERATES, StepSize, Trace, simulate
from theory.tasks import Task

METRICS = ("f_dpo", "f_sft", "mix_gap", "max_gap", "ideal_distance")
COUNTS = ("dpo_gradients", "sft_gradients", "probes")
KEYS = ("problem", "algorithm", "variant", "lam", "step", "iterate")
"""What identifies a group of runs that differ by their seed only."""
FINISHED = ".parts"
"""Folder below --out for the finished batches; hidden, since it is deleted in the end."""


@dataclass(frozen=True)
class Variant:
    """One setting of an algorithm. `options` go to the scheduler, `columns` into the table."""

    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)


Grid = list[tuple[Variant, float | None, int]]
"""(variant, lam, seed) of each run; lam is None where the algorithm does not use it."""


@dataclass(frozen=True)
class Batch:
    """One problem under one algorithm; a unit of parallel work.

    `options` are scheduler options common to all runs. The options of a variant may differ
    between variants only where the scheduler takes one value per run (`first_steps`, `cycle`,
    `dpo_probability`). `lam`, `seed` and `optimum` are filled in here. Without `values`, exact
    ones are used, evaluated lazily where that cannot change a decision.
    """

    problem: str
    algorithm: str
    lams: tuple[float, ...]
    seeds: tuple[int, ...]
    num_steps: int
    variants: tuple[Variant, ...] = (Variant(),)
    options: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    record_steps: tuple[int, ...] | None = None
    step_scale: float | None = None
    decay: bool = True
    batch_size: int = 1
    values: str | None = None
    rule: Rule | None = None

    @property
    def names(self) -> tuple[str, str]:
        """What may be of a user's own."""
        return self.problem, self.algorithm

    @property
    def key(self) -> str:
        """Names the batch by everything that determines its result, the code included."""
        fields = {**asdict(self), "rule": repr(self.rule), "code": _code_digest()}
        fields["foreign"] = [source_digest(name) for name in self.names if is_foreign(name)]
        if is_feature_file(self.problem):
            fields["data"] = FeatureFile.digest(self.problem)
        return digest(fields)[:20]

    def run(self) -> pd.DataFrame:
        """One row per run, lam, recorded step and iterate: `KEYS`, seed, metrics and counts."""
        optima = ProblemOptima(make_problem(self.problem, **self.parameters))
        uses_lam = "lam" in scheduler_options(self.algorithm)
        grid = list(product(self.variants, self.lams if uses_lam else (None,), self.seeds))
        scale = optima.problem.step_scale if self.step_scale is None else self.step_scale
        scheduler = self._scheduler(optima, grid)
        trace = simulate(
            optima.problem,
            scheduler,
            num_steps=self.num_steps,
            step_size=StepSize(scale, self.decay),
            seeds=[seed for _, _, seed in grid],
            record_steps=self.record_steps,
            batch_size=self.batch_size,
            values=self.values or _cheapest_values(scheduler),
            rule=self.rule,
        )
        frames = [
            self._rows(optima, trace, grid, variant, lam)
            for variant in self.variants
            for lam in self.lams
        ]
        return pd.concat(frames, ignore_index=True)

    def _scheduler(self, optima: ProblemOptima, grid: Grid) -> Scheduler:
        used = scheduler_options(self.algorithm)
        options = dict(self.options)
        if "lam" in used:
            options["lam"] = tuple(lam for _, lam, _ in grid)
        if "seed" in used:
            options["seed"] = tuple(seed for _, _, seed in grid)
        if "optimum" in used:
            options.setdefault("optimum", optima.values)
        for name in self.variants[0].options:
            options[name] = tuple(variant.options[name] for variant, _, _ in grid)
        return make_scheduler(self.algorithm, **options)

    def _rows(
        self,
        optima: ProblemOptima,
        trace: Trace,
        grid: Grid,
        variant: Variant,
        lam: float,
    ) -> pd.DataFrame:
        """The rows of one variant at one lam. Runs that do not use lam serve every lam."""
        chosen = [i for i, (v, own, _) in enumerate(grid) if v is variant and own in (lam, None)]
        shape = (len(ITERATES), len(trace.steps), len(chosen))
        theta = np.stack([trace.theta[iterate][:, chosen] for iterate in ITERATES])
        counts = dict(zip(COUNTS, _counts(trace, chosen), strict=True))
        keys = {
            "iterate": np.array(ITERATES)[:, None, None],
            "step": trace.steps[:, None],
            "seed": np.array([grid[i][2] for i in chosen]),
        }
        columns = keys | convex_metrics(optima, theta, lam) | counts
        flat = {name: np.broadcast_to(column, shape).ravel() for name, column in columns.items()}
        labels = {"problem": self.problem, "algorithm": self.algorithm, "variant": variant.name}
        return pd.DataFrame(flat).assign(**labels, lam=lam, **variant.columns)


def _cheapest_values(scheduler: Scheduler) -> str:
    """The source that decides as exact values do."""
    return "lazy" if scheduler.forgets_values else "exact"


@cache
def _code_digest() -> str:
    """Identifies this version of the package: parts of another one are not taken for results."""
    return digest_of_code("theory")


def _counts(trace: Trace, chosen: list[int]) -> Iterator[NDArray[np.int64]]:
    yield trace.gradients[:, chosen, Task.DPO]
    yield trace.gradients[:, chosen, Task.SFT]
    yield trace.probes[:, chosen].sum(axis=-1)


def run_sweep(
    batches: Sequence[Batch],
    *,
    jobs: int = 2,
    parts: Path | None = None,
    backend: str = "loky",
    progress: bool = True,
) -> pd.DataFrame:
    """The tables of all batches, concatenated in the order given.

    Args:
        batches: what to run; start with the dear ones to keep all processes busy.
        jobs: parallel processes.
        parts: directory that keeps finished batches until the sweep is complete; a batch found
            there is not run again.
        backend: a joblib backend: loky (processes), dask (with a running client), ray, ...
    """
    done = {batch.key: pd.read_parquet(path) for batch, path in _finished(batches, parts)}
    open_batches = [batch for batch in batches if batch.key not in done]
    total = sum(batch.num_steps for batch in batches)
    with (
        tqdm(total=total, unit="step", unit_scale=True, disable=not progress) as bar,
        parallel_config(backend=backend, n_jobs=jobs),
    ):
        bar.update(total - sum(batch.num_steps for batch in open_batches))
        results = Parallel(return_as="generator_unordered")(
            delayed(_run)(pack(batch, batch.names)) for batch in open_batches
        )
        for batch, frame in results:
            if parts is not None:
                write_parquet(parts / f"{batch.key}.parquet", frame)
            done[batch.key] = frame
            bar.update(batch.num_steps)
    return pd.concat([done[batch.key] for batch in batches], ignore_index=True)


def _run(payload: bytes) -> tuple[Batch, pd.DataFrame]:
    batch = unpack(payload)
    return batch, batch.run()


def _finished(batches: Sequence[Batch], parts: Path | None) -> Iterator[tuple[Batch, Path]]:
    for batch in batches:
        path = None if parts is None else parts / f"{batch.key}.parquet"
        if path is not None and path.exists():
            yield batch, path


def discard_parts(parts: Path) -> None:
    """Remove the finished batches once their results are written elsewhere."""
    shutil.rmtree(parts, ignore_errors=True)


def summarise(results: pd.DataFrame, by: Sequence[str] = KEYS) -> pd.DataFrame:
    """Mean and 95% interval over seeds of every metric (`Interval`s), one row per group."""

    grouped = results.groupby(list(by), dropna=False, sort=False)
    moments = grouped[list(METRICS)].agg(["mean", "std", "count"])
    table = grouped[list(COUNTS)].mean()
    for metric in METRICS:
        columns = (moments[metric, name] for name in ("mean", "std", "count"))
        table[metric] = [t_interval(*row) for row in zip(*columns, strict=True)]
    table["seeds"] = grouped.size()
    return table.reset_index()
