"""Measure the trainer's speed and memory next to TRL's and the paper's way of a step.

    python -m llm.benchmark                                   # CPU, one thread, half an hour
    python -m llm.benchmark --quick --out benchmark_quick     # to see that it works
    python -m llm.benchmark --device cuda --shape pythia-1b

Suites: `dpo` and `sft` against TRL's trainers; `joint`, ALRIGHT and MAXRIGHT against the paper's
way; `cost`, every algorithm against the cost model of `theory.costs`; `overhead`, the fixed cost of
a step against a plain Trainer; `data` (only if named), from a file to rows against TRL's way. Every
contender is a trainer's own `train()` in its own process; rounds are taken in turn (see
`llm.benchmark.pool`) and ratios round by round.

Writes benchmark.json (all rounds), table.md and benchmark.png/.svg whenever some contenders are
through, so that a time limit loses nothing.
"""

from __future__ import annotations

import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llm.benchmark.config import PROG, BenchmarkConfig, parse
from llm.benchmark.data import SUITE, measure_data
from llm.benchmark.device import describe, find_device, peak_tflops
from llm.benchmark.figures import benchmark_figure
from llm.benchmark.goodput import Work
from llm.benchmark.plan import GROUPS, batches_of, contenders_of, make_job
from llm.benchmark.pool import measure
from llm.benchmark.report import table
from llm.benchmark.rows import describe_rows, equal_rows, make_rows
from llm.benchmark.shapes import SHAPES
from llm.benchmark.summary import summarise_group, throughput
from llm.loss.objectives import Row
from theory.cli import check_output_dir, run_command
from theory.records import save_figure, write_json, write_text
from theory.tasks import Task

LIBRARIES = ("torch", "transformers", "trl", "accelerate", "peft", "flash-attn")
Document = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    config = parse(argv)
    device = find_device(config.device)
    check_output_dir(config.out)
    deadline = time.monotonic() + config.time_limit
    tflops, source = peak_tflops(device, config.peak_tflops)
    document = _empty(config, argv) | {
        "machine": {
            "device": describe(device),
            "processor": platform.machine(),
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in LIBRARIES},
            "peak_tflops": tflops,
            "peak_tflops_source": source,
        }
    }
    for group, suites in GROUPS.items():
        if set(suites) & set(config.suites):
            _measure_group(group, config, document, deadline)
    if SUITE in config.suites:
        print(f"{SUITE}:", flush=True)
        quick = config.shape.name == "tiny"
        document["data"] = measure_data(config.sources, config.threads, quick=quick)
        write_json(config.out / "benchmark.json", document)
        write_text(config.out / "table.md", table(document))
    print("\n" + table(document))
    figure = " and benchmark.png/.svg" * bool(document["groups"])
    print(f"wrote benchmark.json, table.md{figure} to {config.out}/")


def _empty(config: BenchmarkConfig, argv: Sequence[str]) -> Document:
    limited = {"time_limit": config.time_limit} if config.time_limit < float("inf") else {}
    cpu = config.device == "cpu"
    return {
        "command": shlex.join([*PROG.split(), *map(_shown, argv)]),
        "config": asdict(config)
        | {"sources": {key: _shown(name) for key, name in asdict(config.sources).items()}}
        | {"out": _shown(str(config.out)), "time_limit": None}
        | limited,
        "clock": "CPU seconds, rounds in turn" if cpu else "wall seconds, one after the other",
        "rows": {"source": _source(config)},
        "groups": {},
        "comparisons": [],
        "costs": [],
        "throughput": [],
        "failed": {},
    }


def _source(config: BenchmarkConfig) -> str:
    given = [_shown(name) for name in (config.sources.sft, config.sources.dpo) if name]
    generated = ["generated (log-normal lengths, HH- and Alpaca-like)"] * (len(given) < 2)
    return ", ".join(given + generated)


def _shown(argument: str | None) -> str:
    """A path outside of the working directory by its name: a record is for other machines too."""
    path = Path(argument or "")
    return path.name if path.is_absolute() or ".." in path.parts else str(argument or "")


def _measure_group(
    group: str, config: BenchmarkConfig, document: Document, deadline: float
) -> None:
    suites = [suite for suite in GROUPS[group] if suite in config.suites]
    print(f"{' and '.join(suites)}:", flush=True)
    rows = _rows(group, config)
    jobs = {
        contender.name: make_job(
            contender, group, config.shape, config.device, config.threads, config.rounds
        )
        for contender in contenders_of(suites)
    }
    document["rows"][group] = {task.label: describe_rows(rows[task]) for task in rows}
    before = {key: document[key] for key in ("comparisons", "costs", "throughput")}
    work = Work.of(config.shape)
    for records in measure(jobs, rows, lambda line: print(line, flush=True), deadline):
        document["groups"][group] = records
        document["failed"] |= {
            f"{group}: {name}": record["failed"]
            for name, record in records.items()
            if "failed" in record
        }
        found = summarise_group(group, suites, records, config.shape, config.device)
        if group != "overhead":
            found["throughput"] = throughput(
                *(group, records, rows, config.shape, work),
                document["machine"]["peak_tflops"],
            )
        document |= {key: before[key] + lines for key, lines in found.items()}
        _write(config, document)


def _rows(group: str, config: BenchmarkConfig) -> dict[Task, list[Row]]:
    batches = batches_of(group, config.shape)
    if group == "overhead":
        return equal_rows(batches.number * batches.sft, SHAPES["tiny"])
    sizes = {Task.DPO: batches.dpo, Task.SFT: batches.sft}
    tasks = list(Task) if group == "joint" else [Task[group.upper()]]
    return {
        task: make_rows(task, batches.number * sizes[task], config.shape, config.sources)
        for task in tasks
    }


def _write(config: BenchmarkConfig, document: Document) -> None:
    write_json(config.out / "benchmark.json", document)
    write_text(config.out / "table.md", table(document))
    save_figure(benchmark_figure(document), config.out / "benchmark")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    run_command(main, PROG)
