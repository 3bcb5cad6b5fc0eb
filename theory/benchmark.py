"""Measure how fast the simulation is: against a plain NumPy loop, and by source of the losses.

    python -m theory.benchmark
    python -m theory.benchmark --quick --out benchmark_quick

The task is 1,800 runs of 10,000 steps on the softmax problem (d = 20, 10 responses, 50 prompts):
9 values of lam, 50 seeds and 4 algorithms (Mix, ALRIGHT, MAXRIGHT at exact values, sequential).
The baseline is `plain_run`, what one would write down for one run at a time; it takes the same
samples and is checked to follow the same path. It is timed on a few runs and steps and scaled up.

Times are CPU seconds of one process with one BLAS thread, both sides in the same round; ratios are
taken round by round and reported as median and range. Memory is the peak of a fresh process that
does the whole task once. Writes config.json, summary.json and benchmark.png/.svg/.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from theory.cli import check_output_dir, positive_int, run_command
from theory.command import add_out, command_line, command_parser
from theory.optima import problem_optima
from theory.plain import PROBLEM, Array, plain_run
from theory.plotting.style import COLOURS, LABELS, STYLE
from theory.records import save_figure, write_json
from theory.schedulers import Alright, Maxright, Mix, Sequential
from theory.scheduling import Scheduler
from theory.simulate import StepSize, Trace, simulate

NAME = "benchmark"
ALGORITHMS = ("mix", "alright", "maxright", "sequential")
SOURCES = ("exact", "lazy", "fresh", "same")
TOLERANCE = 1e-10
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}


@dataclass(frozen=True)
class BenchmarkConfig:
    """Everything that determines the work. `plain_*` is the part of it that the baseline does."""

    lams: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    num_seeds: int = 50
    num_steps: int = 10_000
    rounds: int = 3
    plain_runs: int = 3
    plain_steps: int = 500

    @property
    def grid(self) -> list[tuple[float, int]]:
        """(lam, seed) of each run of one algorithm."""
        return list(product(self.lams, range(self.num_seeds)))


QUICK = BenchmarkConfig(
    lams=(0.3, 0.7), num_seeds=2, num_steps=200, rounds=1, plain_runs=2, plain_steps=60
)


# --- the two sides


def scheduler_of(algorithm: str, grid: list[tuple[float, int]], num_steps: int) -> Scheduler:
    lams, seeds = (tuple(column) for column in zip(*grid, strict=True))
    if algorithm == "maxright":
        return Maxright(lams, problem_optima(PROBLEM).values, refresh_every=1)
    if algorithm == "sequential":
        return Sequential(num_steps // 2, "dpo_then_sft")
    return Mix(lams) if algorithm == "mix" else Alright(lams, seeds)


def simulated(
    algorithm: str, grid: list[tuple[float, int]], num_steps: int, values: str = "lazy"
) -> Trace:
    """All runs of one algorithm in one batch, recorded at the last step."""
    problem = PROBLEM
    return simulate(
        problem,
        scheduler_of(algorithm, grid, num_steps),
        num_steps=num_steps,
        step_size=StepSize(problem.step_scale),
        seeds=[seed for _, seed in grid],
        record_steps=[num_steps],
        values=values,
    )


def plain_runs(
    algorithm: str, grid: list[tuple[float, int]], num_steps: int
) -> list[dict[str, Array]]:
    return [plain_run(algorithm, lam, seed, num_steps) for lam, seed in grid]


def largest_difference(config: BenchmarkConfig) -> float:
    """Between the two sides, over all algorithms and iterates of the runs that both do."""
    worst = 0.0
    for algorithm in ALGORITHMS:
        trace = simulated(algorithm, _plain_grid(config), config.plain_steps)
        plain = plain_runs(algorithm, _plain_grid(config), config.plain_steps)
        for run, iterates in enumerate(plain):
            for iterate, theta in iterates.items():
                worst = max(worst, float(np.abs(trace.theta[iterate][-1, run] - theta).max()))
    return worst


def _plain_grid(config: BenchmarkConfig) -> list[tuple[float, int]]:
    """Runs spread evenly over the grid."""
    chosen = np.linspace(0, len(config.grid) - 1, config.plain_runs).round().astype(int)
    return [config.grid[i] for i in dict.fromkeys(chosen.tolist())]


# --- measuring


def measure_speed(config: BenchmarkConfig) -> dict[str, Any]:
    """CPU nanoseconds per step of one run, a list over rounds for each case, interleaved."""
    difference = largest_difference(config)  # also compiles everything before it is timed
    if not difference <= TOLERANCE:
        raise RuntimeError(f"the two sides differ by {difference:.1e}: their times say nothing")
    cases: dict[str, tuple[Callable[[], Any], int]] = {}
    plain_grid, grid = _plain_grid(config), config.grid
    for algorithm in ALGORITHMS:
        cases[f"plain {algorithm}"] = (
            partial(plain_runs, algorithm, plain_grid, config.plain_steps),
            len(plain_grid) * config.plain_steps,
        )
        if algorithm != "maxright":
            cases[algorithm] = (
                partial(simulated, algorithm, grid, config.num_steps),
                len(grid) * config.num_steps,
            )
    for source in SOURCES:
        simulated("maxright", plain_grid, 10, source)
        cases[source] = (
            partial(simulated, "maxright", grid, config.num_steps, source),
            len(grid) * config.num_steps,
        )
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _, name in tqdm(list(product(range(config.rounds), cases)), unit="case"):
        work, steps = cases[name]
        begin = time.process_time()
        work()
        times[name].append((time.process_time() - begin) / steps * 1e9)
    return {"nanoseconds_per_step": times, "largest_difference": difference}


def measure_memory(config: BenchmarkConfig) -> dict[str, Any]:
    """Peak resident memory of this process after the whole task, in MiB."""
    for algorithm in ALGORITHMS:
        simulated(algorithm, config.grid, config.num_steps)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}


def in_fresh_process(measurement: str, config: BenchmarkConfig) -> dict[str, Any]:
    """Run `measure_...` in a process whose libraries start with a single thread."""
    code = (
        "import json, sys, theory.benchmark as b; data = json.loads(sys.argv[2]); "
        "config = b.BenchmarkConfig(**data | {'lams': tuple(data['lams'])}); "
        "print(json.dumps(getattr(b, sys.argv[1])(config)))"
    )
    arguments = [sys.executable, "-c", code, measurement, json.dumps(asdict(config))]
    done = subprocess.run(arguments, env=os.environ | ONE_THREAD, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise OSError(f"{measurement} failed with exit status {done.returncode}")
    return json.loads(done.stdout)


def summarise(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Ratios round by round: median, lowest and highest."""
    ns = {name: np.array(rounds) for name, rounds in times.items()}
    ns["maxright"] = ns["lazy"]
    plain = np.sum([ns[f"plain {a}"] for a in ALGORITHMS], axis=0)
    ours = np.sum([ns[a] for a in ALGORITHMS], axis=0)
    ratios = {"speed-up, all": plain / ours}
    ratios |= {f"speed-up, {a}": ns[f"plain {a}"] / ns[a] for a in ALGORITHMS}
    ratios |= {f"{s} / fresh values": ns[s] / ns["fresh"] for s in ("exact", "lazy", "same")}
    return {
        name: {"median": float(np.median(r)), "low": float(r.min()), "high": float(r.max())}
        for name, r in ratios.items()
    }


