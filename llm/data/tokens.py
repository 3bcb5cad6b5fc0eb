"""Texts to token ids: prompt, answers and which of their tokens are trained on, cut to length."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llm.data.errors import RowError, quote
from llm.data.formats import EMPTY_PROMPT, EMPTY_RESPONSE
from llm.data.messages import Rendered
from llm.data.pairs import common_prefix

NO_RESPONSE_LEFT = "no response token left by truncation"
PART_LOST = "answer of a kept row lost to truncation"
EQUAL_RESPONSES = "chosen equals rejected"
EQUAL_AFTER_TRUNCATION = "chosen equals rejected once truncated"
TOKENS_MERGE = "tokens merge across the end of the prompt"
TRUNCATION_MODES = ("keep_end", "keep_start")


@dataclass(eq=False)
class Item:
    """Texts that become one encoded row: one, or a pair behind the same prompt."""

    texts: tuple[Rendered, ...]
    is_chat: bool
    is_document: bool = False
    notes: tuple[str, ...] = ()

    @cached_property
    def prompt(self) -> str:
        """What all texts begin with, at most up to their first answers."""
        prompts = [text.prompt for text in self.texts]
        return prompts[0][: min(common_prefix(prompts[0], other) for other in prompts)]

    @property
    def is_plain(self) -> bool:
        """Whether everything behind the prompt is trained on."""
        start = len(self.prompt)
        return all(text.spans == ((start, len(text.text)),) for text in self.texts)


@dataclass
class Pieces:
    """Token ids of one item. A mask that is None is all ones."""

    prompt: list[int]
    responses: list[list[int]]
    masks: list[list[int] | None]
    notes: list[str] = field(default_factory=list)
    is_truncated: bool = False
    is_cut: bool = False
    """Truncated in a response, and not only in the prompt."""


class Tokens:
    """Tokenises batches of items.

    The whole text is tokenised and the response begins where it departs from the tokens of the
    prompt alone, as in TRL: so prompt + response is what the model would see at inference, also
    where a token spans the boundary (noted; the token belongs to the response). Behind the prompt
    a token is trained on if it ends in an answer. Text gets the special tokens of the tokenizer and
    one EOS at its end; messages get what the chat template writes. A second BOS is removed.
    """

    def __init__(self, tokenizer: Any, max_length: int, truncation_mode: str) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.cut = _keep_end if truncation_mode == "keep_end" else _keep_start
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        self.parts_at_spaces = parts_at_spaces(tokenizer)
        self._marks = _isolated(tokenizer)
        self._known: dict[str, list[int]] = {"": []}

    def encode(self, items: Sequence[Item]) -> list[Pieces | RowError]:
        """The pieces of each item, or why there are none."""
        cuts = [self._last_part(item.prompt) for item in items]
        texts: list[tuple[str, bool]] = []
        for item, cut in zip(items, cuts, strict=True):
            # The prompt once, up to a place where tokens part; what follows it, for each text.
            special = not item.is_chat
            texts.append((item.prompt[:cut], special))
            texts.append((item.prompt[cut:], special and not cut))
            texts += [(text.text[cut:], special and not cut) for text in item.texts]
        ids = iter(self._tokenize(texts))
        pieces = []
        for item, cut in zip(items, cuts, strict=True):
            head = next(ids) * bool(cut)
            prompt, *wholes = (self._whole(head, next(ids)) for _ in range(1 + len(item.texts)))
            pieces.append(self._pieces(item, prompt, wholes))
        return pieces

    def _last_part(self, prompt: str) -> int:
        """The last place where tokens part for certain: a word behind a word, or a special token;
        0 if there is none."""
        if not self.parts_at_spaces:
            return 0
        mark = max((prompt.rfind(token) for token in self._marks), default=-1)
        found = _WORDS.match(prompt, max(0, mark))
        return found.end() if found else max(0, mark)

    def _whole(self, head: list[int], tail: list[int]) -> list[int]:
        return _with_one_bos(head + tail, self.tokenizer.bos_token_id)

    def _tokenize(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Ids of (text, whether the tokenizer adds its special tokens): a rendered template brings
        its own."""
        # The end of a rendered prompt is the same in most rows.
        ids = [self._known.get(text, []) if not special else [] for text, special in texts]
        for special in (True, False):
            chosen = [i for i, each in enumerate(texts) if each[1] == special and not ids[i]]
            chosen = [i for i in chosen if special or texts[i][0]]
            encoded = self._ids([texts[i][0] for i in chosen], special)
            for i, row in zip(chosen, encoded, strict=True):
                ids[i] = row
                if not special and len(texts[i][0]) <= _SHORT and len(self._known) < _MANY:
                    self._known[texts[i][0]] = row
        return ids

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        if self.tokenizer.is_fast:  # without what the tokenizer tells beside the ids
            backend = self.tokenizer.backend_tokenizer
            encodings = backend.encode_batch_fast(texts, add_special_tokens=special)
            return [encoding.ids for encoding in encodings]
        encoded = self.tokenizer(texts, add_special_tokens=special, verbose=False)
        return list(encoded["input_ids"])

    def _pieces(self, item: Item, prompt: list[int], wholes: list[list[int]]) -> Pieces | RowError:
        try:
            return self._checked(item, prompt, wholes)
        except RowError as error:
            return error

    def _checked(self, item: Item, prompt: list[int], wholes: list[list[int]]) -> Pieces:
        masks = None if item.is_plain else self._masks(item, wholes)
        eos = self.tokenizer.eos_token_id
        if not item.is_chat:
            # On the ids, so that it holds whether or not the tokenizer reads EOS in a text.
            wholes = [ids if ids[-1:] == [eos] else [*ids, eos] for ids in wholes]
        length = min(common_prefix(prompt, ids) for ids in wholes)
        if length == 0 and item.is_document:
            start = self.tokenizer.bos_token_id
            prompt, length = [eos if start is None else start], 1  # to predict the first token from
            wholes = [[*prompt, *ids] for ids in wholes]
            masks = None if masks is None else [[0, *mask] for mask in masks]
        if length == 0:
            raise RowError(EMPTY_PROMPT, f"no token of {quote(item.prompt)} stands by itself")
        responses = [ids[length:] for ids in wholes]
        if not all(responses):
            raise RowError(EMPTY_RESPONSE, f"no token after {quote(item.prompt)}")
        pieces = Pieces(prompt[:length], responses, [None] * len(responses))
        if masks is not None:
            pieces.masks = [
                _of_length(mask[length:], len(ids))
                for mask, ids in zip(masks, responses, strict=True)
            ]
            _drop_untrained_ends(pieces)
        if length < len(prompt):
            pieces.notes.append(TOKENS_MERGE)
        return self._truncated(item, pieces)

    def _masks(self, item: Item, wholes: list[list[int]]) -> list[list[int]]:
        """1 for the tokens of each text that end in an answer."""
        find = self._by_offsets if self.tokenizer.is_fast else self._by_prefixes
        return [find(*pair, item.is_chat) for pair in zip(item.texts, wholes, strict=True)]

    def _by_offsets(self, text: Rendered, ids: list[int], is_chat: bool) -> list[int]:
        encoded = self.tokenizer(
            text.text, add_special_tokens=not is_chat, return_offsets_mapping=True, verbose=False
        )
        ends = [end for _, end in encoded["offset_mapping"]][-len(ids) :]
        # What the tokenizer adds behind the text has no place in it and belongs to its end.
        ends = [end or (len(text.text) if i else 0) for i, end in enumerate(ends)]
        return [int(any(a < end <= b for a, b in text.spans)) for end in ends]

    def _by_prefixes(self, text: Rendered, ids: list[int], is_chat: bool) -> list[int]:
        edges = [(text.text[:edge], not is_chat) for span in text.spans for edge in span]
        counts = [common_prefix(self._whole([], each), ids) for each in self._tokenize(edges)]
        mask = [0] * len(ids)
        for start, end in zip(counts[::2], counts[1::2], strict=True):
            mask[start:end] = [1] * (end - start)
        return mask

    def _truncated(self, item: Item, pieces: Pieces) -> Pieces:
        equal = len(pieces.responses) == 2 and pieces.responses[0] == pieces.responses[1]
        if equal:
            raise RowError(
                EQUAL_RESPONSES, f"both are {quote(item.texts[0].text[len(item.prompt) :])}"
            )
        before = [pieces.prompt, *pieces.responses]
        if len(before[0]) + max(map(len, pieces.responses)) <= self.max_length:
            return pieces
        bos = self.tokenizer.bos_token_id
        pieces.prompt, *pieces.responses = self.cut(*before, max_length=self.max_length, bos=bos)
        pieces.masks = [
            mask if mask is None else mask[: len(ids)]
            for mask, ids in zip(pieces.masks, pieces.responses, strict=True)
        ]
        pieces.is_truncated = [pieces.prompt, *pieces.responses] != before
        pieces.is_cut = pieces.responses != before[1:]
        for ids, mask in zip(pieces.responses, pieces.masks, strict=True):
            if not ids or (mask is not None and not any(mask)):
                raise RowError(
                    NO_RESPONSE_LEFT,
                    f"{len(before[0])} tokens of {quote(item.prompt)} fill max_length "
                    f"{self.max_length}",
                )
        if len(pieces.responses) == 2 and pieces.responses[0] == pieces.responses[1]:
            raise RowError(
                EQUAL_AFTER_TRUNCATION,
                f"{' and '.join(str(len(ids)) for ids in before[1:])} tokens behind "
                f"{quote(item.prompt)} differ beyond max_length {self.max_length}",
            )
        return pieces


