"""Does a model give every row the values that it has alone? Found out before the first step.

The log-probabilities of a response are a function of its row: not of the rows beside it, of the
other response of its pair, or of the tokens that follow. Models break this in packed batches (a
window that is in their mask only, a recurrent state that runs on into the next row), in padded ones
(rotary factors that the longest row decides) or everywhere (encoders). Two tests, and neither
knows a tolerance in nats, so that they decide in every precision:

1. To the bit. Tokens are changed in batches of the same shapes, so that the same kernels run; what
   does not depend on them must not move by a bit. Equal bits cannot be had where kernels depend on
   values (the number of tokens that an expert gets) or do not reproduce themselves (atomics on a
   CUDA device). There the derivative of the watched values by the embeddings of the changed tokens
   decides: where nothing flows, every path has a factor of exactly 0, on any device; and the
   values may move by rounding only, as in 2.
2. Against each row alone, for the shortest row beside the longest. The difference must be rounding:
   it is compared with how far the values move when the output of every module moves by up to one
   unit in its last place, at random.

Both are done in the precision of the run, with its kernels, and again in float32 where that is
finer (and fits into memory): there an error below the rounding of bfloat16 is found as well.

What fails packed is padded; what fails padded too, or cannot be decided, is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm.loss.collate import collate_preference, collate_sft
from llm.loss.evaluate import device_of, evaluating, row_length
from llm.loss.forward import response_logps
from llm.loss.objectives import Batch, Row, move
from llm.loss.packing import pack_preference, pack_sft
from theory.cli import UserError

ROUNDING = 8.0
"""A difference is rounding up to this many times the effect of one unit in the last place.

Right layouts of all architectures come to at most 2.2 of it, in float32 and in bfloat16."""
UNDECIDED = 0.5
"""Nats a token: a model that rounding moves by more, or chance, cannot be told from a wrong one."""
SHORT = 24
"""Tokens of a response in the test to the bit."""
SIDES = ("chosen_ids", "rejected_ids")


def layout_problem(
    model: Any, name: str, rows: Sequence[Row], pad_token_id: int, *, packing: bool
) -> str | None:
    """Why `model` cannot have packed batches; None if it can, or if `packing` does not ask.

    Args:
        model: on its device; the precision of the run is around the call.
        name: what messages call it.
        rows: tokenised rows that it is to see, of SFT, of DPO or of both.

    Raises:
        UserError: padded batches would be wrong too, or no value can be had.
    """
    check_tokens(model, name, rows, pad_token_id)
    ends = probe_rows(rows)
    with evaluating(model), torch.no_grad():
        problem = _examined(model, name, ends, pad_token_id, packing)
        if _rounds(model):
            with suppress(torch.OutOfMemoryError), in_float32(model):
                packing = packing and problem is None
                problem = problem or _examined(model, name, ends, pad_token_id, packing)
    return problem


def _examined(
    model: Any, name: str, ends: tuple[Row, Row], pad_token_id: int, packing: bool
) -> str | None:
    """`layout_problem` in one precision."""
    try:
        probe = Probe(model, *ends, pad_token_id)
        future = probe.future()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models of others: they raise what they like
        raise UserError(f"{name} cannot be evaluated: {first_line(error)}") from error
    if future is not None:
        raise UserError(f"{name} is no causal language model: {future}")
    packed = probe.problem(packed=True) if packing else None
    if packing and packed is None:
        return None
    padded = probe.problem(packed=False)
    if padded is not None:
        raise UserError(
            f"{name} cannot have rows beside each other, even padded: {padded}{_mend(model, ends)}"
        )
    return packed


def rotary_limit(model: Any) -> int | None:
    """Tokens of a row beyond which the rotary factors of all rows of its batch are others."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    limit: int | None = rope.get("original_max_position_embeddings")
    return limit


def _mend(model: Any, ends: tuple[Row, Row]) -> str:
    limit = rotary_limit(model)
    if limit is None or not row_length(ends[0]) <= limit < row_length(ends[1]):
        return ""
    return f"; --max_length {limit} would keep all rows below where its rotary factors change"


def check_tokens(model: Any, name: str, rows: Sequence[Row], pad_token_id: int) -> None:
    """Refuse token ids that have no embedding; a CUDA device would fail without saying where."""
    try:
        size = len(model.get_input_embeddings().weight)
    except (AttributeError, NotImplementedError, TypeError):  # several tables, or none
        return
    largest = max(max(ids) for row in rows for key, ids in row.items() if key.endswith("_ids"))
    for what, token in (("the rows hold", largest), ("their padding is", pad_token_id)):
        if token >= size:
            raise UserError(f"{name} has embeddings of {size} tokens, and {what} token {token}")


