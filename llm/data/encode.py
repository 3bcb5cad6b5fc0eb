"""Token ids of both objectives: tokenise, truncate, count what was cut and dropped.

    rows = load_rows("pairs.jsonl")                                  # raw columns, see `formats`
    encoded = encode_preference(rows, tokenizer, max_length=512, name="dpo_data")
    print(encoded.report.line(encoded.name))                         # what was cut and dropped
    batch = collate_preference(encoded.rows[:8], pad_token_id=0)     # tensors, `llm.loss.collate`

Every row is kept or dropped for a counted reason; nothing is trained on silently.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2.exceptions import TemplateError
from tqdm.auto import tqdm

from llm.data.formats import (
    EMPTY_PROMPT,
    EMPTY_RESPONSE,
    PREFERENCE_ROWS,
    SFT_ROWS,
    DataError,
    Row,
    RowError,
    RowKind,
    Rows,
    check_columns,
    common_prefix,
    in_batches,
    one_line,
    prompt_and_responses,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REFUSED_BY_TEMPLATE = "refused by the chat template"
NO_RESPONSE_LEFT = "no response token left by truncation"
EQUAL_RESPONSES = "chosen equals rejected"
# Notes count rows that are kept although something about them deserves a look.
TEMPLATE_NOT_PREFIX = "chat template: prompt is not a prefix"
TOKENS_MERGE = "tokens merge across the end of the prompt"

TRUNCATION_MODES = ("keep_end", "keep_start")


@dataclass(frozen=True)
class DropReport:
    """What became of the rows of one data set: total == kept + sum(dropped.values()).

    `truncated` counts kept rows that lost tokens; `notes` counts kept rows worth a look.
    """

    total: int
    kept: int
    truncated: int
    dropped: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    def line(self, name: str) -> str:
        """One printable line for the data set called `name`."""
        parts = [f"{name}: {self.kept} of {self.total} rows kept", f"{self.truncated} truncated"]
        parts += [f"{count} dropped ({reason})" for reason, count in self.dropped.items()]
        parts += [f"{count} noted ({note})" for note, count in self.notes.items()]
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON record."""
        return asdict(self)


@dataclass(frozen=True)
class Encoded:
    """Token ids of one data set: `prompt_ids` and `completion_ids` (SFT) or `chosen_ids` and
    `rejected_ids` (preference) in every row, never empty, never beyond the maximum length.

    The ids of a text are an `array("i")`: a sequence of ints in 4 bytes each, where a list of
    Python's integers takes up to 36."""

    rows: list[dict[str, Any]]
    name: str
    report: DropReport


def encode_sft(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    truncation_mode: str = "keep_end",
    name: str,
) -> Encoded:
    """Tokenise and truncate rows of any format of `sft_fields`.

    The whole text is tokenised and the response begins where it departs from the tokens of the
    prompt alone, as in TRL: so prompt_ids + response_ids is what the model would see at inference,
    also where a token spans the boundary (counted in the notes; the token belongs to the response).
    Text gets the special tokens of the tokenizer and one EOS at its end; messages get what the
    chat template writes. A second BOS is removed.

    Truncation, in tokens: "keep_end" cuts the start of the prompt (behind BOS) to make room for
    the response and cuts the end of a response only if that is not enough; a prompt token always
    stays. "keep_start" cuts the end of the whole, as TRL does by default.

    Args:
        rows: a `datasets.Dataset` or a list of dicts.
        tokenizer: of transformers; it needs an EOS token.
        max_length: tokens of prompt and response together, at least 2 (`llm.data.checks`).
        truncation_mode: "keep_end" or "keep_start".
        name: of the data set, for messages.

    Raises:
        DataError: unknown format; no chat template for messages; no row left.
    """
    return _encode(rows, tokenizer, SFT_ROWS, max_length, truncation_mode, name)