# --- the figure and the command


def cost_figure(times: dict[str, list[float]]) -> Figure:
    """CPU time per step of a run: the plain loop against the batch, and MAXRIGHT by source."""
    medians = {name: float(np.median(rounds)) / 1e3 for name, rounds in times.items()}
    medians["maxright"] = medians["lazy"]
    plain = {a: medians[f"plain {a}"] for a in ALGORITHMS}
    ours = {a: medians[a] for a in ALGORITHMS}
    names = LABELS | {"sequential": "sequential"}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 2.3), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(4, 3))
        positions = np.arange(len(ALGORITHMS))
        for shift, label, colour, values in (
            (0.2, "plain NumPy loop", "0.65", plain),
            (-0.2, "this package", COLOURS["mix"], ours),
        ):
            bars = left.barh(positions + shift, values.values(), 0.38, color=colour, label=label)
            left.bar_label(bars, fmt="%.2g", padding=2, fontsize=7)
        left.set_yticks(positions, [names[a] for a in ALGORITHMS])
        left.set_xscale("log")
        left.set_xlim(min(ours.values()) / 3, 4 * max(plain.values()))
        left.set_title("four algorithms (log scale)")
        bars = right.barh(SOURCES, [medians[s] for s in SOURCES], 0.6, color=COLOURS["maxright"])
        right.bar_label(bars, fmt="%.2g", padding=2, fontsize=7)
        right.set_xlim(right=1.2 * max(medians[s] for s in SOURCES))
        right.set_title("MAXRIGHT by source of values")
        figure.supxlabel("CPU time per step of a run (µs)", fontsize=8)
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    config = QUICK if arguments.quick else BenchmarkConfig(
        num_seeds=arguments.seeds, num_steps=arguments.steps, rounds=arguments.rounds
    )  # fmt: skip
    out = Path(arguments.out)
    check_output_dir(out)
    speed = in_fresh_process("measure_speed", config)
    memory = in_fresh_process("measure_memory", config)
    ratios = summarise(speed["nanoseconds_per_step"])
    summary = {"config": asdict(config), "ratios": ratios, **speed, **memory}
    write_json(out / "config.json", asdict(config))
    write_json(out / "summary.json", summary)
    save_figure(cost_figure(speed["nanoseconds_per_step"]), out / "benchmark")
    sizes = {flag: getattr(arguments, flag) for flag in ("seeds", "steps", "rounds")}
    command = command_line(NAME, {"quick": ()} if arguments.quick else sizes, arguments.out)
    write_json(out / "benchmark.json", {"command": command, **summary})
    print(report(config, summary))
    print(f"\nwrote config.json, summary.json and benchmark.png/.svg/.json to {out}/")


