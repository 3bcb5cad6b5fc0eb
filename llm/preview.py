"""Show rows as the trainer sees them: every token, and whether it is trained on.

    python -m llm.preview                                  # the embedded corpus
    python -m llm.preview --rows 2 --config my_run.yaml    # any flags of llm.run

Nothing is trained and no weights are loaded. Data that `llm.run` would refuse, by
`--max_dropped_share` and the like, are refused here too, after their rows are shown.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llm.data import embedded
from llm.data.encode import Encoded
from llm.flags.parse import parse
from llm.model.load import load_config
from llm.setup import check_data, encode_data, read_data
from theory.cli import OneLineParser, positive_int, run_command

PROG = "python -m llm.preview"


def main(argv: Sequence[str] | None = None) -> None:
    own = OneLineParser(prog=PROG, add_help=False)
    own.add_argument("--rows", type=positive_int, default=1, help="rows of each data set to show")
    arguments, rest = own.parse_known_args(sys.argv[1:] if argv is None else argv)
    config = parse(rest)
    tokenizer, raw = read_data(config, print)
    model_config = (
        embedded.build_model(tokenizer).config if config.embedded else load_config(config.model)
    )
    parts = encode_data(config, tokenizer, raw, model_config, print)
    for encoded in parts[0].values():
        for number, row in enumerate(encoded.rows[: arguments.rows]):
            print("\n".join(("", *lines(encoded, number, row, tokenizer))))
    check_data(config, parts)


def lines(encoded: Encoded, number: int, row: Mapping[str, Any], tokenizer: Any) -> Iterator[str]:
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


if __name__ == "__main__":
    run_command(main, PROG)
