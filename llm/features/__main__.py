"""Build a convex problem from a language model, demonstrations and preferences.

    python -m llm.features --out embedded.npz       # offline, the embedded model and corpus
    python -m llm.features --model_name_or_path EleutherAI/pythia-70m \\
        --sft_dataset demonstrations.jsonl --dpo_dataset pairs.parquet --out pythia.npz
    python -m theory.gap_experiment --problem pythia.npz

Flags for model and data are those of `llm.run`; those that have nothing to do here are refused.
With --vary, the conflict is also measured over --dim, pi_0, --label_noise and --beta, one at a
time, with bootstrap intervals over the prompts, into OUT_conflict.json, .png and .svg.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from llm.features.build import BASE_POLICIES, BuildOptions, build
from llm.features.candidates import Extraction, Extractor
from llm.features.conflict import measure, report, vary
from llm.features.figures import conflict_figure
from llm.flags.arguments import DataArguments, ModelArguments, RunConfig
from llm.flags.parse import parse
from llm.model.load import load_config
from llm.setup import prepare
from theory.cli import OneLineParser, UserError, positive_int, run_command
from theory.feature_file import SUFFIX
from theory.problems import problem_from_features
from theory.records import save_figure, write_json
from theory.tasks import Task

PROG = "python -m llm.features"
OTHERS = ("seed", "per_device_eval_batch_size", "use_cpu", "bf16", "disable_tqdm")
"""Flags of `llm.run`, besides model and data, that mean something here."""
UNUSED = (
    *("reference", "use_peft", "lora_"),
    *("max_train_rows", "max_eval_rows", "eval_", "held_out", "leaked"),
)
"""Parts of the names of model and data flags that do not."""


def main(argv: Sequence[str] | None = None) -> None:
    arguments, rest = parse_own(sys.argv[1:] if argv is None else argv)
    options = BuildOptions(**{f.name: getattr(arguments, f.name) for f in fields(BuildOptions)})
    out = Path(arguments.out)
    check_out(out)
    extractions, about = extract(arguments, rest)
    data = build(extractions, options, about)
    data.save(out)
    problem = problem_from_features(data, str(out))
    print(report(measure(data)))
    if arguments.vary:
        settings = vary(extractions, options)
        write_json(out.with_name(f"{out.stem}_conflict.json"), {**data.about, "settings": settings})
        save_figure(conflict_figure(settings), out.with_name(f"{out.stem}_conflict"))
    print(
        f"\nwrote {out}: {len(data.preference)} pairs, {len(data.sft_labels)} demonstrations, "
        f"dim {problem.dim}, radius {problem.radius:.3g}, step scale {problem.step_scale:.3g}"
    )


def extract(
    arguments: argparse.Namespace, rest: Sequence[str]
) -> tuple[dict[Task, Extraction], dict[str, Any]]:
    """Load the model and the rows, draw the candidates, pool their hidden states."""
    with tempfile.TemporaryDirectory() as scratch:
        config = run_config(arguments, rest, scratch)
        setup = prepare(config, print)
    model = setup.new_policy().to(config.training.device)
    extractor = Extractor(
        model.requires_grad_(False),
        int(setup.tokenizer.eos_token_id),
        int(setup.tokenizer.pad_token_id),
        config.training.per_device_eval_batch_size,
        config.training.seed,
    )
    with torch.autocast(config.training.device.type, torch.bfloat16, config.training.bf16):
        extractions = extractor.extract(
            {task: setup.train[task].rows for task in Task},
            candidates=arguments.candidates,
            samples=arguments.samples,
            say=print,
        )
    about = {
        "model": _public([config.model.model_name_or_path]),
        "sft_dataset": _public(config.data.sft_dataset),
        "dpo_dataset": _public(config.data.dpo_dataset),
        "seed": config.training.seed,
        "per_device_eval_batch_size": config.training.per_device_eval_batch_size,
        **{name: getattr(arguments, name) for name in ("rows", "candidates", "samples")},
    }
    return extractions, about


def _public(sources: Sequence[str | None] | None) -> str:
    """A name to record: a hub id as it is, of a local path the last part alone."""
    names = [each for each in sources or () if each is not None]
    shown = (Path(each).name if Path(each).exists() else each for each in names)
    return " ".join(shown) or "embedded"


def run_config(arguments: argparse.Namespace, rest: Sequence[str], scratch: str) -> RunConfig:
    """The configuration of a run that would train on the same rows."""
    rows = ("--max_train_rows", str(arguments.rows), "--max_eval_rows", "2", "--kl_rows", "0")
    config = parse([*rest, *rows, "--algo", "mix", "--report_to", "none", "--output_dir", scratch])
    # A response here is one text, and not the answers of a conversation.
    config = replace(config, data=replace(config.data, train_on="last"))
    if config.embedded or config.data.max_length is not None:
        return config
    # Prompts meet responses of other rows: together they have to fit into the positions.
    text_config = load_config(config.model).get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None) or 512
    return replace(config, data=replace(config.data, max_length=min(256, positions // 2)))


def parse_own(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of this command, and the rest for `llm.run`'s parser."""
    defaults = BuildOptions()
    parser = OneLineParser(
        prog=PROG,
        description="Build a convex problem from a language model and two data sets. Further "
        "flags, for model and data: those of python -m llm.run.",
    )
    add = parser.add_argument
    add("--out", default="features.npz", help="the file to write")
    add("--rows", type=positive_int, default=256, help="rows of each data set, from the start")
    add("--candidates", type=positive_int, default=8, help="responses for each prompt")
    add("--samples", type=int, default=2, help="how many of them the model draws itself")
    add("--dim", type=int, default=defaults.dim, help="dimensions of the features")
    names = ", ".join(BASE_POLICIES)
    add("--base_policy", default=defaults.base_policy, help=f"log pi_0 of the model: {names}")
    add(
        "--base_temperature", type=float, default=defaults.base_temperature, help="divides log pi_0"
    )
    add("--label_noise", type=float, default=defaults.label_noise, help="share of flipped labels")
    add("--beta", type=float, default=defaults.beta, help="temperature of DPO")
    add("--vary", action="store_true", help="also measure the conflict over these options")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.samples < 0:
        raise UserError(f"--samples is {arguments.samples}; it must not be negative")
    if arguments.candidates < 2 + arguments.samples:
        raise UserError(
            f"--candidates is {arguments.candidates}; chosen, rejected and --samples "
            f"{arguments.samples} need at least {2 + arguments.samples}"
        )
    _refuse_flags_of_training(rest)
    return arguments, rest


def _refuse_flags_of_training(rest: Sequence[str]) -> None:
    known = {f.name for kind in (ModelArguments, DataArguments) for f in fields(kind)}
    allowed = {name for name in known if not any(part in name for part in UNUSED)} | set(OTHERS)
    for token in rest:
        name = token.removeprefix("--").partition("=")[0].replace("-", "_")
        if token.startswith("--") and name not in allowed:
            raise UserError(f"{token.partition('=')[0]} is not used by {PROG}")


def check_out(out: Path) -> None:
    if out.suffix != SUFFIX:
        raise UserError(f"--out {out} must end in {SUFFIX}")
    if out.is_dir():
        raise UserError(f"--out {out} is a directory")


if __name__ == "__main__":
    run_command(main, PROG)
