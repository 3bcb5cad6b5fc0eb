"""Train one language model on demonstrations and preferences under a schedule.

    python -m llm.run --algo alright                     # offline, embedded model and corpus
    python -m llm.run --algo maxright --lam 0.5 \\
        --model_name_or_path EleutherAI/pythia-70m \\
        --sft_dataset demonstrations.jsonl --dpo_dataset pairs.parquet

Writes into --output_dir (default runs/ALGO): the model and tokenizer as transformers loads them,
joint_config.json, metrics.jsonl (every log line), schedule.json (every decision, counters),
joint_summary.json (the final table) and README.md (the model card).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from llm.flags.arguments import JointArguments, RunConfig
from llm.flags.machine import check_machine
from llm.flags.parse import PROG, parse
from llm.flags.schedule import lam_of, scheduler_of
from llm.optima import Optimum, find_optimum
from llm.setup import Setup, make_trainer, prepare, total_steps
from llm.train.callbacks import JsonLines
from llm.train.checkpoints import intact, newest_intact
from llm.train.free import NOT_PART_OF_A_RUN, differing, flat
from llm.train.trainer import JointTrainer
from theory.cli import UserError, run_command
from theory.metrics import ideal_distance, mix_value
from theory.records import read_json, write_json, write_text
from theory.registry import label_of
from theory.tables import markdown_table
from theory.tasks import Task

CONFIG_FILE, SUMMARY_FILE = "joint_config.json", "joint_summary.json"
METRICS_FILE, SCHEDULE_FILE = "metrics.jsonl", "schedule.json"
CARD_TITLES = {"f_mix": "f_Mix", "ideal_distance": "ideal distance"}


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(sys.argv[1:] if argv is None else argv)
    output_dir = Path(config.output_dir)
    check_machine(config)
    claim(output_dir, config.training, _record(config))
    started = time.perf_counter()
    say = _speaker(config)
    setup = prepare(config, say)
    optimum = find_optimum(setup, config, say)
    trainer, before, after = train(setup, config, optimum, say)
    summary = summarise(setup, config, trainer, before, after, optimum)
    summary["seconds"]["total"] = time.perf_counter() - started
    finish(output_dir, trainer, _record(config), model_card(config, summary), summary)
    say(table(summary))
    say(f"\nwrote the model, {METRICS_FILE}, {SCHEDULE_FILE} and {SUMMARY_FILE} to {output_dir}/")


def train(
    setup: Setup, config: RunConfig, optimum: Optimum | None, say: Any
) -> tuple[JointTrainer, dict[str, float], dict[str, float]]:
    """Train and save; returns the trainer and the held-out values before and after."""
    trainer = new_trainer(setup, config, optimum)
    before = trainer.held_out()
    trainer.train(resume_from_checkpoint=_checkpoint(config.training, say))
    after = trainer.held_out()
    trainer.save_model()
    if any(part.ends for part in setup.train.values()) and trainer.is_world_process_zero():
        # Adapters are saved without it; their merged export is to stop where they do.
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.generation_config.save_pretrained(config.output_dir)
    return trainer, before, after


def new_trainer(setup: Setup, config: RunConfig, optimum: Optimum | None) -> JointTrainer:
    """The trainer of a run as its flags describe it; it logs to metrics.jsonl."""
    num_steps = total_steps(setup, config)
    scheduler = scheduler_of(config.training, num_steps=num_steps, optimum=optimum)
    arguments = replace(config.training, max_steps=num_steps)
    log = JsonLines(Path(config.output_dir) / METRICS_FILE)
    name = config.training.algo
    return make_trainer(
        setup, config, arguments, scheduler, config.tasks, callbacks=[log], description=name
    )


def summarise(
    setup: Setup,
    config: RunConfig,
    trainer: JointTrainer,
    before: Mapping[str, float],
    after: Mapping[str, float],
    optimum: Optimum | None,
) -> dict[str, Any]:
    """Everything that the final table shows, and more, as plain data."""
    lam = lam_of(config.training)
    summary: dict[str, Any] = {
        "algo": config.training.algo,
        "schedule": {
            "label": label_of(type(trainer.scheduler)),
            "description": trainer.scheduler.describe(),
        },
        "lam": lam,
        "held_out": {"before": dict(before), "after": dict(after)},
        "optimum": None if optimum is None else dict(zip(("dpo", "sft"), optimum, strict=True)),
        "steps": {task.label: n for task, n in trainer.steps_taken.items()},
        "tokens": {task.label: n for task, n in trainer.tokens_seen.items()},
        "probes": trainer.probes,
        "rows": {
            encoded.name: encoded.report.to_json()
            for part in (setup.train, setup.held_out)
            for encoded in part.values()
        },
        "warnings": [
            line
            for part in (setup.train, setup.held_out)
            for encoded in part.values()
            for line in encoded.report.warnings(encoded.name)
        ],
        "clipping": trainer.clipping,
        "value_rows": {task.label: len(rows) for task, rows in trainer.value_rows.items()},
        "seconds": {
            "training": trainer.state.log_history[-1].get("train_runtime"),
            "phases": dict(trainer.clock.seconds),
        },
    }
    for moment, values in (("before", before), ("after", after)):
        names = [f"{task.label}_loss" for task in Task]
        if all(name in values for name in names):
            losses = [values[name] for name in names]
            point: dict[str, float] = {"f_mix": float(mix_value(losses, lam))}
            if optimum is not None:
                point["ideal_distance"] = float(ideal_distance(losses, optimum))
            summary.setdefault("combined", {})[moment] = point
    return summary


def table(summary: dict[str, Any]) -> str:
    """The final table, readable in a terminal."""
    lines = ["", f"{summary['schedule']['description']}", ""]
    lines.append(f"{'held-out':<26}{'before':>10}{'after':>10}{'optimum':>10}{'gap':>10}")
    for name, cells in _table_rows(summary):
        lines.append(f"{name:<26}" + "".join(f"{cell:>10.4f}" for cell in cells))
    if summary["optimum"] is None:
        lines.append("no gaps: give --optima estimate, or --optima FILE, to measure them")
    lines += ["", f"{'trained on':<26}{'steps':>10}{'tokens':>10}"]
    for label, steps in summary["steps"].items():
        lines.append(f"{label.upper():<26}{steps:>10}{summary['tokens'][label]:>10}")
    lines += summary.get("warnings", ())
    seconds = summary["seconds"]
    lines.append(
        f"probes {summary['probes']}; training {seconds['training']:.1f} s, "
        f"everything {seconds['total']:.1f} s"
    )
    return "\n".join(lines)


def _table_rows(summary: dict[str, Any]) -> Iterator[tuple[str, list[float]]]:
    """(name, [before, after, optimum, gap]) of what was measured; the last two where known."""
    moments = ("before", "after")
    held_out = [summary["held_out"][moment] for moment in moments]
    for label, unit in (("sft", "nats/token"), ("dpo", "nats/pair")):
        if f"{label}_loss" in held_out[0]:
            cells = [values[f"{label}_loss"] for values in held_out]
            if summary["optimum"] is not None:
                best = summary["optimum"][label]
                cells += [best, cells[1] - best]
            yield f"f_{label.upper()} ({unit})", cells
    names = {"f_mix": f"f_Mix (lam {summary['lam']:g})", "ideal_distance": "ideal distance"}
    combined = summary.get("combined", {"after": {}})
    for key in combined["after"]:
        yield names[key], [combined[moment][key] for moment in moments]
    if "dpo_reward_accuracy" in held_out[0]:
        yield "reward accuracy", [values["dpo_reward_accuracy"] for values in held_out]


def model_card(config: RunConfig, summary: dict[str, Any]) -> str:
    """README.md of an output directory, in the format of the Hugging Face hub."""
    base = config.model.model_name_or_path
    header = ["---", "library_name: transformers", "tags: [sft, dpo, joint-sft-dpo]"]
    if base is not None:
        header.append(f"base_model: {base}")
    return "\n".join(
        [*header, "---", "", *_card_objective(config, summary), *_card_results(summary), ""]
    )


def _card_objective(config: RunConfig, summary: dict[str, Any]) -> list[str]:
    training = config.training
    return [
        f"# {config.model.model_name_or_path or 'tiny GPT-NeoX'}, trained with `{training.algo}`",
        "",
        "Objective: lam f_DPO + (1 - lam) f_SFT with f_SFT the mean negative log-likelihood of the "
        f"response tokens and f_DPO the `{training.loss_type}` preference loss "
        f"(beta {training.beta:g}, label smoothing {training.label_smoothing:g}, reference: "
        f"{config.model.reference}).",
        "",
        f"Schedule: `{summary['schedule']['description']}`, seed {training.seed}, learning rate "
        f"{training.learning_rate:g}.",
        "",
        markdown_table(
            ("data", "source", "rows kept", "truncated", "dropped"),
            (_data_cells(name, rows, config) for name, rows in summary["rows"].items()),
        ),
    ]


def _data_cells(name: str, rows: dict[str, Any], config: RunConfig) -> list[str]:
    task, part = name.split(maxsplit=1)
    suffix = "_eval_dataset" if part == "held-out" else "_dataset"
    source = getattr(config.data, f"{task}{suffix}") or getattr(config.data, f"{task}_dataset")
    source = " ".join(source) if isinstance(source, list) else source
    counts = (rows["kept"], rows["truncated"], sum(rows["dropped"].values()))
    return [name, source or "generated", *map(str, counts)]


def _card_results(summary: dict[str, Any]) -> list[str]:
    before, after = (
        summary["held_out"][moment] | summary.get("combined", {}).get(moment, {})
        for moment in ("before", "after")
    )
    rows = (
        [CARD_TITLES.get(name, name), f"{before[name]:.4f}", f"{value:.4f}"]
        for name, value in after.items()
    )
    table = markdown_table(("held-out", "before", "after"), rows)
    steps = ", ".join(f"{task.upper()} {count}" for task, count in summary["steps"].items())
    told = f"Optimiser steps: {steps}. Losses in nats (SFT per token, DPO per pair)."
    return ["", table, "", told]


def claim(output_dir: Path, training: JointArguments, mine: dict[str, Any]) -> None:
    """Take the output directory for the run that `mine` records.

    Raises UserError rather than overwrite the results of another run."""
    record, done = output_dir / CONFIG_FILE, output_dir / SUMMARY_FILE
    if done.exists() and not training.overwrite_output_dir:
        theirs = read_json(record) if record.exists() else {}
        if names := differing(flat(theirs), flat(mine)):
            raise UserError(
                f"--output_dir {output_dir} holds the results of a run with other settings "
                f"({', '.join(names)}); name another directory or pass --overwrite_output_dir true"
            )
    if training.process_index == 0:
        done.unlink(missing_ok=True)
        if training.resume_from_checkpoint is None:
            (output_dir / METRICS_FILE).unlink(missing_ok=True)
        if not (record.exists() and training.resume_from_checkpoint):
            write_json(record, mine)


def finish(
    output_dir: Path,
    trainer: JointTrainer,
    record: dict[str, Any],
    card: str,
    summary: dict[str, Any],
) -> None:
    """Write what a finished run leaves beside its model, the summary last; then the ranks part."""
    if trainer.is_world_process_zero():
        write_json(output_dir / CONFIG_FILE, record)  # a resumed run may have changed it
        write_json(output_dir / SCHEDULE_FILE, trainer.state_to_json())
        write_text(output_dir / "README.md", card)
        write_json(output_dir / SUMMARY_FILE, summary)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # its threads must not outlive the interpreter


def record_of(training: JointArguments, **others: Any) -> dict[str, Any]:
    """What joint_config.json holds: `others` and every setting of the training, as plain data."""
    settings = training.to_dict()
    kept = {name: value for name, value in settings.items() if name not in NOT_PART_OF_A_RUN}
    plain: dict[str, Any] = json.loads(json.dumps({**others, "training": kept}, default=str))
    return plain


def _record(config: RunConfig) -> dict[str, Any]:
    return record_of(config.training, model=asdict(config.model), data=asdict(config.data))


def _checkpoint(arguments: TrainingArguments, say: Any) -> str | None:
    """The checkpoint to resume from; `--resume_from_checkpoint true` means the newest intact."""
    wanted = str(arguments.resume_from_checkpoint or "false")
    if wanted.lower() == "false":
        return None
    if wanted.lower() == "true":
        return str(newest_intact(Path(str(arguments.output_dir)), say))
    return str(intact(Path(wanted)))


def _speaker(config: RunConfig) -> Any:
    """Print on the main process only."""
    return print if config.training.process_index == 0 else lambda *_: None


if __name__ == "__main__":
    run_command(main, PROG)
