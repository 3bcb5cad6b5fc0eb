"""Compare the algorithms on one problem: equal steps, equal compute, tuned learning rates.

    python -m llm.compare                                  # embedded model and corpus
    python -m llm.compare --config mine.yaml --lams 0.25 0.5 0.75 --seeds 3 --out runs/compare

Takes every flag of llm.run that the runs share. The problem (data, base model, reference) is
prepared once; a seed of a run changes the order of its samples and its decisions, nothing else.

1. Optima: each objective alone, every learning rate; f* is the lowest held-out loss on the way.
2. Tuning: every algorithm over the same learning rates at lam (or split) 1/2, on seeds that the
   comparison never uses; the lowest held-out f_Mix(1/2) at the end wins, among the rates that
   train at all (--least_progress).
3. Equal steps: every algorithm, every lam or split, every seed.
4. Equal compute: the same with as many steps as the compute of sequential training (split 1/2)
   buys; runs of their own, since a learning-rate schedule depends on its horizon.

Resumable: every finished run is kept under --out/runs, named by all that decides its result; start
the same command again and it goes on. Writes config.json, results.parquet and results.csv (a row
per run), paths.parquet, tuning.csv, summary.json, table.md and the figures paths, gaps and compute.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers.utils.logging import disable_progress_bar

from llm.compare.figures import compute_figure, gaps_figure, paths_figure
from llm.compare.plan import Experiment, run_experiment
from llm.compare.pool import Pool
from llm.compare.results import comparison_table, paths_table, tuning_table
from llm.compare.settings import PROG, CompareConfig, parse
from llm.compare.summary import summarise
from llm.compare.table import markdown, report
from llm.compare.workers import Workers
from llm.setup import prepare
from theory.cli import check_output_dir, run_command
from theory.records import save_figure, write_file, write_json, write_parquet, write_text


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    config = parse(argv)
    check_output_dir(config.out)
    began = time.perf_counter()
    disable_progress_bar()  # of transformers' loading: there are many loads, and our own bar
    if config.run.training.device.type == "cpu":
        torch.set_num_threads(1)  # as the workers: the same bits whatever --jobs
    setup = prepare(config.run, print)
    with closing(Workers(config, setup)) as workers:
        pool = Pool(config, setup, workers)
        experiment = run_experiment(config, setup, pool)
    results = comparison_table(config, experiment)
    summary = summarise(config, experiment, results)
    summary["session"] = {"seconds": time.perf_counter() - began, "runs_trained": pool.trained}
    write_results(config, argv, experiment, results, summary)
    print(report(summary))
    print(f"\nwrote table.md, summary.json, results.csv and the figures to {config.out}/")


def write_results(
    config: CompareConfig,
    argv: Sequence[str],
    experiment: Experiment,
    results: pd.DataFrame,
    summary: dict[str, Any],
) -> None:
    out, command = config.out, shlex.join([*PROG.split(), *argv])
    paths = paths_table(experiment)
    write_json(out / "config.json", {"command": command} | config.to_json())
    write_parquet(out / "results.parquet", results)
    write_parquet(out / "paths.parquet", paths)
    _write_csv(out / "results.csv", results)
    _write_csv(out / "tuning.csv", tuning_table(experiment))
    write_json(out / "summary.json", summary)
    write_text(out / "table.md", markdown(summary))
    for name, (figure, numbers) in {
        "paths": paths_figure(paths, summary),
        "gaps": gaps_figure(summary),
        "compute": compute_figure(summary),
    }.items():
        save_figure(figure, out / name)
        write_json(out / f"{name}.json", {"command": command, "numbers": numbers})


def _write_csv(path: Path, frame: pd.DataFrame) -> None:
    write_file(path, lambda temporary: frame.to_csv(temporary, index=False, float_format="%.6g"))


if __name__ == "__main__":
    run_command(main, PROG)
