"""Merge LoRA adapters into their base model: a directory that needs no peft to load.

    python -m llm.export runs/mine --out runs/mine-merged

What a run with --load_in_4bit has trained is adapters over the rounded weights. So these are
decoded to full precision and merged: the result is the function that was trained, which the
adapters over the original weights would not be.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from llm.flags.arguments import ModelArguments
from llm.model.load import load_adapted
from theory.cli import OneLineParser, UserError, run_command
from theory.records import read_json

PROG = "python -m llm.export"
RECORD = "joint_config.json"


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    source, out = Path(arguments.run_dir), Path(arguments.out)
    if not (source / "adapter_config.json").is_file():
        raise UserError(f"{source} holds no adapter (adapter_config.json): nothing to merge")
    if out.exists():
        raise UserError(f"--out {out} exists: name a new directory")
    model = merged(source)
    if (source / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    staging = out.with_name(f".{out.name}.part")
    model.save_pretrained(staging)
    AutoTokenizer.from_pretrained(source).save_pretrained(staging)
    staging.rename(out)
    print(f"wrote the merged model and its tokenizer to {out}/")


def merged(source: Path) -> Any:
    """The base of the adapter in `source` with the adapter merged into it, in full precision."""
    arguments = _as_trained(source)
    base, put_adapter_on = load_adapted(arguments)
    if arguments.load_in_4bit:
        base = base.dequantize()
    return put_adapter_on(base).merge_and_unload()


def _as_trained(source: Path) -> ModelArguments:
    """How the run in `source` loaded its base; without its record, as the base was saved."""
    arguments = ModelArguments(model_name_or_path=str(source), dtype="auto")
    if (source / RECORD).is_file():
        recorded = read_json(source / RECORD)["model"]
        arguments.dtype = recorded["dtype"]
        arguments.load_in_4bit = recorded.get("load_in_4bit", False)
    return arguments


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog=PROG, description="Merge LoRA adapters into their base model.")
    parser.add_argument("run_dir", help="output directory of a run with --use_peft true")
    parser.add_argument("--out", required=True, help="new directory for the merged model")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main, PROG)