def encode_preference(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    truncation_mode: str = "keep_end",
    name: str,
) -> Encoded:
    """Tokenise and truncate rows of any format of `preference_fields`.

    As `encode_sft`. Both responses continue the same `prompt_ids` (their common part, where the
    tokens of the boundary differ); "keep_end" makes room for the longer one. Pairs whose responses
    have the same tokens in the end are dropped: their margin and gradient are zero.
    """
    return _encode(rows, tokenizer, PREFERENCE_ROWS, max_length, truncation_mode, name)


def _encode(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    kind: RowKind,
    max_length: int,
    truncation_mode: str,
    name: str,
) -> Encoded:
    if truncation_mode not in TRUNCATION_MODES:
        raise DataError(
            f"truncation_mode is {truncation_mode!r}; it must be {' or '.join(TRUNCATION_MODES)}"
        )
    if max_length < 2:
        raise DataError(f"max_length is {max_length}; prompt and response need at least 2 tokens")
    if tokenizer.eos_token_id is None:
        raise DataError(f"{name}: the tokenizer has no eos_token, so responses would have no end")
    check_columns(rows, kind, name)
    encoder = _RowEncoder(kind, tokenizer, max_length, truncation_mode, name)
    # The bar appears only if the work takes more than a second.
    with tqdm(total=len(rows), desc=f"tokenise {name}", unit="row", delay=1, leave=False) as bar:
        for batch in in_batches(rows):
            encoder.add(batch)
            bar.update(len(batch))
    return encoder.finish()


@dataclass(frozen=True)
class _Text:
    """A row as the text to tokenise: the prompt, and the prompt followed by each response."""

    prompt: str
    wholes: list[str]
    is_chat: bool


