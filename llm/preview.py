"""Show rows as the trainer sees them: every token, and whether it is trained on.

    python -m llm.preview                                  # the embedded corpus
    python -m llm.preview --rows 2 --config my_run.yaml    # any flags of llm.run

Nothing is trained and no weights are loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import AutoConfig

from llm import embedded
from llm.config import RunConfig, parse
from llm.data import Encoded
from llm.setup import encode_data, read_data
from theory.cli import OneLineParser, positive_int, run_command

PROG = "python -m llm.preview"


def main(argv: Sequence[str] | None = None) -> None:
    own = OneLineParser(prog=PROG, add_help=False, allow_abbrev=False)
    own.add_argument("--rows", type=positive_int, default=1, help="rows of each data set to show")
    arguments, rest = own.parse_known_args(sys.argv[1:] if argv is None else argv)
    config = parse(rest)
    tokenizer, raw = read_data(config, print)
    train, _ = encode_data(config, tokenizer, raw, _model_config(config, tokenizer), print)
    for encoded in train.values():
        for number, row in enumerate(encoded.rows[: arguments.rows]):
            print("\n".join(("", *lines(encoded, number, row, tokenizer))))


def lines(
    encoded: Encoded, number: int, row: dict[str, list[int]], tokenizer: Any
) -> Iterator[str]:
    """One block per sequence: position, id, text and a mark on the tokens that are trained on."""
    responses = [key for key in row if key.endswith("_ids") and key != "prompt_ids"]
    for key in responses:
        prompt, response = row["prompt_ids"], row[key]
        name = key.removesuffix("_ids")
        yield f"{encoded.name}, row {number}, {name}: {len(prompt)} + {len(response)} tokens"
        for position, token in enumerate(prompt + response):
            trained = "trained" if position >= len(prompt) else ""
            text = repr(tokenizer.decode([token]))
            yield f"{position:>6}  {token:>7}  {text:<24}  {trained}".rstrip()


def _model_config(config: RunConfig, tokenizer: Any) -> Any:
    if config.embedded:
        return embedded.build_model(tokenizer).config
    arguments = config.model
    name: Any = arguments.model_name_or_path
    return AutoConfig.from_pretrained(
        name,
        revision=arguments.model_revision,
        trust_remote_code=arguments.trust_remote_code,
    )


if __name__ == "__main__":
    run_command(main, PROG)
