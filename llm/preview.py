"""Show rows as the trainer sees them: every token, and whether it is trained on.

    python -m llm.preview                                  # the embedded corpus
    python -m llm.preview --rows 2 --config my_run.yaml    # any flags of llm.run
    python -m llm.preview --json true ...                  # one JSON object a row, for scripts

Nothing is trained and no weights are loaded. Data that `llm.run` would refuse, by
`--max_dropped_share` and the like, are refused here too, after their rows are shown.

With `--json true` every raw row is one object, in the order of its source: `objective`, `part`
(train or held-out), `row` (its number in the source, from 0), `prompt` (the text in front of the
first answer that is trained on), `responses` (the texts that are trained on, one for each stretch
of tokens; for a pair chosen, then rejected), `dropped` (null, or why the row is not used) and
`unused_columns`. The last object has `summary`: for each data set its `DropReport`. What is said
beside them goes to stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from llm.data import embedded
from llm.data.checks import check_max_length, with_leaks_noted
from llm.data.encode import Encoded, check_rows, encode, what_became
from llm.data.formats import BY_WISH, PREFERENCE_ROWS, SFT_ROWS
from llm.flags.arguments import RunConfig
from llm.flags.parse import parse
from llm.model.load import load_config
from llm.setup import check_data, date_of_run, encoding_options, read_data
from theory.cli import OneLineParser, positive_int, run_command
from theory.tasks import Task

PROG = "python -m llm.preview"
KINDS = {Task.DPO: PREFERENCE_ROWS, Task.SFT: SFT_ROWS}


def main(argv: Sequence[str] | None = None) -> None:
    own = OneLineParser(prog=PROG, add_help=False)
    own.add_argument("--rows", type=positive_int, help="rows of each data set to show [1; all]")
    own.add_argument("--json", choices=("true", "false"), default="false", help="JSON for scripts")
    arguments, rest = own.parse_known_args(sys.argv[1:] if argv is None else argv)
    config, as_json = parse(rest), arguments.json == "true"
    tokenizer, encoded = encode_rows(config, _say_aside if as_json else print)
    if as_json:
        for task in dict.fromkeys(task for task, _, _ in encoded):
            parts = [(name, part) for each, name, part in encoded if each is task]
            for row in list_rows(task, parts, tokenizer, arguments.rows):
                print(json.dumps(row))
    else:
        for _, _, part in encoded:
            for number, row in enumerate(part.rows[: arguments.rows or 1]):
                print("\n".join(("", *lines(part, number, row, tokenizer))))
    if as_json:
        print(json.dumps({"summary": {part.name: part.report.to_json() for _, _, part in encoded}}))
    for _, name, part in encoded:
        if name == "train" or not part.report.dropped.keys() <= set(BY_WISH):
            check_rows(part)
    check_data(config, [{task: part} for task, _, part in encoded])


def _say_aside(line: str) -> None:
    print(line, file=sys.stderr)


def encode_rows(config: RunConfig, say: Any) -> tuple[Any, list[tuple[Task, str, Encoded]]]:
    """The tokenizer, and (objective, part, encoded rows) of all data, also if no row is left."""
    tokenizer, raw = read_data(config, say)
    model_config = (
        embedded.build_model(tokenizer).config if config.embedded else load_config(config.model)
    )
    parts = []
    today = date_of_run(config, tokenizer, say, keep=False)
    for task, sets in raw.items():
        length = check_max_length(config.max_length(task), model_config, tokenizer)
        options = encoding_options(config, task, length, today)
        train, held_out = (
            encode(rows, tokenizer, KINDS[task], **options, name=f"{task.label} {part}")
            for rows, part in zip(sets, ("train", "held-out"), strict=True)
        )
        parts += [(task, "train", train), (task, "held-out", with_leaks_noted(held_out, train))]
    for _, _, part in parts:
        say(part.report.line(part.name))
    return tokenizer, parts


def list_rows(
    objective: Task,
    parts: Sequence[tuple[str, Encoded]],
    tokenizer: Any,
    limit: int | None = None,
) -> Iterator[dict[str, Any]]:
    """What became of every raw row of the parts of an objective, in the order of its source."""
    fates = [(fate, part) for part in parts for fate in what_became(part[1])]
    fates.sort(key=lambda each: each[0].number)
    for fate, (name, encoded) in fates[:limit]:
        rows = [encoded.rows[place] for place in fate.places]
        yield {
            "objective": objective.label,
            "part": name,
            "row": fate.number,
            "prompt": tokenizer.decode([*rows[0]["prompt_ids"]]) if rows else None,
            "responses": [text for each in rows for text in responses(each, tokenizer)],
            "dropped": fate.dropped,
            "unused_columns": list(fate.unused),
        }


def responses(row: Mapping[str, Any], tokenizer: Any) -> list[str]:
    """The texts of a row that are trained on, one for each stretch of tokens."""
    texts = []
    for name in _names(row):
        ids = row[f"{name}_ids"]
        mask = row.get(f"{name}_mask", [1] * len(ids))
        pairs = groupby(zip(mask, ids, strict=True), key=lambda pair: pair[0])
        texts += [tokenizer.decode([token for _, token in group]) for on, group in pairs if on]
    return texts


def _names(row: Mapping[str, Any]) -> list[str]:
    keys = [key for key in row if key.endswith("_ids") and key != "prompt_ids"]
    return [key.removesuffix("_ids") for key in keys]


def lines(encoded: Encoded, number: int, row: Mapping[str, Any], tokenizer: Any) -> Iterator[str]:
    """One block per sequence: position, id, text and a mark on the tokens that are trained on."""
    for name in _names(row):
        prompt, response = row["prompt_ids"], row[f"{name}_ids"]
        trained = [0] * len(prompt) + list(row.get(f"{name}_mask", [1] * len(response)))
        yield f"{encoded.name}, row {number}, {name}: {len(prompt)} + {len(response)} tokens"
        for position, token in enumerate([*prompt, *response]):
            mark = "trained" if trained[position] else ""
            text = repr(tokenizer.decode([token]))
            yield f"{position:>6}  {token:>7}  {text:<24}  {mark}".rstrip()


if __name__ == "__main__":
    run_command(main, PROG)
