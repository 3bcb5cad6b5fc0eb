"""Attention over packed sequences (`llm.loss.packing`), for any model of transformers.

Registered with transformers' attention interface under `PACKED`; `packed_attention(model)` switches
a model to it for a while. The plan of a batch travels as a keyword argument through the model. On
CPU, and wherever nothing better applies, every block is one call of scaled_dot_product_attention;
on CUDA in half precision one variable-length call serves all blocks: its causal mask is aligned to
the end of the keys, so a block that sees a shared prompt needs no mask of its own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel

from llm.loss.packing import PackingPlan, to_device

PACKED = "packed_segments"
PLAN_ARGUMENT = "packing_plan"
_UNSUPPORTED = ("softcap", "position_bias", "s_aux")
"""Extras of some models' attention that these kernels do not compute."""


@contextmanager
def packed_attention(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model takes packed batches and nothing else; afterwards it is as it was."""
    inner = transformers_model(model)
    before = inner.config._attn_implementation
    if before == PACKED:
        yield
        return
    inner.set_attn_implementation(PACKED)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)


def attention_without_plans() -> AbstractContextManager[None]:
    """Inside, torch's attention leaves out cuDNN, which makes a plan for every new shape.

    Since torch 2.11 it is preferred on Hopper; batches of changing lengths would wait for it at
    every step.
    """
    context: AbstractContextManager[None] = sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )
    return context


def transformers_model(model: Any) -> Any:
    """The transformers model inside data-parallel, compiled and PEFT wrappers."""
    while not isinstance(model, PreTrainedModel):
        for wrapped in ("module", "_orig_mod"):
            if isinstance(getattr(model, wrapped, None), torch.nn.Module):
                model = getattr(model, wrapped)
                break
        else:
            model = model.get_base_model()
    return model


@torch.compiler.disable  # a plan is another program for every batch; the layers around compile
def packed_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing_plan: PackingPlan | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed sequence: query (1, H, T, D), key and value (1, H_kv, T, D).

    Returns (1, T, H, D), as transformers expects it.

    Raises:
        NotImplementedError: without a plan, or for a kind of attention that is not computed here.
    """
    if packing_plan is None:
        raise NotImplementedError("its attention gets no plan of a packed batch")
    extras = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if extras:
        raise NotImplementedError(f"packed attention does not compute {', '.join(extras)}")
    query, key, value = _one_type(query, key, value)
    half = query.dtype in (torch.float16, torch.bfloat16)
    varlen = varlen_attention() if query.is_cuda and half and dropout == 0.0 else None
    if varlen is not None:
        out = _all_blocks(varlen, query, key, value, packing_plan, scaling, sliding_window)
    else:
        out = _block_by_block(query, key, value, packing_plan, scaling, dropout, sliding_window)
    return out, None


def _one_type(*tensors: Tensor) -> Sequence[Tensor]:
    """Under autocast, all in its type: rotary positions in float32 lift query and key out of it.

    torch's own attention casts what it gets; the variable-length kernels do not.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


def _block_by_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: PackingPlan,
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda:  # with a mask or in float32 only the slow kernel knows groups
        key, value = _repeated(query, key, value)
        grouped = False
    # One split each: its backward is one concatenation, where slices would each fill a whole
    # tensor with zeros.
    queries, keys, values = (x.split(plan.lengths, dim=2) for x in (query, key, value))
    outputs = []
    for i, (parent, shared) in enumerate(zip(plan.parents, plan.shared, strict=True)):
        k, v = keys[i], values[i]
        if parent >= 0:
            k = torch.cat([keys[parent][:, :, :shared], k], dim=2)
            v = torch.cat([values[parent][:, :, :shared], v], dim=2)
        masked = parent >= 0 or (window is not None and k.shape[2] > window)
        mask = _mask(plan.lengths[i], shared, window, query.device, query.dtype) if masked else None
        outputs.append(
            F.scaled_dot_product_attention(
                queries[i],
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=not masked,
                scale=scaling,
                enable_gqa=grouped,
            ).transpose(1, 2)
        )
    return torch.cat(outputs, dim=1)


def _repeated(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Key and value with as many heads (axis 1 of all three) as the query."""
    repeats = query.shape[1] // key.shape[1]
    return [x.repeat_interleave(repeats, dim=1) for x in (key, value)]


@lru_cache(maxsize=32)
def _mask(
    length: int, shared: int, window: int | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Additive (length, shared + length): token i of the block sees the prompt and 0..i."""
    distance = (
        torch.arange(shared, shared + length, device=device)[:, None]
        - torch.arange(shared + length, device=device)[None, :]
    )
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    return torch.zeros(seen.shape, device=device, dtype=dtype).masked_fill_(~seen, -math.inf)


def _all_blocks(
    varlen: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: PackingPlan,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    layout = _layout(plan, query.device)
    if layout.gather is not None:
        keys, values = keys[layout.gather], values[layout.gather]
    out = varlen(
        queries.contiguous(),
        keys.contiguous(),
        values.contiguous(),
        layout.query_starts,
        layout.key_starts,
        max(plan.lengths),
        max(plan.key_lengths),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=(-1 if window is None else window - 1, 0),
        grouped=query.shape[1] != key.shape[1],
    )
    return out[None]


class _Layout:
    """A plan on a device, as variable-length attention reads it."""

    def __init__(self, plan: PackingPlan, device: torch.device) -> None:
        self.query_starts = _starts(plan.lengths, device)
        self.key_starts = _starts(plan.key_lengths, device)
        self.gather: Tensor | None = None
        if any(parent >= 0 for parent in plan.parents):
            self.gather = to_device(torch.from_numpy(plan.key_indices()), device)


@lru_cache(maxsize=8)
def _layout(plan: PackingPlan, device: torch.device) -> _Layout:
    """Made once a batch: all layers, and the recomputation of checkpointed ones, share it."""
    return _Layout(plan, device)


def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    starts[1:] = torch.tensor(lengths).cumsum(0)
    return to_device(starts, device)


@lru_cache(maxsize=1)
def varlen_attention() -> Callable[..., Tensor] | None:
    """torch's variable-length attention under one signature, or None where torch has none.

    Its arguments drift: `is_causal` up to torch 2.10, `window_size` later, `enable_gqa` from 2.12.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters

    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_starts: Tensor,
        key_starts: Tensor,
        longest_query: int,
        longest_key: int,
        *,
        scale: float,
        window: tuple[int, int],
        grouped: bool,
    ) -> Tensor:
        options: dict[str, Any] = {"scale": scale}
        if "window_size" in known:
            options["window_size"] = window
        elif window[0] >= 0:
            raise NotImplementedError("this torch has no variable-length attention with a window")
        else:
            options["is_causal"] = True
        if grouped and "enable_gqa" in known:
            options["enable_gqa"] = True
        elif grouped:
            key, value = _repeated(query, key, value)
        out: Any = varlen_attn(
            query, key, value, query_starts, key_starts, longest_query, longest_key, **options
        )
        return out

    return call


AttentionInterface.register(PACKED, packed_attention_forward)
