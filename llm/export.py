"""Merge LoRA adapters into their base model: a directory that needs no peft to load.

    python -m llm.export runs/mine --out runs/mine-merged

What a run with --load_in_4bit has trained is adapters over the rounded weights. So these are
decoded to full precision and merged: the result is the function that was trained, which the
adapters over the original weights would not be. Where input and output embeddings are one tensor
and an adapter changes one of the two, they are two tensors in the merged model.

What was written is read again and held against the adapted model, on the samples of the reference
that the run has kept, or on tokens at random: log-probabilities may differ by rounding only.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from llm.flags.arguments import ModelArguments
from llm.model.isolation import ROUNDING, rms, shaken
from llm.model.load import load_adapted
from llm.model.samples import FILE
from theory.cli import OneLineParser, UserError, run_command
from theory.records import read_json

PROG = "python -m llm.export"
RECORD = "joint_config.json"
ROWS = 8
"""On which the merged model is compared with the adapted one."""


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    source, out = Path(arguments.run_dir), Path(arguments.out)
    if not (source / "adapter_config.json").is_file():
        raise UserError(f"{source} holds no adapter (adapter_config.json): nothing to merge")
    if out.exists():
        raise UserError(f"--out {out} exists: name a new directory")
    rows, adapted = rows_of(source), adapted_model(source)
    before = log_probabilities(adapted, rows)
    with shaken(adapted):
        rounding = rms(log_probabilities(adapted, rows) - before)
    staging = out.with_name(f".{out.name}.part")
    model = merged(adapted)
    if (source / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    model.save_pretrained(staging)
    AutoTokenizer.from_pretrained(source).save_pretrained(staging)
    check(staging, rows, before, rounding)
    staging.rename(out)
    print(f"wrote the merged model and its tokenizer to {out}/")


def adapted_model(source: Path) -> Any:
    """The adapter in `source` on its base, in full precision."""
    arguments = _as_trained(source)
    base, put_adapter_on = load_adapted(arguments)
    if arguments.load_in_4bit:
        base = base.dequantize()
    return put_adapter_on(base).eval()


def merged(adapted: Any) -> Any:
    """The adapted model without its adapter, which is part of the weights."""
    tied = [c for c in _configs(adapted) if getattr(c, "tie_word_embeddings", False)]
    if not tied:
        return adapted.merge_and_unload()
    head = adapted.get_output_embeddings()
    head = getattr(head, "base_layer", getattr(head, "original_module", head))
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    for config in tied:  # of the base, which is what is left: nothing may tie the two again
        config.tie_word_embeddings = False
    model = adapted.merge_and_unload()
    ends = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if torch.equal(*ends):
        for config in tied:
            config.tie_word_embeddings = True
        model.tie_weights()
    return model


def _configs(model: Any) -> list[Any]:
    return [model.config, model.config.get_text_config()]


def rows_of(source: Path) -> list[list[int]]:
    """Rows of token ids that the run has kept; none without a preference set."""
    if not (source / FILE).is_file():
        return []
    rows = read_json(source / FILE)["rows"]
    return [row["prompt_ids"] + row["completion_ids"] for row in rows[:ROWS]]


@torch.no_grad()
def log_probabilities(model: Any, rows: list[list[int]]) -> Tensor:
    """log pi(next token) of all tokens of the rows, or of tokens at random: one row at a time."""
    size = len(model.get_input_embeddings().weight)
    generator = torch.Generator().manual_seed(0)
    rows = rows or torch.randint(size, (ROWS, 24), generator=generator).tolist()
    logits = (model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in rows)
    return torch.cat([each.float().log_softmax(-1) for each in logits])


def check(written: Path, rows: list[list[int]], before: Tensor, rounding: float) -> None:
    """Refuse, and remove, a model that is not the function that was trained."""
    model = AutoModelForCausalLM.from_pretrained(written, dtype="auto").eval()
    difference = rms(log_probabilities(model, rows) - before)
    if not difference <= ROUNDING * rounding:
        shutil.rmtree(written)
        raise UserError(
            f"the merged model differs from the adapted one by {difference:.1e} nats a token "
            f"(rounding: {rounding:.0e}): nothing is written; use the adapter as it is"
        )


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