@dataclass
class _RowEncoder:
    """Takes batches of raw rows; keeps the encoded ones and counts the others."""

    kind: RowKind
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    truncation_mode: str
    name: str
    total: int = 0
    truncated: int = 0
    kept: list[dict[str, array[int]]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, batch: Sequence[Row]) -> None:
        texts = []
        for row in batch:
            self.total += 1
            try:
                texts.append(self._text(row))
            except RowError as error:
                self.dropped[error.reason] += 1
            except DataError as error:
                raise DataError(f"{self.name} row {self.total - 1}: {error}") from error
        # Rendered templates bring their own special tokens, plain text gets the tokenizer's.
        for is_chat, group in groupby(texts, key=lambda text: text.is_chat):
            self._add_texts(list(group), is_chat)

    def finish(self) -> Encoded:
        report = DropReport(
            self.total, len(self.kept), self.truncated, dict(self.dropped), dict(self.notes)
        )
        if not self.kept:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
            raise DataError(f"{self.name}: none of {self.total} rows can be used: {reasons}")
        return Encoded(self.kept, self.name, report)

    def _text(self, row: Row) -> _Text:
        prompt, responses = prompt_and_responses(row, self.kind)
        if isinstance(prompt, str):
            return _Text(prompt, [prompt + response for response in responses], is_chat=False)
        wholes = [self._render(prompt + response) for response in responses]
        return _Text(self._render(prompt, add_generation_prompt=True), wholes, is_chat=True)

    def _render(self, messages: list[Any], *, add_generation_prompt: bool = False) -> str:
        if not self.tokenizer.chat_template:
            raise DataError(
                "the row holds messages but the tokenizer has no chat template; set "
                "tokenizer.chat_template or give plain text"
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except TemplateError as error:
            raise RowError(REFUSED_BY_TEMPLATE, one_line(error)) from error

    def _add_texts(self, texts: list[_Text], is_chat: bool) -> None:
        columns = [[text.prompt for text in texts]]
        columns += [[text.wholes[i] for text in texts] for i in range(len(texts[0].wholes))]
        prompts, *wholes = (self._tokenize(column, is_chat) for column in columns)
        for prompt, row_wholes in zip(prompts, zip(*wholes, strict=True), strict=True):
            try:
                self._add_ids(prompt, row_wholes, is_chat)
            except RowError as error:
                self.dropped[error.reason] += 1

    def _tokenize(self, texts: list[str], is_chat: bool) -> list[list[int]]:
        ids = self.tokenizer(
            texts, add_special_tokens=not is_chat, return_attention_mask=False, verbose=False
        )["input_ids"]
        bos = self.tokenizer.bos_token_id
        return [_with_one_bos(row, bos) for row in ids]

    def _add_ids(self, prompt: list[int], wholes: Sequence[list[int]], is_chat: bool) -> None:
        eos = self.tokenizer.eos_token_id
        if not is_chat:
            # On the ids, so that it holds whether or not the tokenizer reads EOS in a text.
            wholes = [ids if ids[-1] == eos else [*ids, eos] for ids in wholes]
        length = min(common_prefix(prompt, ids) for ids in wholes)
        if length == 0:
            raise RowError(EMPTY_PROMPT, "no token of the prompt survives in the whole")
        responses = [ids[length:] for ids in wholes]
        if not all(responses):
            raise RowError(EMPTY_RESPONSE, "no token")
        kept = self._truncate(prompt[:length], responses)
        self.truncated += kept != [prompt[:length], *responses]
        if length < len(prompt):
            self.notes[TEMPLATE_NOT_PREFIX if is_chat else TOKENS_MERGE] += 1
        keys = ("prompt_ids", *(f"{key}_ids" for key in self.kind.responses))
        self.kept.append(dict(zip(keys, (array("i", ids) for ids in kept), strict=True)))

    def _truncate(self, prompt: list[int], responses: list[list[int]]) -> list[list[int]]:
        cut = _keep_end if self.truncation_mode == "keep_end" else _keep_start
        prompt, *responses = cut(prompt, responses, self.max_length, self.tokenizer.bos_token_id)
        if not all(responses):
            raise RowError(NO_RESPONSE_LEFT, f"the prompt alone fills max_length {self.max_length}")
        if len(responses) == 2 and responses[0] == responses[1]:
            raise RowError(EQUAL_RESPONSES, "the pair prefers nothing")
        return [prompt, *responses]


def _with_one_bos(ids: list[int], bos: int | None) -> list[int]:
    """Prompts that spell out BOS, and a tokenizer that adds it, would give two."""
    start = 0
    while bos is not None and ids[start : start + 2] == [bos, bos]:
        start += 1
    return ids[start:]


def _keep_end(
    prompt: list[int], responses: list[list[int]], max_length: int, bos: int | None
) -> list[list[int]]:
    has_bos = prompt[0] == bos
    # BOS alone is no prompt: one token behind it stays too, if max_length has room for it.
    least = min(len(prompt), 1 + has_bos, max_length - 1)
    responses = [response[: max_length - least] for response in responses]
    room = max_length - max(map(len, responses))
    if len(prompt) > room:
        tail = room - has_bos
        # The text may hold a BOS of its own where the cut falls.
        prompt = _with_one_bos(prompt[: int(has_bos)] + prompt[len(prompt) - tail :], bos)
    return [prompt, *responses]


def _keep_start(
    prompt: list[int], responses: list[list[int]], max_length: int, bos: int | None
) -> list[list[int]]:
    room = max(0, max_length - len(prompt))
    return [prompt[:max_length], *(response[:room] for response in responses)]


def fingerprint(encoded: Encoded) -> str:
    """sha256 (hex) over the token ids in order: equal data, equal digest, on every platform."""
    return fingerprint_rows(encoded.rows)


def fingerprint_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """`fingerprint` of encoded rows."""
    digest = hashlib.sha256()
    for row in rows:
        _add_row(digest, row)
    return digest.hexdigest()


def _add_row(digest: hashlib._Hash, row: Mapping[str, Any]) -> None:
    for key in sorted(key for key in row if key.endswith("_ids")):
        # The length separates neighbours; fixed width and byte order fix the platform.
        digest.update(f"{key}:{len(row[key])};".encode())
        digest.update(np.asarray(row[key], dtype="<i4").tobytes())