def parts_at_spaces(tokenizer: Any) -> bool:
    """Whether tokens always part between a letter and a space with a letter behind it, so that a
    text may be tokenised in two parts there: byte-level BPE on words, as of GPT-2 and Llama 3."""
    if not tokenizer.is_fast:
        return False
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    words, normal = (_types(state[key]) for key in ("pre_tokenizer", "normalizer"))
    added = [(token.content, token.rstrip) for token in tokenizer.added_tokens_decoder.values()]
    if state["model"]["type"] != "BPE" or not words <= {"Split", "ByteLevel", "Digits"}:
        return False
    if not normal <= {"NFC", "NFD", "NFKC", "NFKD"} or any(
        strips or _WORDS.match(content) for content, strips in added
    ):
        return False
    places = [
        place for _, place in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(_TRY)
    ]
    ids = (tokenizer(part, add_special_tokens=i < 2)["input_ids"] for i, part in enumerate(_TRIED))
    whole, head, tail = ids
    return (0, 2) in places and whole == head + tail


_WORDS = re.compile(r".*[A-Za-z](?= [A-Za-z])", re.DOTALL)
_SHORT, _MANY = 64, 10_000
"""Characters of a text, and number of texts, that are worth remembering."""
_TRY = "ab cd"
_TRIED = (_TRY, _TRY[:2], _TRY[2:])