def probe_rows(rows: Sequence[Row]) -> tuple[Row, Row]:
    """The shortest and the longest row; as pairs if there are pairs among the rows."""
    order = sorted(rows, key=row_length)
    pairs = any(SIDES[0] in row for row in rows)
    shortest, longest = (_ids_of(order[i], pairs) for i in (0, -1))
    return shortest, longest


def _ids_of(row: Row, pair: bool) -> Row:
    """The token ids alone; a demonstration gets every second token as its rejected response."""
    ids = {key: list(value) for key, value in row.items() if key.endswith("_ids")}
    if pair and SIDES[0] not in ids:
        completion = ids.pop("completion_ids")
        ids |= dict(zip(SIDES, (completion, completion[::2]), strict=True))
    return ids


@dataclass
class Probe:
    """The tests on a model in evaluation mode; a problem is a text, None where there is none."""

    model: Any
    shortest: Row
    longest: Row
    pad_token_id: int

    def __post_init__(self) -> None:
        self.sides = [key for key in self.longest if key != "prompt_ids"]
        self.rng = np.random.default_rng(0)
        self.ids = sorted({t for row in self._ends for ids in row.values() for t in ids})
        self.alone = self._one_by_one()
        if not torch.cat(self.alone).isfinite().all():
            raise ValueError(
                "its log-probabilities are not finite; are its weights damaged, or its precision "
                "too low?"
            )
        with shaken(self.model):
            moved = self._one_by_one()
        values, moved_values = torch.cat(self.alone), torch.cat(moved)
        last_place = torch.finfo(values.dtype).eps * rms(values)
        self.rounding = max(rms(moved_values - values), last_place)
        if self.rounding > UNDECIDED:
            raise ValueError(f"rounding moves its values by {self.rounding:.1e} nats a token")

    @property
    def _ends(self) -> list[Row]:
        return [self.shortest, self.longest]

    def future(self) -> str | None:
        """Of a row by itself: what is later in it must not be seen."""
        row = {"prompt_ids": self._draw(1), "completion_ids": self._draw(SHORT)}
        kept = len(row["completion_ids"]) * 3 // 4
        later = row["completion_ids"][:kept] + self._other(row["completion_ids"][kept:])
        rows = (row, row | {"completion_ids": later})
        before, after = (collate_sft([each], self.pad_token_id) for each in rows)
        if self._unmoved(before, after, slice(None), kept):
            return None
        return "the log-probability of a token moves with the tokens that follow it"

    def problem(self, *, packed: bool) -> str | None:
        """Of rows beside each other in one batch."""
        try:
            return self._leak(packed) or self._disagreement(packed)
        except torch.OutOfMemoryError:
            raise
        except NotImplementedError as error:
            return first_line(error)
        except Exception as error:
            return f"it fails on them ({type(error).__name__}: {first_line(error)})"

    def _leak(self, packed: bool) -> str | None:
        # The second prompt is one token: its response begins where a leak is strongest.
        rows = [
            {"prompt_ids": self._draw(length)} | {side: self._draw(SHORT) for side in self.sides}
            for length in (SHORT // 3, 1)
        ]
        before = self._collate(rows, packed)
        for name, changed, watched in self._changes(rows):
            after = self._collate(changed, packed)
            if not self._unmoved(before, after, watched):
                return f"{name} move each other's log-probabilities"
        return None

    def _changes(self, rows: list[Row]) -> Iterator[tuple[str, list[Row], slice]]:
        """What is changed, and the responses that must not move (chosen first, then rejected)."""
        for i in range(2):
            other = {key: self._other(ids) for key, ids in rows[i].items()}
            changed = [other if j == i else row for j, row in enumerate(rows)]
            yield "rows", changed, slice(1 - i, None, 2)
        for i, side in enumerate(self.sides if len(self.sides) > 1 else ()):
            changed = [row | {side: self._other(row[side])} for row in rows]
            yield "the responses of a pair", changed, slice(2 - 2 * i, 4 - 2 * i)

    def _disagreement(self, packed: bool) -> str | None:
        together = self._values(self._collate(self._ends, packed))
        if [v.shape for v in together] != [v.shape for v in self.alone]:
            return "the model returns other positions than were asked for"
        worst = max(rms(a - b) for a, b in zip(together, self.alone, strict=True))
        if worst <= ROUNDING * self.rounding:
            return None
        return (
            f"rows of {row_length(self.shortest)} and {row_length(self.longest)} tokens have other "
            f"log-probabilities together than alone, by {worst:.1e} nats a token "
            f"(rounding: {self.rounding:.0e})"
        )

    def _unmoved(
        self, before: Batch, after: Batch, watched: slice, first: int | None = None
    ) -> bool:
        """Whether the `watched` responses, or their `first` tokens, have the same values."""
        values, others = (
            torch.cat([v[:first] for v in self._values(batch)[watched]])
            for batch in (before, after)
        )
        if torch.equal(values, others):
            return True
        changed = before["input_ids"] != after["input_ids"]
        return rms(values - others) <= ROUNDING * self.rounding and self._nothing_flows(
            before, changed, watched, first
        )

    def _nothing_flows(
        self, batch: Batch, changed: Tensor, watched: slice, first: int | None
    ) -> bool:
        """Whether the derivative by the embeddings of `changed` (B, T) tokens is exactly 0."""
        embedded: list[Tensor] = []

        def as_leaf(_: Any, __: Any, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[-1]

        handle = self.model.get_input_embeddings().register_forward_hook(as_leaf)
        try:
            with torch.enable_grad():
                values = self._watched(batch, watched, first)
                weights = torch.linspace(1.0, 2.0, len(values), device=values.device)
                gradients = torch.autograd.grad((weights * values).sum(), embedded)
        finally:
            handle.remove()
        # Another layout than (B, T, ...) tells nothing.
        return all(g.shape[:2] == changed.shape and not g[changed].any() for g in gradients)

    def _watched(self, batch: Batch, responses: slice, first: int | None) -> Tensor:
        return torch.cat([values[:first] for values in self._values(batch)[responses]])

    def _one_by_one(self) -> list[Tensor]:
        singles = [
            {"prompt_ids": row["prompt_ids"], "completion_ids": row[side]}
            for side in self.sides
            for row in self._ends
        ]
        return [self._values(collate_sft([row], self.pad_token_id))[0] for row in singles]

    def _values(self, batch: Batch) -> list[Tensor]:
        """log pi of the tokens of each response, in the order of `ResponseLogps.owners`."""
        logps = response_logps(self.model, move(batch, device_of(self.model)))
        return [logps.values[logps.owners == i] for i in range(logps.count)]

    def _collate(self, rows: Sequence[Row], packed: bool) -> Batch:
        pair = len(self.sides) > 1
        pack, pad = (pack_preference, collate_preference) if pair else (pack_sft, collate_sft)
        return (pack if packed else pad)(rows, self.pad_token_id)

    def _draw(self, length: int) -> list[int]:
        """Tokens of the rows at random, half as many as the longest row has or `length`."""
        length = max(1, min(length, row_length(self.longest) // 2))
        return list(map(int, self.rng.choice(self.ids, length)))

    def _other(self, tokens: Sequence[int]) -> list[int]:
        """Each token another one."""
        return [self.ids[(self.ids.index(t) + 1) % len(self.ids)] for t in tokens]


@contextmanager
def shaken(model: torch.nn.Module) -> Iterator[None]:
    """Inside, what the innermost modules return is off by up to one unit in its last place."""
    generators: dict[torch.device, torch.Generator] = {}

    def shake(_: Any, __: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        if output.device not in generators:
            generators[output.device] = torch.Generator(output.device).manual_seed(0)
        exact = output.to(torch.promote_types(output.dtype, torch.float32))
        noise = torch.rand(exact.shape, generator=generators[output.device], device=output.device)
        return (exact * (1.0 + _precision(output) * (2.0 * noise - 1.0))).to(output.dtype)

    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    handles = [module.register_forward_hook(shake) for module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounds(model: Any) -> bool:
    """Whether the run computes in less than float32, with weights that can be lifted to it."""
    floating = [p for p in model.parameters() if p.is_floating_point()]
    whole = len(floating) == len(list(model.parameters()))  # 4-bit weights are bytes
    lower = any(p.element_size() < 4 for p in floating)
    return whole and (lower or torch.is_autocast_enabled(device_of(model).type))


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Inside, without autocast and with weights of half precision as float32; then as before."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    lifted = [(tensor, tensor.dtype) for tensor in tensors if tensor.element_size() < 4]
    try:
        for tensor, _ in lifted:
            tensor.data = tensor.data.float()
        with torch.autocast(device_of(model).type, enabled=False):
            yield
    finally:
        for tensor, dtype in lifted:
            tensor.data = tensor.data.to(dtype)


def _precision(tensor: Tensor) -> float:
    """Of the products that made it, relative."""
    tf32 = tensor.is_cuda and torch.backends.cuda.matmul.allow_tf32
    eps = torch.finfo(tensor.dtype).eps
    return max(eps, 2.0**-11) if tf32 else eps


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
