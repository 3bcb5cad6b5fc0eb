"""The command line: which texts, tokenizer and size; the rest are flags of `llm.run`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from llm.arguments import DataArguments, ModelArguments
from llm.config import JointArguments, RunConfig, as_flags, named_flags
from llm.config import parse as parse_run
from llm.formats import is_missing_file
from llm.pretrain.model import END, SIZES, Size
from theory.cli import OneLineParser, UserError, positive_int

PROG = "python -m llm.pretrain"
RECIPES = Path(__file__).parents[1] / "recipes"
RECIPE, EMBEDDED_RECIPE = RECIPES / "pretrain.yaml", RECIPES / "pretrain-tiny.yaml"
"""Beneath every run: the optimiser as Pythia's. Without texts of one's own: the small default."""
SHAPE = tuple(field.name for field in fields(Size) if field.name != "learning_rate")
DATA_FLAGS = {"max_train_rows", "max_eval_rows", "max_length", "held_out"}
UNUSED = {field.name for kind in (ModelArguments, DataArguments) for field in fields(kind)}
UNUSED = (UNUSED - DATA_FLAGS) | {"algo", "optima"}
"""Flags of llm.run that mean nothing here; it refuses those of preferences and schedules itself."""


@dataclass(frozen=True)
class PretrainConfig:
    """One validated command line; `run` holds transformers' flags and the data's."""

    texts: tuple[str, ...]
    eval_texts: tuple[str, ...]
    texts_split: str
    eval_texts_split: str
    text_column: str
    tokenizer: str | None
    eos_token: str
    vocab_size: int
    size: Size
    run: RunConfig

    @property
    def embedded(self) -> bool:
        """Without texts of one's own: the generated corpus."""
        return not self.texts

    @property
    def tokenizer_is_bare(self) -> bool:
        """A tokenizer.json by itself, without transformers' configuration next to it."""
        return is_bare(self.tokenizer)

    def to_json(self) -> dict[str, Any]:
        """What decides the result and is no flag of `llm.run`; only what was used."""
        own: dict[str, Any] = {"size": {name: getattr(self.size, name) for name in SHAPE}}
        own["texts"] = list(self.texts)
        if self.texts:
            own |= {"texts_split": self.texts_split, "text_column": self.text_column}
        if self.eval_texts:
            own["eval_texts"] = list(self.eval_texts)
            own["eval_texts_split"] = self.eval_texts_split
        if self.tokenizer is None:
            return own | {"vocab_size": self.vocab_size}
        end = {"eos_token": self.eos_token} if self.tokenizer_is_bare else {}
        return own | {"tokenizer": self.tokenizer} | end


def parse(argv: Sequence[str]) -> PretrainConfig:
    """Read our own flags and the shared ones; in rising order: recipes, --config, command line."""
    parser = _parser()
    first, _ = parser.parse_known_args(argv)
    known = {action.dest for action in parser._actions}
    known |= {f.name for kind in (DataArguments, JointArguments) for f in fields(kind)}
    user = [*as_flags(Path(first.config) if first.config else None, known), *argv]
    recipes = [RECIPE] if "texts" in named_flags(user) else [RECIPE, EMBEDDED_RECIPE]
    defaults = [token for recipe in recipes for token in as_flags(recipe, known)]
    own, rest = parser.parse_known_args([*defaults, *user])
    named = named_flags(user)
    _check_own(own, named)
    size = _size(own)
    run = parse_run(_run_argv(own, rest, size))
    return PretrainConfig(
        texts=tuple(own.texts),
        eval_texts=tuple(own.eval_texts),
        texts_split=own.texts_split,
        eval_texts_split=own.eval_texts_split,
        text_column=own.text_column,
        tokenizer=own.tokenizer,
        eos_token=own.eos_token,
        vocab_size=own.vocab_size,
        size=size,
        run=run,
    )


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog=PROG,
        description="Pretrain a language model of Pythia's shape from scratch. Also takes the "
        "flags of llm.run that belong to training: --max_steps, --learning_rate, --max_length, ...",
    )
    add = parser.add_argument
    add("--texts", nargs="+", default=[], help="files, directories or hub ids (else: generated)")
    add("--eval_texts", nargs="+", default=[], help="held-out texts; default: a share --held_out")
    add("--texts_split", default="train", help="which split of the texts")
    add("--eval_texts_split", default="train", help="which split of the held-out texts")
    add("--text_column", default="text", help="column of plain text; else prompts and answers")
    add("--tokenizer", help="directory, hub id or tokenizer.json; default: trained on the texts")
    add("--eos_token", default=END, help="what ends a text, for a tokenizer.json alone")
    add("--vocab_size", type=positive_int, default=4096, help="of a trained byte-level BPE")
    add("--size", choices=list(SIZES), default="tiny", help="shape of the model")
    for name in SHAPE:
        add(f"--{name}", type=positive_int, help="instead of that of --size")
    add("--config", help="YAML file with values for any of these flags")
    return parser


def _check_own(own: argparse.Namespace, named: set[str]) -> None:
    unused = sorted(named & UNUSED)
    if unused:
        raise UserError(f"--{unused[0]} is not used when a model is trained from scratch")
    if own.tokenizer is not None and "vocab_size" in named:
        raise UserError("--vocab_size is not used with --tokenizer, which has its own")
    if "eos_token" in named and not is_bare(own.tokenizer):
        raise UserError("--eos_token is not used without a tokenizer.json as --tokenizer")
    if not own.texts:
        given = {"eval_texts", "texts_split", "eval_texts_split", "text_column", "held_out"} & named
        if given:
            raise UserError(f"--{min(given)} is not used without --texts")
    if "eval_texts_split" in named and not own.eval_texts:
        raise UserError("--eval_texts_split is not used without --eval_texts")
    if "held_out" in named and own.eval_texts:
        raise UserError("--held_out is not used: --eval_texts names the texts to hold out")
    for flag in ("texts", "eval_texts"):
        for source in getattr(own, flag):
            if is_missing_file(source):
                raise UserError(f"--{flag} {source} does not exist")
    if own.texts_split == own.eval_texts_split:
        shared = sorted(set(own.texts) & set(own.eval_texts))
        if shared:
            raise UserError(f"--eval_texts {shared[0]} is trained on")


def is_bare(tokenizer: str | None) -> bool:
    return tokenizer is not None and Path(tokenizer).suffix == ".json"


def _size(own: argparse.Namespace) -> Size:
    given = {name: getattr(own, name) for name in SHAPE if getattr(own, name) is not None}
    if "hidden_size" in given:
        given.setdefault("intermediate_size", 4 * given["hidden_size"])
    return replace(SIZES[own.size], **given)


def _run_argv(own: argparse.Namespace, rest: Sequence[str], size: Size) -> list[str]:
    """As a run of `llm.run` on demonstrations: its checks of the shared flags hold here too.

    It wants a model and data named; they are read here, so any names will do."""
    stand_ins = ["--model_name_or_path", f"new {own.size}", "--sft_dataset", "texts"]
    rate = ["--learning_rate", f"{size.learning_rate:g}"]
    return ["--output_dir", "runs/pretrain", *rate, *rest, "--algo", "sft", *stand_ins]
