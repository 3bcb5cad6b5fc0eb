"""Hold a comparison of language models against theory: P1 to P6, T7, T8 and two hypotheses.

    python -m llm.validate                                    # reads runs/compare
    python -m llm.validate --run --comparison runs/mine --model_name_or_path MODEL ...

Reads what `llm.compare` wrote (with --run, runs it first; all other flags are then its flags) and
applies `theory.predictions`. A prediction that fails is reported as failed, with what it is not
due to. The studies train more runs on the same problem, at its learning rates:

curvature   the gap of sequential training from gradients and Hessian products (T8)
switches    the gap against the number of switches between the objectives (T7)
clipping    hypothesis 1: clipping per objective shifts the effective lam
lockout     hypothesis 2: stale minibatch values make MAXRIGHT deaf to lam; do the remedies help?

Resumable: finished runs are kept under --out/runs. Writes config.json, validation.json, table.md
and the figure validate.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

import torch

from llm.compare.__main__ import main as compare
from llm.validate import clipping, lockout, switches, trade_off
from llm.validate.bench import Bench
from llm.validate.figures import validate_figure
from llm.validate.predictions import comparison_quantities, lower_bounds, predict
from llm.validate.quantities import Quantity
from llm.validate.report import markdown, summary_lines
from llm.validate.settings import PROG, ValidateConfig, parse
from llm.validate.source import Comparison, read_comparison
from theory.cli import check_output_dir, run_command
from theory.records import save_figure, write_json, write_text

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    config = parse(argv)
    check_output_dir(config.out)
    if config.compare_argv is not None:
        compare([*config.compare_argv, "--out", str(config.comparison)])
    comparison = read_comparison(config.comparison)
    if comparison.config.run.training.device.type == "cpu":
        torch.set_num_threads(1)  # as in the comparison
    record = validate(config, comparison)
    write_results(config, argv, record)
    print(summary_lines(record))
    print(f"\nwrote validation.json, table.md and validate.png/.svg/.json to {config.out}/")


def validate(config: ValidateConfig, comparison: Comparison) -> Record:
    """Everything that validation.json holds."""
    with closing(Bench(config, comparison)) as bench:
        quantities, hypotheses = study(bench)
    found = {entry["name"]: entry["verdict"] for entry in hypotheses}
    own = [*comparison_quantities(comparison), *lower_bounds(comparison)]
    return {
        "problem": comparison.summary["problem"],
        "seeds": {"comparison": comparison.summary["seeds"], "studies": config.study_seeds},
        "measured_on": comparison.measured_on,
        "optima": comparison.optima._asdict(),
        "predictions": predict(comparison, found),
        "quantities": [asdict(quantity) for quantity in (*own, *quantities)],
        "hypotheses": hypotheses,
    }


def study(bench: Bench) -> tuple[list[Quantity], list[Record]]:
    """The studies that --studies names: quantities and hypotheses."""
    wanted, quantities, hypotheses = bench.config.studies, list[Quantity](), list[Record]()
    if "curvature" in wanted:
        quantities += trade_off.trade_off_quantities(trade_off.run_trade_off(bench))
    if "switches" in wanted:
        quantities += switches.switch_quantities(switches.run_switches(bench))
    if "clipping" in wanted:
        clipped = clipping.run_clipping(bench)
        quantities += clipping.clipping_quantities(clipped)
        hypotheses += clipping.clipping_hypotheses(clipped)
    if "lockout" in wanted:
        arms = lockout.run_lockout(bench)
        quantities += lockout.lockout_quantities(arms, bench.optimum)
        hypotheses += lockout.lockout_hypotheses(arms, bench.optimum)
    return quantities, hypotheses


def write_results(config: ValidateConfig, argv: Sequence[str], record: Record) -> None:
    out, command = config.out, shlex.join([*PROG.split(), *argv])
    write_json(out / "config.json", {"command": command} | config.to_json())
    write_json(out / "validation.json", record)
    write_text(out / "table.md", markdown(record))
    figure, numbers = validate_figure(record)
    save_figure(figure, out / "validate")
    write_json(out / "validate.json", {"command": command, "numbers": numbers})


if __name__ == "__main__":
    run_command(main, PROG)
