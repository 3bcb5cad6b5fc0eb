"""Pretrain a language model of Pythia's shape from scratch, by the trainer of everything else.

    python -m llm.pretrain                                  # offline, generated texts, tiny model
    python -m llm.pretrain --size 14m --texts stories.parquet --vocab_size 8192 \\
        --max_length 512 --num_train_epochs 1 --output_dir runs/base
    python -m llm.run --model_name_or_path runs/base ...    # the next step

Texts are a column `text`, or the prompts and (chosen) answers of any format that llm.run reads. All
flags of llm.run that belong to training hold: packed batches, precision, checkpoints that resume
exactly, trackers. Writes into --output_dir (default runs/pretrain): model and tokenizer as
transformers loads them, joint_config.json, metrics.jsonl, schedule.json, joint_summary.json (with
the held-out perplexity before and after) and README.md.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm.arguments import ModelArguments
from llm.checks import check_max_length
from llm.layout import takes_packed_batches
from llm.models import load_tokenizer
from llm.objectives import SFTObjective
from llm.pretrain.model import bare_tokenizer, model_config, new_model, train_tokenizer
from llm.pretrain.settings import DATA_FLAGS, PROG, PretrainConfig, parse
from llm.pretrain.texts import (
    Document,
    embedded_documents,
    encode_parts,
    read_documents,
    split_documents,
    texts_of,
)
from llm.run import METRICS_FILE, SUMMARY_FILE, claim, finish, record_of, summarise, train
from llm.setup import Setup
from theory.cli import run_command
from theory.tasks import Task


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(sys.argv[1:] if argv is None else argv)
    training, out = config.run.training, Path(config.run.output_dir)
    claim(out, training, _record(config))
    say: Callable[..., None] = print if training.process_index == 0 else lambda *_: None
    started = time.perf_counter()
    setup = prepare(config, say)
    trainer, before, after = train(setup, config.run, None, say)
    summary = summarise(setup, config.run, trainer, before, after, None)
    summary["seconds"]["total"] = time.perf_counter() - started
    losses = {"before": before["sft_loss"], "after": after["sft_loss"]}
    summary["perplexity"] = {moment: math.exp(loss) for moment, loss in losses.items()}
    summary["parameters"] = sum(each.numel() for each in trainer.model.parameters())
    finish(out, trainer, _record(config), card(config, summary), summary)
    say(table(summary))
    say(f"\nwrote the model, {METRICS_FILE} and {SUMMARY_FILE} to {out}/")


def prepare(config: PretrainConfig, say: Callable[..., None]) -> Setup:
    """Texts, tokenizer, rows, and how to make the untrained model.

    Raises UserError for texts that cannot be read and shapes that are no model."""
    parts = read_parts(config)
    tokenizer = _tokenizer(config, parts[0])
    say(f"tokenizer: {config.tokenizer or 'trained on the texts'}, {len(tokenizer)} tokens")
    shape = model_config(config.size, tokenizer)
    length = check_max_length(config.run.data.max_length, shape, tokenizer)
    train_rows, held_out = encode_parts(*parts, tokenizer, length)
    for encoded in (train_rows, held_out):
        say(encoded.report.line(encoded.name), f"({len(encoded.rows)} rows)")
    rows = {Task.SFT: train_rows}
    packing = takes_packed_batches(config.run, new_model(shape), rows, tokenizer.pad_token_id, say)
    objectives = {Task.SFT: SFTObjective(packing=packing)}
    # The trainer sets the seed before it asks for a model.
    return Setup(tokenizer, lambda: new_model(shape), objectives, rows, {Task.SFT: held_out})


def _tokenizer(config: PretrainConfig, documents: Sequence[Document]) -> Any:
    if config.tokenizer is None:
        return train_tokenizer(texts_of(documents), config.vocab_size)
    if config.tokenizer_is_bare:
        return bare_tokenizer(Path(config.tokenizer), config.eos_token)
    return load_tokenizer(ModelArguments(model_name_or_path=config.tokenizer))


def read_parts(config: PretrainConfig) -> tuple[list[Document], list[Document]]:
    """Documents to train on and to hold out."""
    data, seed = config.run.data, config.run.training.seed
    if config.embedded:
        train_part, held_out = embedded_documents(seed)
        return train_part[: data.max_train_rows], held_out[: data.max_eval_rows]
    documents = read_documents(
        config.texts,
        split=config.texts_split,
        column=config.text_column,
        limit=data.max_train_rows,
    )
    if not config.eval_texts:
        train_part, held_out = split_documents(documents, data.held_out, seed)
        return train_part, held_out[: data.max_eval_rows]
    return documents, read_documents(
        config.eval_texts,
        split=config.eval_texts_split,
        column=config.text_column,
        limit=data.max_eval_rows,
    )


def table(summary: dict[str, Any]) -> str:
    """The result in a terminal."""
    held_out, perplexity = summary["held_out"], summary["perplexity"]
    lines = ["", f"{'held-out':<26}{'before':>12}{'after':>12}"]
    losses = [held_out[moment]["sft_loss"] for moment in ("before", "after")]
    for name, cells in (("loss (nats/token)", losses), ("perplexity", perplexity.values())):
        lines.append(f"{name:<26}" + "".join(f"{cell:>12.4g}" for cell in cells))
    lines.append(
        f"{summary['parameters']:,} parameters, {summary['steps']['sft']} steps, "
        f"{summary['tokens']['sft']:,} tokens, {summary['seconds']['total']:.1f} s"
    )
    return "\n".join(lines)


def card(config: PretrainConfig, summary: dict[str, Any]) -> str:
    """README.md of the model: what it was trained on and what came out."""
    training, rows, perplexity = config.run.training, summary["rows"], summary["perplexity"]
    texts = ", ".join(config.texts) or "generated texts"
    tokenizer = config.tokenizer or "a byte-level BPE trained on the texts"
    lines = [
        *("---", "library_name: transformers", "tags: [pretraining, joint-sft-dpo]", "---", ""),
        f"# GPT-NeoX with {summary['parameters']:,} parameters, trained from scratch",
        "",
        f"Texts: {texts} ({rows['sft train']['kept']} documents); tokenizer: {tokenizer}.",
        f"{summary['steps']['sft']} steps, {summary['tokens']['sft']} tokens, seed "
        f"{training.seed}, peak learning rate {training.learning_rate:g}.",
        "",
        f"Held-out perplexity per token ({rows['sft held-out']['kept']} documents): "
        f"{perplexity['before']:.4g} before, {perplexity['after']:.4g} after.",
    ]
    return "\n".join([*lines, ""])


def _record(config: PretrainConfig) -> dict[str, Any]:
    """Every setting, as plain data: what `llm.run` records, and the texts and the shape."""
    data = {name: value for name, value in asdict(config.run.data).items() if name in DATA_FLAGS}
    return record_of(config.run.training, pretrain=config.to_json(), data=data)


if __name__ == "__main__":
    run_command(main, PROG)
