"""Merge LoRA adapters into their base model: a directory that needs no peft to load.

python -m llm.export runs/mine --out runs/mine-merged
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from theory.cli import OneLineParser, UserError, run_command

PROG = "python -m llm.export"


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    source, out = Path(arguments.run_dir), Path(arguments.out)
    if not (source / "adapter_config.json").is_file():
        raise UserError(f"{source} holds no adapter (adapter_config.json): nothing to merge")
    if out.exists():
        raise UserError(f"--out {out} exists: name a new directory")
    model = AutoPeftModelForCausalLM.from_pretrained(source).merge_and_unload()
    staging = out.with_name(f".{out.name}.part")
    model.save_pretrained(staging)
    AutoTokenizer.from_pretrained(source).save_pretrained(staging)
    staging.rename(out)
    print(f"wrote the merged model and its tokenizer to {out}/")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog=PROG, description="Merge LoRA adapters into their base model.")
    parser.add_argument("run_dir", help="output directory of a run with --use_peft true")
    parser.add_argument("--out", required=True, help="new directory for the merged model")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main, PROG)