def _isolated(tokenizer: Any) -> list[str]:
    """Special tokens that part a text whatever stands around them; none where they are many."""
    if not tokenizer.is_fast:
        return []
    added = tokenizer.added_tokens_decoder.values()
    free = [t for t in added if not (t.normalized or t.lstrip or t.rstrip or t.single_word)]
    return [t.content for t in free if t.special] if len(free) <= _SHORT else []


def _types(state: Any) -> set[str]:
    """The kinds of steps in a part of a tokenizer."""
    if state is None:
        return set()
    for key in ("pretokenizers", "normalizers"):
        if key in state:
            return {kind for each in state[key] for kind in _types(each)}
    return {state["type"]}


def _of_length(mask: list[int], count: int) -> list[int] | None:
    """With the EOS that encoding adds, which belongs to the last answer."""
    mask = mask + mask[-1:] * (count - len(mask))
    return None if all(mask) else mask


def _drop_untrained_ends(pieces: Pieces) -> None:
    """Nothing behind the last answer is needed."""
    for i, mask in enumerate(pieces.masks):
        if mask is not None:
            end = len(mask) - mask[::-1].index(1) if 1 in mask else 0
            pieces.responses[i] = pieces.responses[i][:end]
            pieces.masks[i] = None if all(mask[:end]) else mask[:end]


def _with_one_bos(ids: list[int], bos: int | None) -> list[int]:
    """Prompts that spell out BOS, and a tokenizer that adds it, would give two."""
    start = 0
    while bos is not None and ids[start : start + 2] == [bos, bos]:
        start += 1
    return ids[start:] if start else ids


def _keep_end(
    prompt: list[int], *responses: list[int], max_length: int, bos: int | None
) -> list[list[int]]:
    has_bos = prompt[0] == bos
    # BOS alone is no prompt: one token behind it stays too, if max_length has room for it.
    least = min(len(prompt), 1 + has_bos, max_length - 1)
    cut = [response[: max_length - least] for response in responses]
    room = max_length - max(map(len, cut))
    if len(prompt) > room:
        tail = room - has_bos
        # The text may hold a BOS of its own where the cut falls.
        prompt = _with_one_bos(prompt[: int(has_bos)] + prompt[len(prompt) - tail :], bos)
    return [prompt, *cut]


def _keep_start(
    prompt: list[int], *responses: list[int], max_length: int, bos: int | None
) -> list[list[int]]:
    room = max(0, max_length - len(prompt))
    return [prompt[:max_length], *(response[:room] for response in responses)]