def report(config: BenchmarkConfig, summary: dict[str, Any]) -> str:
    """The readable table."""
    lines = [
        f"{len(ALGORITHMS) * len(config.grid):,} runs x {config.num_steps:,} steps, one core, "
        f"median over {config.rounds} rounds [lowest, highest]",
        "",
        f"{'CPU time per step of a run':<32}{'ns':>10}",
    ]
    for name, rounds in summary["nanoseconds_per_step"].items():
        label = f"maxright, {name} values" if name in SOURCES else name
        lines.append(f"  {label:<30}{np.median(rounds):>10,.0f}")
    lines += ["", "ratio"]
    for name, r in summary["ratios"].items():
        lines.append(f"  {name:<30}{r['median']:>10.2f}  [{r['low']:.2f}, {r['high']:.2f}]")
    lines += ["", f"peak memory {summary['peak_mib']:,.0f} MiB"]
    lines += [f"largest difference between the two sides {summary['largest_difference']:.1e}"]
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    defaults = BenchmarkConfig()
    description = "Measure the simulation's speed and memory, and what loss values cost."
    parser = command_parser(NAME, description)
    add = parser.add_argument
    add("--seeds", type=positive_int, default=defaults.num_seeds, help="seeds per lam")
    add("--steps", type=positive_int, default=defaults.num_steps, help="steps of each run")
    add("--rounds", type=positive_int, default=defaults.rounds, help="repetitions")
    add("--quick", action="store_true", help="a few short runs, to see that it works")
    add_out(parser, NAME)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main, "python -m theory.benchmark")
