"""What is refused before any training: lengths beyond the model, data sets that lose their rows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from llm.data.encode import Encoded
from llm.data.errors import DataError
from llm.data.formats import BY_WISH

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

DEFAULT_MAX_LENGTH = 1024
LEAKED = "identical to a training row"
"""The note on held-out rows that are trained on as well."""


def check_max_length(
    max_length: int | None, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> int:
    """The maximum length in tokens to use with a model.

    Args:
        max_length: as the user gave it; None means min(positions of the model, 1024).
        model_config: its `max_position_embeddings` is the number of positions; where it has none
            (no absolute limit), the tokenizer's `model_max_length` counts if it is a real number.
        tokenizer: see above.

    Raises:
        DataError: below 2, or beyond the positions.
    """
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if positions is None and tokenizer.model_max_length < 10**9:  # transformers' "unknown": 10^30
        positions = int(tokenizer.model_max_length)
    if max_length is None:
        return DEFAULT_MAX_LENGTH if positions is None else min(positions, DEFAULT_MAX_LENGTH)
    if max_length < 2:
        raise DataError(f"max_length is {max_length}; prompt and response need at least 2 tokens")
    if positions is not None and max_length > positions:
        raise DataError(f"max_length is {max_length} but the model has only {positions} positions")
    return max_length


def with_leaks_noted(held_out: Encoded, train: Encoded) -> Encoded:
    """`held_out` with a note on how many of its rows have the tokens of a training row."""
    leaked = int(np.isin(held_out.digests(), train.digests()).sum())
    if not leaked:
        return held_out
    notes = held_out.report.notes | {LEAKED: leaked}
    return replace(held_out, report=replace(held_out.report, notes=notes))


def check_shares(
    encoded: Encoded, *, max_dropped: float, max_truncated: float, max_leaked: float
) -> None:
    """Refuse a data set of which too large a share was dropped, truncated or leaked.

    The share of dropped rows is of all rows, the other two are of the kept ones.

    Raises:
        DataError: naming the counts by reason and the flag that would accept them.
    """
    report = encoded.report
    leaked = report.notes.get(LEAKED, 0)
    dropped = sum(n for reason, n in report.dropped.items() if reason not in BY_WISH)
    for name, count, total, limit in (
        ("dropped", dropped, report.total, max_dropped),
        ("truncated", report.truncated, report.kept, max_truncated),
        ("leaked", leaked, report.kept, max_leaked),
    ):
        if count > limit * total:
            raise DataError(
                f"{report.line(encoded.name)}: {count} of {total} {name} is more than "
                f"--max_{name}_share {limit:g}"
            )
