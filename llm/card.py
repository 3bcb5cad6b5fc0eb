"""The model card of a run: what was trained, on what, and what came out. All numbers measured."""

from __future__ import annotations

from typing import Any

from llm.flags.parse import RunConfig

TITLES = {"f_mix": "f_Mix", "ideal_distance": "ideal distance"}


def model_card(config: RunConfig, summary: dict[str, Any]) -> str:
    """README.md of an output directory, in the format of the Hugging Face hub."""
    base = config.model.model_name_or_path
    header = ["---", "library_name: transformers", "tags: [sft, dpo, joint-sft-dpo]"]
    if base is not None:
        header.append(f"base_model: {base}")
    return "\n".join([*header, "---", "", *_objective(config, summary), *_results(summary), ""])


def _objective(config: RunConfig, summary: dict[str, Any]) -> list[str]:
    training, data = config.training, config.data
    lines = [
        f"# {config.model.model_name_or_path or 'tiny GPT-NeoX'}, trained with `{training.algo}`",
        "",
        "Objective: lam f_DPO + (1 - lam) f_SFT with f_SFT the mean negative log-likelihood of the "
        f"response tokens and f_DPO the `{training.loss_type}` preference loss "
        f"(beta {training.beta:g}, label smoothing {training.label_smoothing:g}, reference: "
        f"{config.model.reference}).",
        "",
        f"Schedule: `{summary['scheduler']}`, seed {training.seed}, learning rate "
        f"{training.learning_rate:g}.",
        "",
        "| data | source | rows kept | truncated | dropped |",
        "|---|---|---|---|---|",
    ]
    for name, rows in summary["rows"].items():
        task, part = name.split(maxsplit=1)
        suffix = "_eval_dataset" if part == "held-out" else "_dataset"
        source = getattr(data, f"{task}{suffix}") or getattr(data, f"{task}_dataset")
        dropped = sum(rows["dropped"].values())
        cells = (name, source or "generated", rows["kept"], rows["truncated"], dropped)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _results(summary: dict[str, Any]) -> list[str]:
    before, after = (dict(summary["held_out"][moment]) for moment in ("before", "after"))
    for moment, values in (("before", before), ("after", after)):
        values |= summary.get("combined", {}).get(moment, {})
    lines = ["", "| held-out | before | after |", "|---|---|---|"]
    for name, value in after.items():
        lines.append(f"| {TITLES.get(name, name)} | {before[name]:.4f} | {value:.4f} |")
    steps = ", ".join(f"{task.upper()} {count}" for task, count in summary["steps"].items())
    return [*lines, "", f"Optimiser steps: {steps}. Losses in nats (SFT per token, DPO per pair)."]
